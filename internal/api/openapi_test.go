// SPDX-License-Identifier: Apache-2.0

package api

import (
	"encoding/json"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"net/http"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"

	"github.com/syslatch/syslatch/internal/phase"
)

type schema struct {
	Ref                  string            `yaml:"$ref"`
	Type                 string            `yaml:"type"`
	Required             []string          `yaml:"required"`
	Properties           map[string]schema `yaml:"properties"`
	AdditionalProperties *bool             `yaml:"additionalProperties"`
	Enum                 []string          `yaml:"enum"`
	Pattern              string            `yaml:"pattern"`
	Items                *schema           `yaml:"items"`
}

type apiResponse struct {
	Ref         string `yaml:"$ref"`
	Description string `yaml:"description"`
	Content     map[string]struct {
		Schema schema `yaml:"schema"`
	} `yaml:"content"`
}

type operation struct {
	OperationID string                 `yaml:"operationId"`
	Responses   map[string]apiResponse `yaml:"responses"`
}

type document struct {
	Paths map[string]struct {
		Get *operation `yaml:"get"`
		Put *operation `yaml:"put"`
	} `yaml:"paths"`
	Components struct {
		Schemas   map[string]schema      `yaml:"schemas"`
		Responses map[string]apiResponse `yaml:"responses"`
	} `yaml:"components"`
}

var described = sync.OnceValue(func() *document {
	d := &document{}
	if err := yaml.Unmarshal(openAPI, d); err != nil {
		panic(err)
	}
	return d
})

func (d *document) operations(path string) map[string]*operation {
	out := map[string]*operation{http.MethodGet: d.Paths[path].Get, http.MethodPut: d.Paths[path].Put}
	maps.DeleteFunc(out, func(_ string, o *operation) bool { return o == nil })
	return out
}

func allRoutes() []route {
	return append((&server{}).routes(), (&Inside{}).routes()...)
}

// checked holds each answer that a test gets to openapi.yaml: its status, its media
// type, and the fields that it has to have.
type checked struct {
	t *testing.T
	http.RoundTripper
}

func (c checked) CloseIdleConnections() { c.RoundTripper.(*http.Transport).CloseIdleConnections() }

func (c checked) RoundTrip(r *http.Request) (*http.Response, error) {
	res, err := c.RoundTripper.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(allRoutes(), func(route route) bool {
		_, ok := match(route.pattern, r.URL)
		return ok
	})
	if i < 0 {
		return res, nil // 404
	}
	op := described().operations(allRoutes()[i].pattern)[r.Method]
	if op == nil {
		return res, nil // 405
	}
	status := strconv.Itoa(res.StatusCode)
	documented, ok := op.Responses[status]
	if name, isRef := strings.CutPrefix(documented.Ref, "#/components/responses/"); isRef {
		documented, ok = described().Components.Responses[name]
	}
	// A socket of its own has no routes for others, and turns nobody away.
	if !ok && res.StatusCode != http.StatusNotFound {
		c.t.Errorf("%s %s: status %s isn't documented", r.Method, r.URL, status)
		return res, nil
	}
	kind := res.Header.Get("Content-Type")
	if _, ok := documented.Content[kind]; !ok && documented.Content != nil {
		c.t.Errorf("%s %s: %s of %q isn't documented", r.Method, r.URL, status, kind)
	}
	return res, nil
}

func TestOpenAPIHasTheRoutes(t *testing.T) {
	d := described()
	var paths []string
	ids := map[string]bool{}
	for _, r := range allRoutes() {
		paths = append(paths, r.pattern)
		got := slices.Sorted(maps.Keys(d.operations(r.pattern)))
		want := slices.Sorted(maps.Keys(r.methods))
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: methods: %s", r.pattern, diff)
		}
		for method, op := range d.operations(r.pattern) {
			if op.OperationID == "" || ids[op.OperationID] {
				t.Errorf("%s %s: operationId %q", method, r.pattern, op.OperationID)
			}
			ids[op.OperationID] = true
			for status, res := range op.Responses {
				name, isRef := strings.CutPrefix(res.Ref, "#/components/responses/")
				if _, ok := d.Components.Responses[name]; isRef && !ok {
					t.Errorf("%s %s %s: no %s", method, r.pattern, status, res.Ref)
				}
			}
		}
	}
	slices.Sort(paths)
	if diff := cmp.Diff(paths, slices.Sorted(maps.Keys(d.Paths))); diff != "" {
		t.Errorf("paths: %s", diff)
	}
}

func TestOpenAPIHasTheTypes(t *testing.T) {
	d := described()
	types := map[string]any{
		"List": List{}, "Status": phase.Status{}, "InsideStatus": InsideStatus{}, "Problem": Problem{},
		"SetRequest": SetRequest{}, "InsideRequest": InsideRequest{}, "Event": phase.Event{},
	}
	for name, v := range types {
		typ := reflect.TypeOf(v)
		got := d.Components.Schemas[name]
		var properties, required []string
		for i := range typ.NumField() {
			f := typ.Field(i)
			key, options, _ := strings.Cut(f.Tag.Get("json"), ",")
			properties = append(properties, key)
			if !strings.Contains(options, "omit") {
				required = append(required, key)
			}
			if want, is := jsonType(f.Type), d.resolve(got.Properties[key]).Type; is != want && is != "" {
				t.Errorf("%s.%s is a %s, and a %s in Go", name, key, is, want)
			}
		}
		slices.Sort(properties)
		if diff := cmp.Diff(properties, slices.Sorted(maps.Keys(got.Properties))); diff != "" {
			t.Errorf("%s: properties: %s", name, diff)
		}
		if diff := cmp.Diff(required, got.Required); diff != "" {
			t.Errorf("%s: required: %s", name, diff)
		}
		if strict := got.AdditionalProperties != nil && !*got.AdditionalProperties; strict != strings.HasSuffix(name, "Request") {
			t.Errorf("%s: additionalProperties", name)
		}
	}
	for name := range d.Components.Schemas {
		if _, ok := types[name]; !ok && name != "State" && name != "PhaseName" {
			t.Errorf("schema %s is of nothing", name)
		}
	}
	if d.Components.Schemas["PhaseName"].Pattern != phaseName.String() {
		t.Errorf("PhaseName: %s", d.Components.Schemas["PhaseName"].Pattern)
	}
	constants := constantsOf(t)
	enums := map[string][]string{
		"State":  d.Components.Schemas["State"].Enum,
		"Kind":   d.Components.Schemas["Event"].Properties["kind"].Enum,
		"Origin": d.Components.Schemas["Event"].Properties["origin"].Enum,
	}
	for name, got := range enums {
		if diff := cmp.Diff(constants[name], got); diff != "" || len(got) == 0 {
			t.Errorf("enum of %s: %s", name, diff)
		}
	}
	kinds := slices.Sorted(slices.Values(d.Components.Schemas["Problem"].Properties["type"].Enum))
	if diff := cmp.Diff(slices.Sorted(maps.Keys(titles)), kinds); diff != "" {
		t.Errorf("types of problems: %s", diff)
	}
}

func (d *document) resolve(s schema) schema {
	if name, ok := strings.CutPrefix(s.Ref, "#/components/schemas/"); ok {
		return d.Components.Schemas[name]
	}
	return s
}

func jsonType(t reflect.Type) string {
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	switch t.Kind() {
	case reflect.Bool:
		return "boolean"
	case reflect.String:
		return "string"
	case reflect.Int, reflect.Uint64:
		return "integer"
	case reflect.Slice:
		return "array"
	}
	if _, ok := reflect.New(t).Interface().(json.Marshaler); ok {
		return "string" // time.Time
	}
	return "object"
}

// constantsOf gives the values of package phase's typed constants, by type.
func constantsOf(t *testing.T) map[string][]string {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), "../phase/phase.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string][]string{}
	ast.Inspect(file, func(n ast.Node) bool {
		spec, ok := n.(*ast.ValueSpec)
		if !ok || spec.Type == nil || len(spec.Values) != 1 {
			return true
		}
		if value, ok := spec.Values[0].(*ast.BasicLit); ok && value.Kind == token.STRING {
			text, err := strconv.Unquote(value.Value)
			if err != nil {
				t.Fatal(err)
			}
			name := fmt.Sprint(spec.Type)
			out[name] = append(out[name], text)
		}
		return true
	})
	return out
}
