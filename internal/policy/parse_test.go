// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func ptr[T any](v T) *T { return &v }

func knownCall(name string) bool { return name != "opanat" }

func TestParseExample(t *testing.T) {
	got, err := Load("testdata/example.yaml", Options{KnownCall: knownCall})
	if err != nil {
		t.Fatal(err)
	}
	want := &File{
		APIVersion: APIVersion,
		Store:      DefaultStore, StateDir: DefaultStateDir, BPFFS: DefaultBPFFS,
		NRI: NRI{Socket: "/var/run/nri/nri.sock", PluginName: "syslatch", PluginIndex: "10", RequestTimeout: 1500 * time.Millisecond},
		Hook: Hook{
			TraceSyscall: TraceServe, TraceDirectories: []string{"/var/lib/syslatch/traces"},
			Rootless: Rootless{Users: []string{"alice", "1001"}, Socket: DefaultRootlessSocket},
		},
		Policies: []Policy{
			{
				Name: "system", Line: 43, Match: Match{Namespaces: []string{"kube-system", "syslatch-*"}}, Mode: ModeOff,
				Workload: DefaultWorkload, ExistingProfile: ExistingKeep, Activate: ActivatePublish,
			},
			{
				Name: "payments", Line: 55, Mode: ModeEnforce,
				Match: Match{
					Namespaces: []string{"payments"}, PodLabels: map[string]string{"app": "api", "tier": "back*"},
					Containers: []string{"*"}, Images: []string{"registry.example.com/payments/*", "nginx", "postgres:16.*"},
				},
				Workload:     "{namespace}/{label:app}/{container}",
				Annotations:  []AnnotationField{FieldMode, FieldWorkload},
				AllowedModes: []Mode{ModeEnforce, ModeAudit},
				Failure:      FailureDeny,
				MustAllow:    []string{"exit_group", "rt_sigreturn"},
				MustDeny:     []string{"bpf", "io_uring_setup", "userfaultfd"},
				Architectures: []specs.Arch{
					specs.ArchX86_64,
				},
				ExistingProfile: ExistingKeep, Activate: ActivateManual,
				Limits: Limits{
					Memory: Memory{Max: ptr[int64](256 << 20), High: ptr[int64](224 << 20), SwapMax: ptr[int64](64 << 20), Low: ptr[int64](32 << 20), Min: ptr[int64](16 << 20)},
					CPU:    CPU{Quota: 50000, Period: 100000, Weight: 100},
					Pids:   ptr[int64](128),
					IO:     IO{Weight: 100, Max: []IOMax{{Device: "8:0", RBPS: 50 << 20, WBPS: 20 << 20, RIOPS: 1000, WIOPS: Unlimited}}},
					Unified: map[string]string{
						"memory.oom.group": "1",
					},
					OOMScoreAdj: ptr(500),
					Rlimits:     []Rlimit{{"RLIMIT_NOFILE", 1024, 4096}, {"RLIMIT_CORE", 0, ^uint64(0)}},
				},
			},
			{
				Name: "rootless", Line: 156, Match: Match{Users: []string{"*"}}, Mode: ModeRecord,
				Workload: DefaultWorkload, ExistingProfile: ExistingKeep, Activate: ActivatePublish,
			},
			{
				Name: "everything-else", Line: 161, Mode: ModeRecord,
				Workload: DefaultWorkload, ExistingProfile: ExistingKeep, Activate: ActivatePublish,
			},
		},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("example.yaml (-want +got):\n%s", diff)
	}
}

// TestParseErrors compares every error of every file below testdata/invalid
// with a golden file: the messages are an interface to people.
func TestParseErrors(t *testing.T) {
	inputs, err := filepath.Glob("testdata/invalid/*.yaml")
	if err != nil || len(inputs) == 0 {
		t.Fatal("no inputs", err)
	}
	for _, input := range inputs {
		name := strings.TrimSuffix(filepath.Base(input), ".yaml")
		t.Run(name, func(t *testing.T) {
			data, err := os.ReadFile(input)
			if err != nil {
				t.Fatal(err)
			}
			file, err := Parse("policy.yaml", data, Options{KnownCall: knownCall, Phases: name != "phases-unenforced"})
			var errs Errors
			if file != nil || !errors.As(err, &errs) || len(errs) == 0 {
				t.Fatalf("got file %v and error %v, want no file and Errors", file, err)
			}
			golden := strings.TrimSuffix(input, ".yaml") + ".golden"
			got := err.Error() + "\n"
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got); diff != "" {
				t.Errorf("errors (-want +got):\n%s", diff)
			}
		})
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	if _, err := Load(dir+"/none.yaml", Options{}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing file: got %v, want fs.ErrNotExist", err)
	}
	big := dir + "/big.yaml"
	if err := os.WriteFile(big, []byte("apiVersion: syslatch.dev/v1\npolicies: []\n#"+strings.Repeat("x", MaxFileSize)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(big, Options{}); err == nil || !strings.Contains(err.Error(), "larger than") {
		t.Errorf("big file: got %v, want an error about its size", err)
	}
}

func TestParseMinimal(t *testing.T) {
	f, err := Parse("x", []byte("apiVersion: syslatch.dev/v1\npolicies: []\n"), Options{})
	if err != nil {
		t.Fatal(err)
	}
	if f.Store != DefaultStore || f.StateDir != DefaultStateDir || f.BPFFS != DefaultBPFFS || f.NRI != (NRI{}) {
		t.Errorf("defaults: got %+v", f)
	}
}

func TestParseBytes(t *testing.T) {
	for in, want := range map[string]int64{
		"0": 0, "67108864": 64 << 20, "64Mi": 64 << 20, "1.5Gi": 3 << 29, "500M": 500e6, "0.5Ki": 512,
		"10k": 10000, "7Ei": 7 << 60, "9223372036854775807": 1<<63 - 1, "007": 7,
	} {
		if got, err := parseBytes(in); err != nil || got != want {
			t.Errorf("parseBytes(%q) = %d, %v, want %d", in, got, err, want)
		}
	}
	for _, in := range []string{"", "Mi", "64m", "64MB", "64K", "64KiB", "64mi", "8Ei", "9223372036854775808", "1.5", "-1", "+1", "1e3", "0x10", "1_000", " 1", "1 ", ".5Gi", "5.Gi", "1.2.3", "1Mi1", "∞", strings.Repeat("1", 100)} {
		if got, err := parseBytes(in); err == nil {
			t.Errorf("parseBytes(%q) = %d, want an error", in, got)
		}
	}
}

func TestParseCPU(t *testing.T) {
	type limit struct {
		quota  int64
		period uint64
	}
	for in, want := range map[string]limit{
		"50%": {50000, 100000}, "1%": {1000, 100000}, "12.5%": {12500, 100000}, "2": {200000, 100000}, "1.5": {150000, 100000},
		"250m": {25000, 100000}, "max": {Unlimited, 100000}, "20000 50000": {20000, 50000}, "max 50000": {Unlimited, 50000},
	} {
		q, p, err := parseCPU(in)
		if err != nil || (limit{q, p}) != want {
			t.Errorf("parseCPU(%q) = %d, %d, %v, want %v", in, q, p, err, want)
		}
	}
	for _, in := range []string{"", "0", "0%", "0.5%", "-1", "half", "50 %", "50000", "1 2 3", "999 100000", "5000 999", "5000 1000001", "0.000001", "max max", "%", "m"} {
		if q, p, err := parseCPU(in); err == nil {
			t.Errorf("parseCPU(%q) = %d, %d, want an error", in, q, p)
		}
	}
}

func FuzzParse(f *testing.F) {
	seeds, _ := filepath.Glob("testdata/invalid/*.yaml")
	for _, path := range append(seeds, "testdata/example.yaml") {
		data, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		file, err := Parse("f.yaml", data, Options{KnownCall: knownCall})
		if err != nil {
			var errs Errors
			if file != nil || !errors.As(err, &errs) {
				t.Fatalf("got %v, %v, want no file and Errors", file, err)
			}
			for _, e := range errs {
				if strings.ContainsAny(e.Error(), "\x00\x1b") || e.Message == "" || e.Line < 0 {
					t.Fatalf("bad error %q", e.Error())
				}
			}
			return
		}
		// What parses must decide, and never beyond what the file says.
		for i := range file.Policies {
			p := &file.Policies[i]
			d, err := p.decide(Container{Name: "c", Namespace: "n", Pod: "p", Image: "nginx", Annotations: map[string]string{AnnotationMode: "off"}}, parseImage("nginx"))
			if d.Failure != FailureDeny && d.Failure != FailureRuntimeDefault {
				t.Fatalf("decision %+v, %v: no failure policy", d, err)
			}
			if err == nil && d.Mode == ModeOff && p.Mode != ModeOff && !strings.Contains(string(data), "allowedModes") {
				t.Fatalf("annotation turned policy %+v off", p)
			}
		}
	})
}

func TestParseManyPolicies(t *testing.T) {
	file := func(n int) []byte {
		var b strings.Builder
		b.WriteString("apiVersion: syslatch.dev/v1\npolicies:\n")
		for i := range n {
			fmt.Fprintf(&b, "- {name: p%d, match: {namespaces: [n%d]}, mode: record}\n", i, i)
		}
		return []byte(b.String())
	}
	if _, err := Parse("x", file(maxPolicies), Options{}); err != nil {
		t.Errorf("%d policies: %v", maxPolicies, err)
	}
	if _, err := Parse("x", file(maxPolicies+1), Options{}); err == nil {
		t.Errorf("%d policies: no error", maxPolicies+1)
	}
}
