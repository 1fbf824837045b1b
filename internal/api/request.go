// SPDX-License-Identifier: Apache-2.0

package api

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"
)

const maxBody = 64 << 10

// phaseName is what profiles allows: what else there may be is in no policy, and in no
// log or terminal either.
var phaseName = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9_-]{0,31}$`)

// decodeObject reads one JSON object and nothing else. Keys are taken as they are
// written, each once: encoding/json would take "PHASE" as well, and the last of several.
func decodeObject(data []byte, field func(key string, value json.RawMessage) error) error {
	d := json.NewDecoder(bytes.NewReader(data))
	token, err := d.Token()
	if err != nil {
		return short(err)
	}
	if token != json.Delim('{') {
		return errors.New("want a JSON object")
	}
	seen := map[string]bool{}
	for d.More() {
		token, err := d.Token()
		if err != nil {
			return short(err)
		}
		key, ok := token.(string)
		if !ok {
			return errors.New("want a JSON object")
		}
		if seen[key] {
			return fmt.Errorf("key %.40q is repeated", key)
		}
		seen[key] = true
		var value json.RawMessage
		if err := d.Decode(&value); err != nil {
			return short(err)
		}
		if err := field(key, value); err != nil {
			return err
		}
	}
	if _, err := d.Token(); err != nil {
		return short(err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("there is more behind the JSON object")
	}
	return nil
}

func short(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return errors.New("the JSON object is not whole")
	}
	return err
}

// text is a value that has to be a string: null isn't one.
func text(key string, value json.RawMessage) (s string, err error) {
	if len(value) == 0 || value[0] != '"' {
		return "", fmt.Errorf("%s: want a string", key)
	}
	err = json.Unmarshal(value, &s)
	return s, err
}

func unknownKey(key, known string) error {
	return fmt.Errorf("unknown key %.40q, want %s", key, known)
}

// decodeSet reads the body of a switch.
func decodeSet(data []byte) (r SetRequest, timeout time.Duration, err error) {
	timeout = DefaultTimeout
	err = decodeObject(data, func(key string, value json.RawMessage) (err error) {
		switch key {
		case "phase":
			r.Phase, err = text(key, value)
		case "generation":
			n, parseErr := strconv.ParseUint(string(value), 10, 64)
			if parseErr != nil || n == 0 {
				return errors.New("generation: want a number from 1")
			}
			r.Generation = &n
		case "timeout":
			if r.Timeout, err = text(key, value); err != nil {
				return err
			}
			timeout, err = time.ParseDuration(r.Timeout)
			if err != nil || timeout <= 0 || timeout > MaxTimeout {
				return fmt.Errorf("timeout: want a duration such as \"500ms\", more than 0 and at most %v", MaxTimeout)
			}
		default:
			return unknownKey(key, "phase, generation or timeout")
		}
		return err
	})
	if err == nil {
		err = checkPhase(r.Phase)
	}
	return r, timeout, err
}

// decodeInside reads the body of a switch from inside.
func decodeInside(data []byte) (r InsideRequest, err error) {
	err = decodeObject(data, func(key string, value json.RawMessage) (err error) {
		if key != "phase" {
			return unknownKey(key, "phase")
		}
		r.Phase, err = text(key, value)
		return err
	})
	if err == nil {
		err = checkPhase(r.Phase)
	}
	return r, err
}

func checkPhase(name string) error {
	switch {
	case name == "":
		return errors.New(`say which phase: {"phase":"NAME"}`)
	case !phaseName.MatchString(name):
		return fmt.Errorf("phase: %.40q is no name of a phase, want 1 to 32 letters, digits, '_' and '-', the first a letter", name)
	}
	return nil
}

// readBody reads all of a body.
func readBody(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	data, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	var tooBig *http.MaxBytesError
	switch {
	case errors.As(err, &tooBig):
		return nil, badRequest(fmt.Sprintf("the body has more than %d bytes", maxBody))
	case err != nil:
		return nil, badRequest("body: " + err.Error())
	}
	return data, nil
}

// ifMatch is the generation of an If-Match; 0 if none matters.
func ifMatch(header http.Header) (uint64, error) {
	values := header.Values("If-Match")
	if len(values) == 0 {
		return 0, nil
	}
	value := strings.TrimSpace(values[0])
	if value == "*" && len(values) == 1 {
		return 0, nil
	}
	bare, ok := strings.CutPrefix(value, `"`)
	bare, ok2 := strings.CutSuffix(bare, `"`)
	n, err := strconv.ParseUint(bare, 10, 64)
	if len(values) > 1 || !ok || !ok2 || err != nil || n == 0 {
		return 0, badRequest(`If-Match: want one ETag that an answer had, such as "3" with its quotes`)
	}
	return n, nil
}

// parseQuery is strict where URL.Query leaves out what it doesn't understand.
func parseQuery(r *http.Request) (url.Values, error) {
	values, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, badRequest("query: " + err.Error())
	}
	return values, nil
}
