// SPDX-License-Identifier: Apache-2.0

package podman

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// What keeps a container from starting is on the terminal of whoever started it,
// with the file that is at fault.
func TestFailures(t *testing.T) {
	each(t, func(t *testing.T, runtime string) {
		e := newEnv(t, runtime, "", byAnnotation)
		e.run("web", mode("record"), "true")
		path, err := e.store().Path("web", 1)
		if err != nil {
			t.Fatal(err)
		}
		profile, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		deny := strings.Replace(byAnnotation, "match: {}", "match: {}\n  failure: deny", 1)
		for _, c := range []struct {
			name, mode string
			spoil      func() error
			says       []string
			repair     func() error
		}{
			{
				"broken policy", "record",
				func() error {
					return os.WriteFile(e.policy, []byte("apiVersion: syslatch.dev/v1\npolicies:\n- nmae: x\n"), 0o600)
				},
				[]string{e.policy + ":3: policies[0].nmae: unknown field", `did you mean "name"?`},
				nil,
			},
			{"no policy", "record", func() error { return os.Remove(e.policy) }, []string{e.policy, "no such file"}, nil},
			{"no version", "enforce", nil, []string{"none", "run it in mode record first"}, nil},
			{
				"changed profile", "enforce",
				func() error {
					return os.WriteFile(path, []byte(strings.Replace(string(profile), "SCMP_ACT_ERRNO", "SCMP_ACT_ALLOW", 1)), 0o644)
				},
				[]string{path},
				func() error { return os.WriteFile(path, profile, 0o644) },
			},
			{
				"store is a file", "record",
				func() error {
					return errors.Join(os.Rename(e.dir+"/store", e.dir+"/kept"), os.WriteFile(e.dir+"/store", nil, 0o600))
				},
				[]string{e.dir + "/store"},
				func() error {
					return errors.Join(os.Remove(e.dir+"/store"), os.Rename(e.dir+"/kept", e.dir+"/store"))
				},
			},
			{
				"no bpffs", "record",
				func() error {
					data, err := os.ReadFile(e.policy)
					return errors.Join(err, os.WriteFile(e.policy, []byte(strings.Replace(string(data), e.pins, "/run/not-a-bpffs", 1)), 0o600))
				},
				[]string{"/run/not-a-bpffs is not on a bpffs", "mount -t bpf"},
				nil,
			},
			{
				"profile replaced", "enforce",
				func() error {
					return errors.Join(
						os.WriteFile(e.dir+"/loosen", []byte("#!/bin/sh\nexec /usr/bin/jq '.linux.seccomp.defaultAction = \"SCMP_ACT_ALLOW\"'\n"), 0o755),
						os.WriteFile(e.dir+"/hooks.d/z.json", fmt.Appendf(nil, `{"version":"1.0.0","hook":{"path":%q},"when":{"always":true},"stages":["precreate"]}`, e.dir+"/loosen"), 0o644))
				},
				[]string{"another precreate hook replaced it"},
				func() error { return os.Remove(e.dir + "/hooks.d/z.json") },
			},
			{"bad annotation", "enfroce", nil, []string{`value "enfroce"`, "want off, record, audit or enforce"}, nil},
		} {
			t.Run(c.name, func(t *testing.T) {
				e.t = t
				e.write("", deny)
				if c.spoil != nil {
					if err := c.spoil(); err != nil {
						t.Fatal(err)
					}
				}
				name := map[bool]string{true: "none", false: "web"}[c.name == "no version"]
				for _, options := range [][]string{nil, {"-d"}} {
					r := e.run(name, append(mode(c.mode), options...), "true")
					if r.code == 0 {
						t.Errorf("started: %+v", r)
					}
					for _, s := range append(c.says, "syslatch: ") {
						if !strings.Contains(r.stderr, s) {
							t.Errorf("%v: no %q in %q", options, s, r.stderr)
						}
					}
				}
				if c.repair != nil {
					if err := c.repair(); err != nil {
						t.Fatal(err)
					}
				}
			})
		}
		e.t = t
		e.write("", deny)
		e.idle()
	})
}

// Under runtime-default the container starts, and syslog says what it lacks.
func TestRuntimeDefault(t *testing.T) {
	each(t, func(t *testing.T, runtime string) {
		log := listenSyslog(t)
		if log == nil {
			t.Skip("this machine has a syslog, which is left alone")
		}
		e := newEnv(t, runtime, "", strings.Replace(byAnnotation, "match: {}", "match: {}\n  failure: runtime-default", 1))
		if r := e.run("web", mode("enforce"), "mkdir", "/x"); r.code != 0 {
			t.Errorf("%+v", r)
		}
		e.wait("the message", func() bool {
			s := log()
			return strings.Contains(s, " syslatch[") && strings.Contains(s, "has no profile version") && strings.Contains(s, "container runs without syslatch")
		})
		e.idle()
	})
}

// listenSyslog is this machine's /dev/log for the time of a test. It is nil where
// there is a syslog, which is left alone.
func listenSyslog(t *testing.T) (text func() string) {
	t.Helper()
	if _, err := os.Lstat("/dev/log"); !errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: "/dev/log", Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var all strings.Builder
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 64<<10)
		for {
			n, err := conn.Read(buf)
			if err != nil {
				return
			}
			mu.Lock()
			all.Write(append(buf[:n], '\n'))
			mu.Unlock()
		}
	}()
	t.Cleanup(func() {
		conn.Close()
		<-done
		if err := os.Remove("/dev/log"); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Error(err)
		}
	})
	return func() string {
		mu.Lock()
		defer mu.Unlock()
		return all.String()
	}
}

// The hook itself refuses what is no spec or state, and never panics.
func TestGarbage(t *testing.T) {
	e := newEnv(t, runtimes[0], "", byAnnotation)
	for _, stage := range []string{"precreate", "createRuntime", "poststart", "poststop"} {
		for name, in := range map[string]string{
			"empty": "", "truncated": `{"ociVersion":"1.0.2","linux":{`, "array": "[]", "null": "null",
			"duplicate": `{"id":"a","id":"b","pid":1}`, "twice": `{"id":"a"}{"id":"b"}`,
			"deep": strings.Repeat(`{"a":`, 200), "huge": `{"id":"` + strings.Repeat("x", 17<<20) + `"}`,
			"hostile id": `{"id":"../../etc/passwd","pid":1,"status":"creating"}`,
		} {
			cmd := exec.Command(filepath.Join(programs, "syslatch-hook"), stage, "--config", e.policy)
			cmd.Stdin = strings.NewReader(in)
			out, err := cmd.CombinedOutput()
			if stage == "poststart" {
				continue // nothing that goes wrong there ends a container
			}
			if stage == "precreate" && name == "hostile id" {
				continue // a spec, if a poor one
			}
			if err == nil || cmd.ProcessState.ExitCode() != 1 || strings.Contains(string(out), "goroutine") || len(out) > 4000 {
				t.Errorf("%s %s: %v, %.300s", stage, name, err, out)
			}
		}
	}
	e.idle()
}
