// SPDX-License-Identifier: Apache-2.0

package podman

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/profiles"
)

// traces allows the annotation in one directory, whatever policies say.
func traces(t *testing.T) (dir, more string) {
	dir = t.TempDir()
	return dir, fmt.Sprintf("hook: {traceSyscall: serve, traceDirectories: [%s]}\n", dir)
}

func trace(value string) []string {
	return []string{"--annotation", "io.containers.trace-syscall=" + value}
}

func security(profile string) []string { return []string{"--security-opt", "seccomp=" + profile} }

// The use of oci-seccomp-bpf-hook's own tests.
func TestTrace(t *testing.T) {
	each(t, func(t *testing.T, runtime string) {
		dir, more := traces(t)
		e := newEnv(t, runtime, more, byAnnotation)
		first := filepath.Join(dir, "ls.json")
		if r := e.run("a", trace("of:"+first), "ls", "/"); r.code != 0 || !strings.Contains(r.stdout, "bin\n") {
			t.Fatalf("trace: %+v", r)
		}
		st, err := os.Stat(first)
		if err != nil || st.Mode() != 0o644 {
			t.Fatalf("%v, %v", st, err)
		}
		if r := e.run("a", security(first), "ls", "/"); r.code != 0 {
			t.Errorf("what was traced: %+v", r)
		}
		if r := e.run("a", security(first), "mkdir", "/x"); r.code == 0 {
			t.Errorf("what wasn't: %+v", r)
		}
		if all, err := e.store().Workloads(); err != nil || len(all) != 0 {
			t.Errorf("a trace went to the store: %v, %v", all, err)
		}

		// Extended, in both orders, over a file that is there.
		for i, form := range []string{"if:%s;of:%s", "of:%[2]s;if:%[1]s"} {
			both := filepath.Join(dir, fmt.Sprintf("both%d.json", i))
			if err := os.WriteFile(both, []byte("old"), 0o600); err != nil {
				t.Fatal(err)
			}
			if r := e.run("a", trace(fmt.Sprintf(form, first, both)), "mkdir", "/x"); r.code != 0 {
				t.Fatalf("%s: %+v", form, r)
			}
			for _, argv := range [][]string{{"ls", "/"}, {"mkdir", "/x"}} {
				if r := e.run("a", security(both), argv...); r.code != 0 {
					t.Errorf("%s: %v: %+v", form, argv, r)
				}
			}
			if r := e.run("a", security(both), "ln", "-s", "a", "/x"); r.code == 0 {
				t.Errorf("%s: symlink: %+v", form, r)
			}
		}

		// What the input denies stays denied.
		block := filepath.Join(dir, "block-mkdir.json")
		if err := os.WriteFile(block, []byte(`{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir"],"action":"SCMP_ACT_ERRNO"}]}`), 0o644); err != nil {
			t.Fatal(err)
		}
		out := filepath.Join(dir, "blocked.json")
		if r := e.run("a", trace("if:"+block+";of:"+out), "mkdir", "/x"); r.code != 0 {
			t.Fatalf("trace: %+v", r)
		}
		if r := e.run("a", security(out), "mkdir", "/x"); r.code == 0 || !strings.Contains(r.stderr, "Operation not permitted") {
			t.Errorf("denied by the input: %+v", r)
		}
		if r := e.run("a", security(out), "true"); r.code != 0 {
			t.Errorf("the rest: %+v", r)
		}

		// Beside a recording, and under enforcement, which it doesn't widen.
		e.run("web", append(trace("of:"+out), mode("record")...), "true")
		e.version("web", 1)
		if r := e.run("web", append(trace("of:"+out), mode("enforce")...), "mkdir", "/x"); r.code == 0 {
			t.Errorf("enforce: %+v", r)
		}
		data, err := os.ReadFile(out)
		if err != nil {
			t.Fatal(err)
		}
		p, err := profiles.DecodeProfile(data)
		if err != nil || slices.Contains(p.Syscalls[0].Names, "mkdir") {
			t.Errorf("traced under enforcement: %s, %v", data, err)
		}
		if _, err := e.store().Version("web", 2); err == nil {
			t.Error("a run under enforcement made a version")
		}
		e.idle()
		if left, _ := filepath.Glob(dir + "/.*"); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	})
}

// Whatever stands in the annotation: the container doesn't start, the reason is
// on the terminal, and nothing is written.
func TestTraceHostile(t *testing.T) {
	runtime := runtimes[0]
	dir, more := traces(t)
	outside := t.TempDir()
	secret := filepath.Join(outside, "secret")
	if err := os.WriteFile(secret, []byte("untouched"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{
		os.Symlink(outside, dir+"/link"),
		os.Symlink(secret, dir+"/file"),
		os.Symlink(dir+"/gone", dir+"/dangling"),
		os.Mkdir(dir+"/sub", 0o755),
		os.Symlink("..", dir+"/sub/up"),
		unix.Mkfifo(dir+"/fifo", 0o600),
		os.WriteFile(dir+"/broken.json", []byte(`{"defaultAction":"SCMP_ACT_ERRNO","defaultAction":`), 0o600),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	e := newEnv(t, runtime, more, byAnnotation)
	for name, c := range map[string]struct{ value, says string }{
		"empty":          {"", "begins with neither of: nor if:"},
		"no output":      {"if:" + dir + "/x", "of: is missing"},
		"relative":       {"of:x.json", "is not absolute"},
		"traversal":      {"of:" + dir + "/../x", "not the shortest form"},
		"three parts":    {"of:/a;if:/b;of:/c", "has 3 parts"},
		"two outputs":    {"of:" + dir + "/a;of:" + dir + "/b", "of: is given twice"},
		"other prefix":   {"OF:" + dir + "/a", "begins with neither"},
		"escape":         {"of:" + dir + "/\x1b[31m", "control character"},
		"long":           {"of:" + dir + "/" + strings.Repeat("x", 100<<10), "more than"},
		"outside":        {"of:" + secret, "none of the directories"},
		"the directory":  {"of:" + dir, "none of the directories"},
		"its sibling":    {"of:" + dir + "x/a", "none of the directories"},
		"linked dir":     {"of:" + dir + "/link/secret", "symbolic links are not followed"},
		"link upwards":   {"of:" + dir + "/sub/up/up/x", "symbolic links are not followed"},
		"linked file":    {"of:" + dir + "/file", "no regular file"},
		"dangling link":  {"of:" + dir + "/dangling", "no regular file"},
		"fifo":           {"of:" + dir + "/fifo", "no regular file"},
		"no parent":      {"of:" + dir + "/none/x", "make it first"},
		"fifo as input":  {"of:" + dir + "/x;if:" + dir + "/fifo", "no regular file"},
		"link as input":  {"of:" + dir + "/x;if:" + dir + "/file", "symbolic links are not followed"},
		"outside input":  {"of:" + dir + "/x;if:" + secret, "none of the directories"},
		"broken input":   {"of:" + dir + "/x;if:" + dir + "/broken.json", "broken.json"},
		"missing input":  {"of:" + dir + "/x;if:" + dir + "/none.json", "none.json"},
		"name too long":  {"of:" + dir + "/" + strings.Repeat("x", 300), "file name too long"},
		"proc magiclink": {"of:/proc/self/root" + dir + "/x", "none of the directories"},
	} {
		t.Run(name, func(t *testing.T) {
			r := e.run("a", trace(c.value), "true")
			if r.code == 0 || !strings.Contains(r.stderr, c.says) || !strings.Contains(r.stderr, "io.containers.trace-syscall") && !strings.Contains(r.stderr, "if:/") {
				t.Errorf("%+v, want a message with %q", r, c.says)
			}
			if len(r.stderr) > 4000 || strings.Contains(r.stderr, "\x1b") {
				t.Errorf("message of %d bytes: %q", len(r.stderr), r.stderr)
			}
		})
	}
	if data, err := os.ReadFile(secret); err != nil || string(data) != "untouched" {
		t.Errorf("secret: %q, %v", data, err)
	}
	for _, path := range []string{dir + "/gone", dir + "/x", outside + "/x"} {
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s was made", path)
		}
	}

	// A link that is put there while the container runs.
	target := filepath.Join(dir, "sub", "late.json")
	e.run("late", append(trace("of:"+target), "-d"), "sleep", "1000")
	if err := errors.Join(os.Rename(dir+"/sub", dir+"/was"), os.Symlink(outside, dir+"/sub")); err != nil {
		t.Fatal(err)
	}
	e.podman("rm", "-f", "-t", "0", "late")
	if _, err := os.Lstat(outside + "/late.json"); err == nil {
		t.Error("the late link was followed")
	}

	// Turned off.
	for way, fails := range map[string]bool{"": true, "hook: {traceSyscall: refuse}\n": true, "hook: {traceSyscall: ignore}\n": false} {
		e.write(way, byAnnotation)
		r := e.run("off", trace("of:"+dir+"/x"), "true")
		if (r.code != 0) != fails || fails && !strings.Contains(r.stderr, "traceSyscall: serve") {
			t.Errorf("%q: %+v", way, r)
		}
		if _, err := os.Lstat(dir + "/x"); err == nil {
			t.Errorf("%q: the file was made", way)
		}
	}
	e.idle()
}
