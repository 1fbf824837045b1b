// SPDX-License-Identifier: Apache-2.0

package profiles

import (
	"bytes"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

var update = flag.Bool("update", false, "write the golden files")

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatalf("%v (go test -update writes it)", err)
	}
	if d := cmp.Diff(string(want), string(got)); d != "" {
		t.Errorf("%s (-want +got):\n%s", file, d)
	}
}

func exampleRecording() *Recording {
	started := time.Date(2026, 11, 24, 15, 0, 0, 250, time.UTC)
	return &Recording{
		SchemaVersion: 1,
		ID:            "20261124T150000Z-web-1",
		Workload:      "registry.example/shop/web",
		Subject:       Subject{ID: "f00d", Name: "web", Namespace: "shop", Pod: "web-7c", Image: "registry.example/shop/web:2"},
		Started:       started,
		Ended:         started.Add(3 * time.Second),
		Kernel:        "6.12.43+deb13-amd64",
		Runtime:       "containerd 2.4.2",
		Gate:          GateFilter,
		Phases: map[string]Calls{
			"serve": {specs.ArchX86_64: {"accept4", "read", "write"}},
			"start": {specs.ArchX86_64: {"execve", "openat", "read"}, specs.ArchX86: {"mmap2"}},
		},
		Unresolved: []Call{{ABI: specs.ArchX86_64, Number: 470}},
		FirstSeen: []FirstSeen{
			{Call: Call{specs.ArchX86_64, 59, "execve"}, Phase: "start", After: 1500, Comm: "runc:[2:INIT]", PID: 4711},
		},
		Arguments: []Argument{
			{Call: Call{specs.ArchX86_64, 257, "openat"}, Phase: "start", Index: 2, Mask: 3, Values: []uint64{0, 1}},
			{Call: Call{specs.ArchX86_64, 16, "ioctl"}, Phase: "serve", Index: 1, Mask: 1<<64 - 1, Values: []uint64{0x5401}, AnyValue: true},
		},
		Losses: []Loss{{Kind: LossUnresolved, Count: 1, Detail: "x86_64 470 <&>"}},
	}
}

func exampleVersion(t *testing.T) *Version {
	t.Helper()
	v, _, err := Merge(nil, exampleRecording(), MergeOptions{
		MustAllow: []string{"exit_group", "close"}, MustDeny: []string{"ptrace", "openat"},
		Architectures:   []ABI{specs.ArchX32},
		NewerThanKernel: []string{"open_tree_attr", "file_getattr", "ptrace"},
		AllowLosses:     true,
		Created:         time.Date(2026, 11, 24, 16, 0, 3, 0, time.FixedZone("", 3600)),
	})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestGolden(t *testing.T) {
	rec, v := exampleRecording(), exampleVersion(t)
	for name, f := range map[string]func() ([]byte, error){
		"recording.golden.json": func() ([]byte, error) { return EncodeRecording(rec) },
		"manifest.golden.json":  func() ([]byte, error) { return EncodeManifest(&v.Manifest) },
		"profile.golden.json":   func() ([]byte, error) { return EncodeProfile(v.Profile) },
		"audit.golden.json":     func() ([]byte, error) { return EncodeProfile(AuditOf(v.Profile)) },
		"allow-all.golden.json": func() ([]byte, error) { return EncodeProfile(AllowAll()) },
	} {
		data, err := f()
		if err != nil {
			t.Fatal(err)
		}
		golden(t, name, data)
	}
}

// roundTrip holds decode(encode(x)) = x.
func roundTrip[T any](t *testing.T, x *T, encode func(*T) ([]byte, error), decode func([]byte) (*T, error)) {
	t.Helper()
	data, err := encode(x)
	if err != nil {
		t.Fatalf("encode: %v", err)
	}
	back, err := decode(data)
	if err != nil {
		t.Fatalf("decode what was encoded: %v\n%s", err, data)
	}
	if d := cmp.Diff(x, back); d != "" {
		t.Errorf("decode(encode(x)) (-x +got):\n%s", d)
	}
	again, err := encode(back)
	if err != nil || !bytes.Equal(again, data) {
		t.Errorf("encoding again: %v\n%s\n%s", err, data, again)
	}
	if !bytes.HasSuffix(data, []byte("\n")) || bytes.HasSuffix(data, []byte("\n\n")) {
		t.Error("doesn't end in one newline")
	}
}

func TestRoundTrip(t *testing.T) {
	v := exampleVersion(t)
	roundTrip(t, exampleRecording(), EncodeRecording, DecodeRecording)
	roundTrip(t, &v.Manifest, EncodeManifest, DecodeManifest)
	roundTrip(t, v.Profile, EncodeProfile, DecodeProfile)
}

// TestOneLinePerCall is what makes a diff of two versions readable.
func TestOneLinePerCall(t *testing.T) {
	lines := func(names ...string) []string {
		data, err := EncodeProfile(Render(Calls{specs.ArchX86_64: names}, RenderOptions{}))
		if err != nil {
			t.Fatal(err)
		}
		return strings.Split(string(data), "\n")
	}
	before, after := lines("close", "read", "write"), lines("close", "mkdir", "read", "write")
	count := map[string]int{}
	for _, l := range after {
		count[l]++
	}
	for _, l := range before {
		count[l]--
	}
	var differ []string
	for l, n := range count {
		if n != 0 {
			differ = append(differ, l)
		}
	}
	if len(differ) != 1 || strings.TrimSpace(differ[0]) != `"mkdir",` {
		t.Errorf("one call more changes %q", differ)
	}
}

func TestEncodeSorts(t *testing.T) {
	errno := uint(38)
	p := &specs.LinuxSeccomp{
		DefaultAction: specs.ActErrno,
		Architectures: []specs.Arch{specs.ArchX86_64, specs.ArchX86, specs.ArchX86_64},
		Syscalls:      []specs.LinuxSyscall{{Names: []string{"write", "read", "write"}, Action: specs.ActErrno, ErrnoRet: &errno}},
	}
	data, err := EncodeProfile(p)
	if err != nil {
		t.Fatal(err)
	}
	back, err := DecodeProfile(data)
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(back.Syscalls[0].Names, " "); got != "read write" || len(back.Architectures) != 2 {
		t.Errorf("got %s", data)
	}
	if p.Syscalls[0].Names[0] != "write" || p.Architectures[0] != specs.ArchX86_64 {
		t.Error("encoding changed its argument")
	}
	if _, err := EncodeProfile(nil); err == nil {
		t.Error("encoded nothing")
	}
}

func TestDecodeRefuses(t *testing.T) {
	tests := []struct {
		name, data, want string
		line             int // 0: not a SyntaxError
	}{
		{"empty", "", "unexpected end", 1},
		{"truncated", "{\n\"defaultAction\": \"SCMP_ACT_ERRNO\",\n", "unexpected end", 3},
		{"unknown field", "{\n\"defaultAction\": \"SCMP_ACT_ERRNO\",\n\"sycalls\": []\n}", `unknown field "sycalls"`, 3},
		{"unknown field, deep", "{\"defaultAction\": \"SCMP_ACT_ERRNO\",\n\"syscalls\": [\n{\"names\": [],\n\"includes\": {}}]}", `unknown field "includes"`, 4},
		{"another case", "{\"defaultAction\": \"SCMP_ACT_ERRNO\",\n\"DefaultAction\": \"SCMP_ACT_ALLOW\"}", `unknown field "DefaultAction"`, 2},
		{"twice", "{\"defaultAction\": \"SCMP_ACT_ERRNO\",\n\n\"defaultAction\": \"SCMP_ACT_ALLOW\"}", `key "defaultAction" stands twice`, 3},
		{"twice, by escape", "{\"defaultAction\": \"SCMP_ACT_ERRNO\",\n\"default\\u0041ction\": \"SCMP_ACT_ALLOW\"}", "stands twice", 2},
		{"garbage behind", "{\"defaultAction\": \"SCMP_ACT_ERRNO\"}\n\n;", "invalid character", 3},
		{"value behind", "{\"defaultAction\": \"SCMP_ACT_ERRNO\"}\n{}", "after top-level value", 2},
		{"no defaultAction", "{}", "defaultAction is missing", 0},
		{"null", "null", "null", 1},
		{"an array", "[\n]", "cannot unmarshal array", 1},
		{"a wrong type", "{\"defaultAction\": \"SCMP_ACT_ERRNO\",\n\"syscalls\":\n\"all\"}", "cannot unmarshal string", 3},
		{"a negative errno", "{\"defaultAction\": \"SCMP_ACT_ERRNO\",\n\"defaultErrnoRet\": -1}", "cannot unmarshal number", 2},
		{"not UTF-8", "{\"defaultAction\":\n\"\xff\"}", "not UTF-8", 2},
		{"a control character", "{\"defaultAction\":\n\"\x00\"}", "invalid character", 2},
		{"deep", strings.Repeat("[", 100) + strings.Repeat("]", 100), "nested deeper than", 1},
		{"deeper", strings.Repeat("[", 100000), "max depth", 1},
		{"huge", strings.Repeat(" ", MaxFileSize+1), "more than", 0},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			p, err := DecodeProfile([]byte(tc.data))
			if err == nil || p != nil {
				t.Fatalf("got %+v, %v", p, err)
			}
			if !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %q, want %q", err, tc.want)
			}
			var syntax *SyntaxError
			if errors.As(err, &syntax) != (tc.line > 0) || tc.line > 0 && syntax.Line != tc.line {
				t.Errorf("got %v, want line %d", err, tc.line)
			}
		})
	}
}

func TestDecodeSchemaVersion(t *testing.T) {
	for _, data := range []string{"{}", `{"schemaVersion": 2}`} {
		if r, err := DecodeRecording([]byte(data)); err == nil || r != nil || !strings.Contains(err.Error(), "schemaVersion") {
			t.Errorf("recording %s: %v, %v", data, r, err)
		}
		if m, err := DecodeManifest([]byte(data)); err == nil || m != nil || !strings.Contains(err.Error(), "schemaVersion") {
			t.Errorf("manifest %s: %v, %v", data, m, err)
		}
	}
}

// TestDecodeKeepsNamesApart: phases are named by policy, in any case.
func TestDecodeKeepsNamesApart(t *testing.T) {
	r, err := DecodeRecording([]byte(`{"schemaVersion": 1, "phases": {"Build": {}, "build": {}, "schemaversion": {}}}`))
	if err != nil || len(r.Phases) != 3 {
		t.Errorf("got %+v, %v", r, err)
	}
}

// fuzzDecode: what decodes at all encodes, and to something stable.
func fuzzDecode[T any](f *testing.F, file string, encode func(*T) ([]byte, error), decode func([]byte) (*T, error)) {
	data, err := os.ReadFile(filepath.Join("testdata", file))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add(data[:len(data)/2])
	f.Add([]byte(`{"syscalls":[{"names":["read","read"],"args":[{"valueTwo":18446744073709551615}]}],"defaultAction":""}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		x, err := decode(data)
		if err != nil {
			var syntax *SyntaxError
			if errors.As(err, &syntax) && (syntax.Line < 1 || syntax.Line > 1+bytes.Count(data, []byte("\n"))) {
				t.Errorf("line %d of %d", syntax.Line, bytes.Count(data, []byte("\n")))
			}
			return
		}
		first, err := encode(x)
		if err != nil {
			t.Fatalf("encode what was decoded: %v", err)
		}
		y, err := decode(first)
		if err != nil {
			t.Fatalf("decode what was encoded: %v\n%s", err, first)
		}
		second, err := encode(y)
		if err != nil || !bytes.Equal(first, second) {
			t.Errorf("%v\n%s\n%s", err, first, second)
		}
	})
}

func FuzzDecodeProfile(f *testing.F) {
	fuzzDecode(f, "profile.golden.json", EncodeProfile, DecodeProfile)
}

func FuzzDecodeRecording(f *testing.F) {
	fuzzDecode(f, "recording.golden.json", EncodeRecording, DecodeRecording)
}

func FuzzDecodeManifest(f *testing.F) {
	fuzzDecode(f, "manifest.golden.json", EncodeManifest, DecodeManifest)
}
