// SPDX-License-Identifier: Apache-2.0

package hook

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/syslatch/syslatch/internal/adjust"
)

// Bounds of a spec: podman's default one has 11 KB, and nests 6 deep.
const (
	maxInput = 16 << 20
	maxDepth = 100
)

// object is a JSON object whose values are left as they were written.
type object map[string]json.RawMessage

// document is a container's spec, of which only the parts that are set change.
type document struct {
	root    object
	view    view
	changed bool
}

// view is what is read of a spec.
type view struct {
	Hostname    string            `json:"hostname"`
	Annotations map[string]string `json:"annotations"`
	Root        struct {
		Path string `json:"path"`
	} `json:"root"`
	Mounts []struct {
		Destination string `json:"destination"`
		Source      string `json:"source"`
	} `json:"mounts"`
	Linux struct {
		CgroupsPath string              `json:"cgroupsPath"`
		Seccomp     *specs.LinuxSeccomp `json:"seccomp"`
	} `json:"linux"`
}

// viewed are the names by which view, and what is set, look into objects.
// encoding/json matches them in any case: a name in another one would be read by
// us, or by an engine, and not be what we set.
var viewed = []string{
	"ociVersion", "hostname", "annotations", "root", "mounts", "linux", "process", "hooks", "cgroupsPath", "seccomp",
	"resources", "memory", "cpu", "pids", "unified", "oomScoreAdj", "rlimits", "prestart", "createRuntime", "poststart",
}

// read reads all of r, up to maxInput.
func read(r io.Reader) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, maxInput+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxInput {
		return nil, fmt.Errorf("more than %d bytes", maxInput)
	}
	return data, nil
}

// checkJSON wants one JSON object without repeated keys. Two parsers may take
// different ones of two values of one key.
func checkJSON(data []byte) error {
	type level struct {
		keys   map[string]bool // nil for an array
		atName bool            // the next token is a key
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.UseNumber()
	var stack []level
	for {
		token, err := dec.Token()
		if errors.Is(err, io.EOF) && len(stack) == 0 {
			return io.ErrUnexpectedEOF // empty
		}
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return fmt.Errorf("at byte %d: %w", dec.InputOffset(), err)
		}
		if len(stack) == 0 && token != json.Delim('{') {
			return errors.New("is no JSON object")
		}
		top := len(stack) - 1
		if top >= 0 && stack[top].keys != nil && stack[top].atName {
			if name, ok := token.(string); ok {
				if stack[top].keys[name] {
					return fmt.Errorf("at byte %d: key %.100q is repeated", dec.InputOffset(), name)
				}
				stack[top].keys[name] = true
				stack[top].atName = false
				continue
			}
		}
		switch token {
		case json.Delim('{'):
			stack = append(stack, level{map[string]bool{}, true})
		case json.Delim('['):
			stack = append(stack, level{})
		case json.Delim('}'), json.Delim(']'):
			stack = stack[:top]
		}
		if len(stack) > maxDepth {
			return fmt.Errorf("at byte %d: nested deeper than %d", dec.InputOffset(), maxDepth)
		}
		if len(stack) == 0 {
			break
		}
		// A value has ended, or a container has begun.
		if top = len(stack) - 1; token != json.Delim('{') && token != json.Delim('[') && stack[top].keys != nil {
			stack[top].atName = true
		}
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return fmt.Errorf("at byte %d: something follows the object", dec.InputOffset())
	}
	return nil
}

func parse(data []byte) (*document, error) {
	if err := checkJSON(data); err != nil {
		return nil, err
	}
	d := &document{}
	if err := json.Unmarshal(data, &d.root); err != nil {
		return nil, err
	}
	for _, part := range []string{"", "linux", "process", "hooks", "linux/resources", "linux/resources/memory", "linux/resources/cpu", "linux/resources/pids"} {
		o, err := d.at(part)
		if err != nil {
			return nil, err
		}
		for key := range o {
			for _, name := range viewed {
				if key != name && strings.EqualFold(key, name) {
					return nil, fmt.Errorf("key %.100q is %q in another case", key, name)
				}
			}
		}
	}
	if err := json.Unmarshal(data, &d.view); err != nil {
		return nil, err
	}
	return d, nil
}

// at returns the object at a path of keys, empty if there is none.
func (d *document) at(path string) (object, error) {
	o := d.root
	if path == "" {
		return o, nil
	}
	for key := range strings.SplitSeq(path, "/") {
		var next object
		if raw := o[key]; raw != nil {
			if err := json.Unmarshal(raw, &next); err != nil {
				return nil, fmt.Errorf("%s: %w", path, err)
			}
		}
		o = next
	}
	return o, nil
}

// set puts a value at a path of keys; what else is there stays.
func (d *document) set(path string, value any) error {
	raw, err := json.Marshal(value)
	if err != nil {
		return err
	}
	d.changed = true
	return d.root.set(strings.Split(path, "/"), raw)
}

func (o object) set(path []string, raw json.RawMessage) error {
	if len(path) > 1 {
		next := object{}
		if old := o[path[0]]; old != nil && string(old) != "null" {
			if err := json.Unmarshal(old, &next); err != nil {
				return fmt.Errorf("%s: %w", path[0], err)
			}
		}
		if err := next.set(path[1:], raw); err != nil {
			return err
		}
		var err error
		if raw, err = json.Marshal(next); err != nil {
			return err
		}
	}
	o[path[0]] = raw
	return nil
}

// encode writes the spec.
func (d *document) encode() ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	err := e.Encode(d.root)
	return b.Bytes(), err
}

// apply puts a plan into the spec.
func (d *document) apply(plan *adjust.Plan) error {
	if plan.Seccomp != nil {
		if err := d.set("linux/seccomp", plan.Seccomp); err != nil {
			return err
		}
	}
	if r := plan.Resources; r != nil {
		for _, f := range resourceFields(r) {
			if err := d.set("linux/resources/"+f.path, f.value); err != nil {
				return err
			}
		}
	}
	if plan.OOMScoreAdj != nil {
		if err := d.set("process/oomScoreAdj", *plan.OOMScoreAdj); err != nil {
			return err
		}
	}
	if err := d.addMounts(plan.Mounts); err != nil {
		return err
	}
	return d.setRlimits(plan.Rlimits)
}

// addMounts adds mounts behind those that are there.
func (d *document) addMounts(mounts []specs.Mount) error {
	if len(mounts) == 0 {
		return nil
	}
	var all []json.RawMessage
	if raw := d.root["mounts"]; raw != nil {
		if err := json.Unmarshal(raw, &all); err != nil {
			return fmt.Errorf("mounts: %w", err)
		}
	}
	for _, m := range mounts {
		raw, err := json.Marshal(m)
		if err != nil {
			return err
		}
		all = append(all, raw)
	}
	return d.set("mounts", all)
}

type field struct {
	path  string
	value any
}

// resourceFields lists what adjust.Build sets for the hook.
func resourceFields(r *specs.LinuxResources) (fields []field) {
	if m := r.Memory; m != nil {
		if m.Limit != nil {
			fields = append(fields, field{"memory/limit", *m.Limit})
		}
		if m.Swap != nil {
			fields = append(fields, field{"memory/swap", *m.Swap})
		}
	}
	if c := r.CPU; c != nil {
		if c.Quota != nil {
			fields = append(fields, field{"cpu/quota", *c.Quota})
		}
		if c.Period != nil {
			fields = append(fields, field{"cpu/period", *c.Period})
		}
		if c.Shares != nil {
			fields = append(fields, field{"cpu/shares", *c.Shares})
		}
	}
	if p := r.Pids; p != nil && p.Limit != nil {
		fields = append(fields, field{"pids/limit", *p.Limit})
	}
	for key, value := range r.Unified { // keys have no slash: policy sees to it
		fields = append(fields, field{"unified/" + key, value})
	}
	return fields
}

// setRlimits replaces limits of the same type.
func (d *document) setRlimits(limits []specs.POSIXRlimit) error {
	if len(limits) == 0 {
		return nil
	}
	process, err := d.at("process")
	if err != nil {
		return err
	}
	var all []json.RawMessage
	if raw := process["rlimits"]; raw != nil {
		if err := json.Unmarshal(raw, &all); err != nil {
			return fmt.Errorf("process/rlimits: %w", err)
		}
	}
	all = slices.DeleteFunc(all, func(raw json.RawMessage) bool {
		var old specs.POSIXRlimit
		err := json.Unmarshal(raw, &old)
		return err == nil && slices.ContainsFunc(limits, func(l specs.POSIXRlimit) bool { return l.Type == old.Type })
	})
	for _, l := range limits {
		raw, err := json.Marshal(l)
		if err != nil {
			return err
		}
		all = append(all, raw)
	}
	return d.set("process/rlimits", all)
}

// addHook puts a hook in front of, or behind, those of a stage.
func (d *document) addHook(stage string, h specs.Hook, first bool) error {
	hooks, err := d.at("hooks")
	if err != nil {
		return err
	}
	var all []json.RawMessage
	if raw := hooks[stage]; raw != nil {
		if err := json.Unmarshal(raw, &all); err != nil {
			return fmt.Errorf("hooks/%s: %w", stage, err)
		}
	}
	raw, err := json.Marshal(h)
	if err != nil {
		return err
	}
	if first {
		all = slices.Insert(all, 0, raw)
	} else {
		all = append(all, raw)
	}
	return d.set("hooks/"+stage, all)
}
