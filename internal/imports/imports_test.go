// SPDX-License-Identifier: Apache-2.0

// Package imports holds only a test: which of our packages may import what.
package imports

import (
	"fmt"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/syslatch/syslatch"

// A rule speaks of the direct imports of one package's files. Imports of our own
// packages are written relative to the module ("./profiles"), and a trailing
// "/..." takes everything beneath. Tests may import what they like, but for the
// cgo rule below.
type rule struct {
	only []string // if not nil, nothing else is allowed, but pure parts of the standard library
	not  []string
	why  string
}

// effects are standard packages through which a package would learn of the
// world outside, or tell it something. A package with an `only` list may use the
// rest of the standard library.
var effects = []string{
	"C", "debug/...", "io/ioutil", "log/...", "net/...", "os/...", "plugin", "runtime/...", "syscall", "testing/...", "unsafe",
	"crypto/rand", "math/rand/...",
}

var rules = map[string]rule{
	"./profiles": {
		only: []string{"github.com/opencontainers/runtime-spec/specs-go"},
		why:  "the domain knows neither kernel, runtime nor log",
	},
	"./internal/adjust": {
		only: []string{"github.com/opencontainers/runtime-spec/specs-go", "./profiles", "./internal/policy"},
		why:  "the same facts must always give the same plan",
	},
	"./internal/policy": {
		not: []string{"./bpf", "./plugin", "./hook", "./internal/agent", "./internal/seccomp", "./internal/store"},
		why: "policy says what applies, not how",
	},
	"./internal/audit": {
		not: []string{"./profiles", "./bpf", "./plugin", "./hook", "./internal/adjust", "./internal/policy", "./internal/agent"},
		why: "the log sees opaque bytes",
	},
	"./internal/store": {
		not: []string{"./bpf", "./plugin", "./hook", "./internal/agent", "./internal/adjust", "./internal/policy"},
		why: "the store keeps what it is given",
	},
	"./internal/api": {
		not: []string{"./profiles", "./bpf", "./plugin", "./hook", "./internal/adjust", "./internal/agent", "./internal/cgroup", "./internal/policy", "./internal/seccomp", "./internal/store"},
		why: "the API knows phases by their names; who supervises them is handed to it",
	},
	"./internal/seccomp": {
		not: []string{"./bpf", "./plugin", "./hook", "./internal/agent", "./internal/adjust", "./internal/policy", "./internal/store"},
		why: "filters are compiled from profiles, whoever asks",
	},
	"./internal/phase": {
		not: []string{"./bpf", "./plugin", "./hook", "./internal/adjust", "./internal/agent", "./internal/api", "./internal/cgroup", "./internal/policy", "./internal/store"},
		why: "the supervisor switches; what enforces a phase is handed to it",
	},
	"./internal/monitor": {
		not: []string{"./plugin", "./hook", "./internal/agent", "./internal/adjust", "./internal/phase", "./internal/policy", "./internal/store"},
		why: "what is seen is told by cgroup, whoever is in it",
	},
	"./internal/osthread": {
		not: []string{"./..."},
		why: "a thread is no domain of ours",
	},
	"./internal/holder": {
		not: []string{"./..."},
		why: "a descriptor with a name is no domain of ours",
	},
	"./internal/inject": {
		not: []string{"./bpf", "./plugin", "./hook", "./internal/agent", "./internal/adjust", "./internal/policy", "./internal/store", "./profiles"},
		why: "a filter is put on processes, whatever it is made of",
	},
	"./internal/cgroup": {
		not: []string{"./..."},
		why: "a path, an id and a process are no domain of ours",
	},
	"./bpf": {
		not: []string{"./profiles", "./plugin", "./hook", "./internal/...", "github.com/opencontainers/...", "github.com/containerd/...", "k8s.io/..."},
		why: "BPF knows cgroup ids and numbers, not containers or names",
	},
	"./plugin": {
		not: []string{"./bpf", "./hook", "./internal/agent", "./internal/store", "./internal/seccomp"},
		why: "an adapter turns events into plans; what keeps and enforces them is handed to it",
	},
	"./hook": {
		not: []string{"./bpf", "./plugin", "./internal/agent", "./internal/store", "./internal/seccomp"},
		why: "an adapter turns specs into specs; what keeps and enforces them is handed to it",
	},
}

// cmdMayNot holds for all commands: they parse flags and wire. What would be a
// rule of the domain needs one of these.
var cmdMayNot = rule{
	not: []string{"./internal/adjust", "./bpf/internal/...", "C", "unsafe"},
	why: "commands hold no rules",
}

// cgo may stand only in ./internal/seccomp, tests included. ./test/bench compares that
// with libseccomp-golang, so it may import it.
var cgo = []string{"C", libseccomp}

const libseccomp = "github.com/seccomp/libseccomp-golang"

func TestImports(t *testing.T) {
	root := filepath.Join("..", "..")
	if _, err := os.Stat(filepath.Join(root, "go.mod")); err != nil {
		t.Fatal(err)
	}
	violations, packages, err := check(os.DirFS(root))
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range violations {
		t.Error(v)
	}
	for _, want := range []string{"./profiles", "./internal/seccomp", "./bpf"} {
		if !slices.Contains(packages, want) {
			t.Errorf("no Go files of %s were looked at", want)
		}
	}
}

// TestImportsFindsViolations proves that each kind of rule can fail.
func TestImportsFindsViolations(t *testing.T) {
	violations, _, err := check(os.DirFS(filepath.Join("testdata", "bad")))
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"bpf/bad.go: imports ./profiles",
		"cmd/syslatch/bad.go: imports ./internal/adjust",
		"hook/bad.go: imports ./plugin",
		"internal/adjust/bad.go: imports os/exec",
		"internal/api/bad.go: imports ./internal/policy",
		"internal/audit/bad.go: imports ./profiles",
		"internal/cgroup/bad.go: imports ./profiles",
		"internal/other/bad.go: imports C",
		"internal/other/bad_test.go: imports github.com/seccomp/libseccomp-golang",
		"plugin/bad.go: imports ./bpf",
		"profiles/bad.go: imports github.com/sirupsen/logrus",
		"profiles/bad.go: imports log/slog",
		"profiles/bad.go: imports os",
		"test/bench/bad.go: imports C",
	}
	var got []string
	for _, v := range violations {
		v, _, _ = strings.Cut(v, " (")
		got = append(got, v)
	}
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// check reads the imports of every Go file of a module, build constraints or
// not, and returns what breaks a rule and the packages it saw.
func check(root fs.FS) (violations, packages []string, err error) {
	err = fs.WalkDir(root, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if base := d.Name(); name != "." && (base == "testdata" || base == "vendor" || base[0] == '.' || base[0] == '_') {
				return fs.SkipDir
			}
			return nil
		}
		if path.Ext(name) != ".go" {
			return nil
		}
		data, err := fs.ReadFile(root, name)
		if err != nil {
			return err
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, data, parser.ImportsOnly)
		if err != nil {
			return err
		}
		pkg := relative(module + "/" + path.Dir(name))
		packages = append(packages, pkg)
		for _, spec := range file.Imports {
			imported, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			imported = relative(imported)
			if why := forbidden(pkg, imported, strings.HasSuffix(name, "_test.go")); why != "" {
				violations = append(violations, fmt.Sprintf("%s: imports %s (%s)", name, imported, why))
			}
		}
		return nil
	})
	slices.Sort(packages)
	return violations, slices.Compact(packages), err
}

// forbidden says why an import breaks a rule, or nothing.
func forbidden(pkg, imported string, test bool) string {
	if pkg != "./internal/seccomp" && in(cgo, imported) && (pkg != "./test/bench" || imported != libseccomp) {
		return "only internal/seccomp uses cgo"
	}
	if test {
		return ""
	}
	if strings.HasPrefix(pkg, "./cmd/") && in(cmdMayNot.not, imported) {
		return cmdMayNot.why
	}
	r, ok := rules[pkg]
	if !ok {
		return ""
	}
	if in(r.not, imported) {
		return r.why
	}
	if r.only != nil && !in(r.only, imported) && (!standard(imported) || in(effects, imported)) {
		return r.why
	}
	return ""
}

func in(patterns []string, imported string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool {
		prefix, tree := strings.CutSuffix(p, "/...")
		return imported == prefix || tree && strings.HasPrefix(imported, prefix+"/")
	})
}

// standard holds for the standard library: no dot in the first element.
func standard(imported string) bool {
	first, _, _ := strings.Cut(imported, "/")
	return !strings.Contains(first, ".")
}

func relative(imported string) string {
	if rest, ok := strings.CutPrefix(imported, module+"/"); ok {
		return "./" + rest
	}
	return imported
}
