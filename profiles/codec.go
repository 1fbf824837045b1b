// SPDX-License-Identifier: Apache-2.0

package profiles

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
	"time"
	"unicode/utf8"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// MaxFileSize bounds what is decoded, in bytes.
const MaxFileSize = 8 << 20

// maxDepth bounds nesting: none of our formats needs more than ten.
const maxDepth = 64

// EncodeProfile writes a profile as OCI seccomp JSON, as docker, podman and a
// kubelet's localhostProfile take it: sorted, one call a line, ended by a
// newline, so that a diff shows calls.
func EncodeProfile(p *specs.LinuxSeccomp) ([]byte, error) {
	if p == nil {
		return nil, errors.New("encode: no profile")
	}
	return encode(normal(p))
}

// DecodeProfile reads OCI seccomp JSON. Unknown fields, fields in other than
// their exact case, repeated keys, bytes that are not UTF-8 and anything behind
// the value are a *[SyntaxError]. It doesn't look at names and actions: that
// takes libseccomp.
func DecodeProfile(data []byte) (*specs.LinuxSeccomp, error) {
	p, err := decode[specs.LinuxSeccomp](data)
	if err == nil && p.DefaultAction == "" {
		return nil, errors.New("defaultAction is missing")
	}
	return p, err
}

// EncodeRecording writes a recording as JSON.
func EncodeRecording(r *Recording) ([]byte, error) { return encode(r) }

// DecodeRecording reads what EncodeRecording wrote, as strictly as
// [DecodeProfile].
func DecodeRecording(data []byte) (*Recording, error) {
	r, err := decode[Recording](data)
	if err == nil && r.SchemaVersion != 1 {
		return nil, schemaError(r.SchemaVersion)
	}
	return r, err
}

// EncodeManifest writes a manifest as JSON.
func EncodeManifest(m *Manifest) ([]byte, error) { return encode(m) }

// DecodeManifest reads what EncodeManifest wrote, as strictly as
// [DecodeProfile].
func DecodeManifest(data []byte) (*Manifest, error) {
	m, err := decode[Manifest](data)
	if err == nil && m.SchemaVersion != 1 {
		return nil, schemaError(m.SchemaVersion)
	}
	return m, err
}

func schemaError(version int) error {
	return fmt.Errorf("schemaVersion %d, want 1: written by another version of syslatch", version)
}

func encode(v any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(v); err != nil {
		return nil, fmt.Errorf("encode: %w", err)
	}
	return b.Bytes(), nil
}

// SyntaxError is a place in a file that can't be decoded.
type SyntaxError struct {
	Line int // from 1
	Err  error
}

func (e *SyntaxError) Error() string { return fmt.Sprintf("line %d: %v", e.Line, e.Err) }

// Unwrap gives the cause.
func (e *SyntaxError) Unwrap() error { return e.Err }

func decode[T any](data []byte) (*T, error) {
	if len(data) > MaxFileSize {
		return nil, fmt.Errorf("%d bytes, more than %d", len(data), MaxFileSize)
	}
	at := func(offset int64, err error) error {
		offset = min(max(offset, 0), int64(len(data)))
		return &SyntaxError{1 + bytes.Count(data[:offset], []byte("\n")), err}
	}
	if offset, err := checkKeys(data, reflect.TypeFor[T]()); err != nil {
		return nil, at(offset, err)
	}
	v := new(T)
	if err := json.Unmarshal(data, v); err != nil {
		var typ *json.UnmarshalTypeError
		if errors.As(err, &typ) {
			return nil, at(typ.Offset, err)
		}
		return nil, err
	}
	return v, nil
}

// checkKeys finds what encoding/json lets pass: the same key twice in an object
// (the last would win) and a field's name in another case (which readers in
// other languages ignore: two programs would read two profiles). It returns the
// offset of the problem.
func checkKeys(data []byte, typ reflect.Type) (int64, error) {
	if !utf8.Valid(data) {
		offset := 0
		for offset < len(data) {
			r, size := utf8.DecodeRune(data[offset:])
			if r == utf8.RuneError && size == 1 {
				break
			}
			offset += size
		}
		return int64(offset), errors.New("not UTF-8")
	}
	// First the syntax, whole: the token reader's errors have no usable offset.
	var raw json.RawMessage
	if err := json.Unmarshal(data, &raw); err != nil {
		var syntax *json.SyntaxError
		if errors.As(err, &syntax) {
			return syntax.Offset, err
		}
		return 0, err
	}
	d := json.NewDecoder(bytes.NewReader(data))
	type level struct {
		fields map[string]reflect.Type // of a struct
		keys   map[string]bool         // nil in an array
		value  reflect.Type            // of what comes next; nil if it can't be known
		inKey  bool                    // in an object: the next token is a value
	}
	var stack []level
	for {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			return 0, nil
		}
		if err != nil {
			return d.InputOffset(), err
		}
		var top *level
		value := typ
		if len(stack) > 0 {
			top = &stack[len(stack)-1]
			value = top.value
		}
		if key, ok := token.(string); ok && top != nil && top.keys != nil && !top.inKey {
			if top.keys[key] {
				return d.InputOffset(), fmt.Errorf("key %.100q stands twice", key)
			}
			top.keys[key], top.inKey = true, true
			if top.fields != nil {
				field, ok := top.fields[key]
				if !ok {
					return d.InputOffset(), fmt.Errorf("unknown field %.100q", key)
				}
				top.value = field
			}
			continue
		}
		switch token {
		case json.Delim('{'), json.Delim('['):
			if len(stack) >= maxDepth {
				return d.InputOffset(), fmt.Errorf("nested deeper than %d", maxDepth)
			}
			next := level{}
			for value != nil && value.Kind() == reflect.Pointer {
				value = value.Elem()
			}
			if token == json.Delim('{') {
				next.keys = map[string]bool{}
			}
			// Where the JSON's kind isn't the type's, decoding says so.
			if value != nil {
				switch value.Kind() {
				case reflect.Struct:
					next.fields = map[string]reflect.Type{}
					addFields(next.fields, value)
				case reflect.Map, reflect.Slice, reflect.Array:
					next.value = value.Elem()
				}
			}
			stack = append(stack, next)
			continue
		case json.Delim('}'), json.Delim(']'):
			stack = stack[:len(stack)-1]
		case nil:
			if top == nil {
				return d.InputOffset(), errors.New("null is no value")
			}
		}
		if len(stack) > 0 {
			stack[len(stack)-1].inKey = false // a value has ended
		}
	}
}

// addFields adds the JSON names of a struct's fields and of those it embeds.
func addFields(fields map[string]reflect.Type, typ reflect.Type) {
	if typ == reflect.TypeFor[time.Time]() {
		return
	}
	for i := range typ.NumField() {
		f := typ.Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		switch {
		case f.Anonymous && name == "":
			addFields(fields, f.Type)
		case name == "":
			fields[f.Name] = f.Type
		case name != "-":
			fields[name] = f.Type
		}
	}
}
