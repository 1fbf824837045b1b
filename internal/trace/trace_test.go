// SPDX-License-Identifier: Apache-2.0

package trace

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/syslatch/syslatch/profiles"
)

func TestParse(t *testing.T) {
	for in, want := range map[string]Request{
		"of:/a/b.json":          {Output: "/a/b.json"},
		"if:/a;of:/b":           {Output: "/b", Input: "/a"},
		"of:/b;if:/a":           {Output: "/b", Input: "/a"},
		"of: /b ;if: /a":        {Output: "/b", Input: "/a"}, // as oci-seccomp-bpf-hook
		"of:/with space/ü.json": {Output: "/with space/ü.json"},
	} {
		got, err := Parse(in)
		if diff := cmp.Diff(want, got); err != nil || diff != "" {
			t.Errorf("%q: %v\n%s", in, err, diff)
		}
	}
	for _, in := range []string{
		"", ";", "of:", "of:;if:", "if:/a", "/a", "of:a", "of:/a;", ";of:/a", "of:/a;of:/b", "if:/a;if:/b", "of:/a;if:/b;of:/c",
		"OF:/a", " of:/a", "of:/a/../b", "of:/a//b", "of:/a/", "of:/a/.", "of:/a\x00b", "of:/a\nb", "of:/a\x1bb", "of:/a\xff",
		"of:/" + strings.Repeat("x", 1<<20), "of:/a;IF:/b",
	} {
		if got, err := Parse(in); !errors.Is(err, ErrAnnotation) || got != (Request{}) || len(err.Error()) > 700 {
			t.Errorf("%.40q: got %+v, %.900v, want ErrAnnotation", in, got, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add("if:/a;of:/b")
	f.Add("of: /a/../b\x00")
	f.Fuzz(func(t *testing.T, in string) {
		r, err := Parse(in)
		if err != nil {
			if strings.ContainsFunc(err.Error(), unicode.IsControl) {
				t.Errorf("message %q", err)
			}
			return
		}
		for _, p := range []string{r.Output, r.Input} {
			if p != "" && (!filepath.IsAbs(p) || filepath.Clean(p) != p || strings.ContainsFunc(p, unicode.IsControl)) {
				t.Errorf("path %q", p)
			}
		}
		if r.Output == "" {
			t.Error("no output")
		}
	})
}

func recording(calls profiles.Calls) *profiles.Recording {
	return &profiles.Recording{SchemaVersion: 1, ID: "x", Gate: profiles.GateFilter, Phases: map[string]profiles.Calls{profiles.DefaultPhase: calls}, Ended: time.Unix(1, 0)}
}

func TestMerge(t *testing.T) {
	errno := uint(38)
	input := &specs.LinuxSeccomp{
		DefaultAction: specs.ActAllow,
		Syscalls: []specs.LinuxSyscall{
			{Names: []string{"mkdir", "chmod"}, Action: specs.ActErrno, ErrnoRet: &errno},
			{Names: []string{"personality"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{{Index: 0, Op: specs.OpEqualTo}}},
		},
	}
	before := *input
	got, err := Merge(input, recording(profiles.Calls{"SCMP_ARCH_X86_64": {"mkdir", "personality", "read", "write"}, "SCMP_ARCH_X86": {"read"}}))
	if err != nil {
		t.Fatal(err)
	}
	if got.DefaultAction != specs.ActErrno {
		t.Errorf("default action %s", got.DefaultAction)
	}
	if diff := cmp.Diff(before.Syscalls, got.Syscalls[:2]); diff != "" {
		t.Errorf("the input's rules:\n%s", diff)
	}
	added := got.Syscalls[2]
	if added.Action != specs.ActAllow || !slices.Contains(added.Names, "read") || slices.Contains(added.Names, "mkdir") || slices.Contains(added.Names, "personality") {
		t.Errorf("added %+v", added)
	}
	if !slices.Contains(got.Architectures, "SCMP_ARCH_X86") || !slices.Contains(got.Architectures, "SCMP_ARCH_X86_64") {
		t.Errorf("architectures %v", got.Architectures)
	}
	if diff := cmp.Diff(&before, input); diff != "" {
		t.Errorf("the input was changed:\n%s", diff)
	}
	if got, err := Merge(&specs.LinuxSeccomp{DefaultAction: specs.ActKillProcess}, recording(profiles.Calls{"SCMP_ARCH_X86_64": {"read"}})); err != nil || got.DefaultAction != specs.ActKillProcess {
		t.Errorf("%+v, %v: a denying default stays", got, err)
	}
	if _, err := Merge(nil, recording(nil)); err == nil {
		t.Error("a profile of nothing")
	}
}

// A link that takes the place of a directory between look and use is not
// followed, and a reader never sees half a file.
func TestWrite(t *testing.T) {
	dir, outside := t.TempDir(), t.TempDir()
	if err := os.Mkdir(dir+"/sub", 0o755); err != nil {
		t.Fatal(err)
	}
	r := Request{Output: dir + "/sub/p.json"}
	if err := r.Prepare([]string{dir}); err != nil {
		t.Fatal(err)
	}
	rec := recording(profiles.Calls{"SCMP_ARCH_X86_64": {"read"}})
	if err := r.Write([]string{dir}, rec); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(r.Output)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := profiles.DecodeProfile(data); err != nil {
		t.Error(err)
	}
	if err := errors.Join(os.Rename(dir+"/sub", dir+"/was"), os.Symlink(outside, dir+"/sub")); err != nil {
		t.Fatal(err)
	}
	if err := r.Write([]string{dir}, rec); !errors.Is(err, ErrAnnotation) {
		t.Errorf("got %v", err)
	}
	if entries, _ := os.ReadDir(outside); len(entries) > 0 {
		t.Errorf("written: %v", entries)
	}
	// The administrator's own directory is a link: told, not followed.
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(outside, link); err != nil {
		t.Fatal(err)
	}
	r = Request{Output: link + "/p.json"}
	if err := r.Prepare([]string{link}); err == nil || !strings.Contains(err.Error(), "symbolic links are not followed") {
		t.Errorf("got %v", err)
	}
	// The narrowest of nested directories counts, and files above it don't.
	r = Request{Output: outside + "/p.json"}
	if err := r.Prepare([]string{outside + "/deeper"}); err == nil {
		t.Error("written above")
	}
}
