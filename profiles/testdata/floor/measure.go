// SPDX-License-Identifier: Apache-2.0

// Measure finds what container runtimes call between loading a container's
// seccomp filter and executing its program. It prints the content of
// ../../floor.json; see README.md.
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"
)

const runs = 5 // the Go runtime's own calls differ from run to run

// program only ends: no call but exit_group is its.
const program = `.globl _start
_start:	mov $231, %eax
	xor %edi, %edi
	syscall
`

type floor struct {
	Runtime    string   `json:"runtime"`
	Version    string   `json:"version"`
	NoNewPrivs bool     `json:"noNewPrivs"`
	Kernel     string   `json:"kernel"`
	Called     []string `json:"called"`
	Needed     []string `json:"needed"`
}

type rule struct {
	Names    []string `json:"names"`
	Action   string   `json:"action"`
	ErrnoRet uint     `json:"errnoRet,omitempty"`
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "measure:", err)
		os.Exit(1)
	}
}

func run(runtimes []string) error {
	if len(runtimes) == 0 {
		return fmt.Errorf("usage: measure RUNTIME... (such as runc, /path/to/runc, crun)")
	}
	dir, err := os.MkdirTemp("", "floor")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := os.Mkdir(filepath.Join(dir, "rootfs"), 0o755); err != nil {
		return err
	}
	gcc := exec.Command("gcc", "-x", "assembler", "-nostdlib", "-static", "-o", filepath.Join(dir, "rootfs", "exit"), "-")
	gcc.Stdin, gcc.Stderr = strings.NewReader(program), os.Stderr
	if err := gcc.Run(); err != nil {
		return fmt.Errorf("gcc: %w", err)
	}
	var u syscall.Utsname
	if err := syscall.Uname(&u); err != nil {
		return err
	}
	kernel := make([]byte, 0, len(u.Release))
	for _, c := range u.Release {
		if c == 0 {
			break
		}
		kernel = append(kernel, byte(c))
	}
	var out []floor
	for _, r := range runtimes {
		version, err := exec.Command(r, "--version").Output()
		if err != nil {
			return fmt.Errorf("%s --version: %w", r, err)
		}
		words := strings.Fields(string(version)) // "runc version 1.1.5+ds1"
		if len(words) < 3 {
			return fmt.Errorf("%s --version: %q", r, version)
		}
		for _, nnp := range []bool{true, false} {
			m := measurement{dir: dir, runtime: r, name: words[0], nnp: nnp}
			called, err := m.called()
			if err != nil {
				return fmt.Errorf("%s, noNewPrivs %t: %w", r, nnp, err)
			}
			needed, err := m.needed(called)
			if err != nil {
				return fmt.Errorf("%s, noNewPrivs %t: %w", r, nnp, err)
			}
			out = append(out, floor{words[0], words[2], nnp, string(kernel), called, needed})
		}
	}
	e := json.NewEncoder(os.Stdout)
	e.SetIndent("", "  ")
	return e.Encode(out)
}

type measurement struct {
	dir, runtime, name string
	nnp                bool
	n                  int
}

// spec is `runtime spec` with what matters here changed: docker's capabilities,
// no terminal, no network namespace, and the filter.
func (m *measurement) spec(rules []rule) error {
	file := filepath.Join(m.dir, "config.json")
	if err := os.RemoveAll(file); err != nil {
		return err
	}
	cmd := exec.Command(m.runtime, "spec")
	cmd.Dir = m.dir
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("spec: %w: %s", err, out)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var spec map[string]any
	if err := json.Unmarshal(data, &spec); err != nil {
		return err
	}
	caps := []string{"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_NET_BIND_SERVICE", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_CHROOT"}
	process := spec["process"].(map[string]any)
	maps.Copy(process, map[string]any{
		"terminal": false, "args": []string{"/exit"}, "noNewPrivileges": m.nnp,
		"capabilities": map[string]any{"bounding": caps, "effective": caps, "permitted": caps},
	})
	linux := spec["linux"].(map[string]any)
	linux["namespaces"] = []map[string]string{{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}}
	linux["seccomp"] = map[string]any{
		"defaultAction": "SCMP_ACT_ALLOW",
		"architectures": []string{"SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"},
		"syscalls":      rules,
	}
	if data, err = json.Marshal(spec); err != nil {
		return err
	}
	return os.WriteFile(file, data, 0o600)
}

// start runs the container and waits for its end. prefix goes before the
// runtime's command line.
func (m *measurement) start(prefix ...string) error {
	m.n++
	id := fmt.Sprintf("syslatch-floor-%d-%d", os.Getpid(), m.n)
	args := append(slices.Clone(prefix), m.runtime)
	if m.name == "crun" {
		args = append(args, "--cgroup-manager=disabled")
	}
	args = append(args, "run", id)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Dir = m.dir
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		_ = exec.Command(m.runtime, "delete", "--force", id).Run() // there may be none
		return fmt.Errorf("%w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

var line = regexp.MustCompile(`^(\d+)<(.*?)> (?:\d+\.\d+ )?([a-z_0-9]+)\((.*)$`)

// called is what strace sees.
func (m *measurement) called() ([]string, error) {
	if err := m.spec(nil); err != nil {
		return nil, err
	}
	seen := map[string]bool{}
	trace := filepath.Join(m.dir, "trace")
	for range runs {
		if err := m.start("strace", "-f", "-Y", "-o", trace); err != nil {
			return nil, err
		}
		f, err := os.Open(trace)
		if err != nil {
			return nil, err
		}
		err = between(f, seen)
		f.Close()
		if err != nil {
			return nil, err
		}
	}
	return slices.Sorted(maps.Keys(seen)), nil
}

// between adds the calls of the process that loads a filter, from the load to
// the execve. The threads of a Go process share the command name of the one
// that loads; crun has one thread, and its parent's name is the same.
func between(f *os.File, seen map[string]bool) error {
	loader, comm, done := "", "", false
	s := bufio.NewScanner(f)
	s.Buffer(nil, 1<<20)
	for s.Scan() && !done {
		part := line.FindStringSubmatch(s.Text())
		if part == nil {
			continue // a resumed call, a signal, an exit
		}
		pid, name, call, rest := part[1], part[2], part[3], part[4]
		switch {
		// The filter has a length; the attempts that probe for flags have none.
		case call == "seccomp" && strings.HasPrefix(rest, "SECCOMP_SET_MODE_FILTER") && strings.Contains(rest, "{len="),
			call == "prctl" && strings.HasPrefix(rest, "PR_SET_SECCOMP, SECCOMP_MODE_FILTER, {len="):
			loader, comm = pid, name
		case loader == "" || pid != loader && (name != comm || comm == "crun"):
		default:
			seen[call] = true
			done = call == "execve" && pid == loader
		}
	}
	if err := s.Err(); err != nil {
		return err
	}
	if !done {
		return fmt.Errorf("no execve after a filter's load (loader %q, %q)", loader, comm)
	}
	return nil
}

// needed is what of called stops the container's start when it is denied.
func (m *measurement) needed(called []string) ([]string, error) {
	var out []string
	for _, call := range called {
		if err := m.spec([]rule{{[]string{call}, "SCMP_ACT_ERRNO", 1}}); err != nil {
			return nil, err
		}
		failed := 0
		for range runs {
			if err := m.start(); err != nil {
				fmt.Fprintf(os.Stderr, "%s noNewPrivs=%t without %s: %.300v\n", m.runtime, m.nnp, call, err)
				failed++
			}
		}
		// Sometimes is not needed: the profile would have started some day.
		if failed == runs {
			out = append(out, call)
		}
	}
	// The control: the rest may be denied one by one, so one harmless denial
	// must let the container start.
	if err := m.spec([]rule{{[]string{"swapon"}, "SCMP_ACT_ERRNO", 1}}); err != nil {
		return nil, err
	}
	if err := m.start(); err != nil {
		return nil, fmt.Errorf("control with swapon denied: %w", err)
	}
	return out, nil
}
