// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/internal/inject"
)

// Calls that differ between phases in each of the ways that there are: chdir is static
// until the ratchet, mkdir asks in every phase, rmdir only until then.
const irreversiblePolicy = `apiVersion: syslatch.dev/v1
policies:
- name: agent
  match: {}
  mode: enforce
  phases:
    initial: work
    gaps: report
    work: {allow: ["@file-read", "@basic-io", "@info", "@process", chdir]}
    write: {allow: ["@file-read", "@basic-io", "@info", "@process", chdir, mkdir, rmdir], next: [work, locked]}
    locked: {allow: [mkdir], irreversible: true}
`

// Arguments that make this binary a caller, or the child that one starts.
const callerParent, callerChild = "internal-test-caller", "internal-test-caller-child"

// caller makes the calls that it is told, by two threads and a child, with a null pointer
// for a path, and prints the errors' numbers.
func caller(parent bool) {
	calls := map[string]uintptr{"chdir": unix.SYS_CHDIR, "mkdir": unix.SYS_MKDIR, "rmdir": unix.SYS_RMDIR}
	call := func(name string) string {
		_, _, errno := unix.Syscall(calls[name], 0, 0, 0)
		return strconv.Itoa(int(errno))
	}
	ask, answer := make(chan string), make(chan string)
	go func() {
		runtime.LockOSThread()
		for name := range ask {
			answer <- call(name)
		}
	}()
	runtime.LockOSThread()
	child := func(string) string { return "" }
	if parent {
		cmd := exec.Command("/proc/self/exe", callerChild)
		cmd.Stderr = os.Stderr // nothing to be opened
		in, err := cmd.StdinPipe()
		if err != nil {
			panic(err)
		}
		pipe, err := cmd.StdoutPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			panic(err)
		}
		out := bufio.NewReader(pipe)
		_, _ = out.ReadString('\n')
		child = func(name string) string {
			fmt.Fprintln(in, name)
			line, _ := out.ReadString('\n')
			return " " + strings.TrimSpace(line)
		}
	}
	fmt.Println(os.Getpid())
	in := bufio.NewReader(os.Stdin)
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			return // the child's input ends with this
		}
		name := strings.TrimSpace(line)
		ask <- name
		fmt.Printf("%s %s%s\n", call(name), <-answer, child(name))
	}
}

// filters are the numbers of filters that the tasks of the cgroup have.
func (p *phased) filters() map[int]int {
	p.t.Helper()
	out := map[int]int{}
	data, err := os.ReadFile(filepath.Join(p.cgroup, "cgroup.threads"))
	if err != nil {
		p.t.Fatal(err)
	}
	for tid := range strings.FieldsSeq(string(data)) {
		text, err := os.ReadFile("/proc/" + tid + "/status")
		if err != nil {
			continue // ended
		}
		_, n, _ := strings.Cut(string(text), "Seccomp_filters:\t")
		n, _, _ = strings.Cut(n, "\n")
		number, err := strconv.Atoi(n)
		if err != nil {
			p.t.Fatal(err)
		}
		out[number]++
	}
	return out
}

// calls has two threads of the command and two of its child make a call.
func (p *phased) calls(name string, want unix.Errno) {
	p.t.Helper()
	if _, err := io.WriteString(p.in, name+"\n"); err != nil {
		p.t.Fatal(err)
	}
	p.expect(strings.TrimSpace(strings.Repeat(strconv.Itoa(int(want))+" ", 4)))
}

// TestRunIrreversible: an irreversible phase is the kernel's from its acknowledgement on,
// for a Go program, its threads and its child, with and without a supervisor.
func TestRunIrreversible(t *testing.T) {
	needRoot(t)
	if err := inject.Able(); err != nil {
		t.Fatal(err) // root without a filter can
	}
	p := startInPhases(t, []string{"/proc/self/exe", callerParent}, "run", "--policy", policyFile(t, irreversiblePolicy))
	base := p.filters()
	if len(base) != 1 {
		t.Fatalf("filters: %v", base)
	}
	for n := range base {
		oneMore := func() {
			t.Helper()
			if now := p.filters(); len(now) != 1 || now[n+1] < 4 {
				t.Errorf("filters: %v before, %v now", base, now)
			}
		}
		p.calls("chdir", unix.EFAULT)
		p.calls("mkdir", unix.EPERM)
		p.set("write", 0)
		p.calls("mkdir", unix.EFAULT)
		p.calls("rmdir", unix.EFAULT)
		p.set("locked", 0)
		oneMore()
		p.calls("chdir", unix.EPERM)
		p.calls("rmdir", unix.EPERM)
		p.calls("mkdir", unix.EFAULT)
		p.set("work", 3)
		p.set("locked", 0)
		oneMore()
		if err := p.cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		if _, err := p.cmd.Process.Wait(); err != nil {
			t.Fatal(err)
		}
		p.waited = true
		oneMore()
		p.calls("chdir", unix.EPERM)
		p.calls("rmdir", unix.EPERM)
		p.calls("mkdir", unix.ENOSYS)
	}
	p.abandoned()
}

// TestRunIrreversibleAtOnce: a command that begins in such a phase has its filter before
// its first instruction.
func TestRunIrreversibleAtOnce(t *testing.T) {
	needRoot(t)
	if err := inject.Able(); err != nil {
		t.Fatal(err) // root without a filter can
	}
	const status = `echo $$; while read line; do case "$line" in Seccomp_filters*) echo "$line"; esac; done`
	policy := strings.Replace(irreversiblePolicy, "locked: {allow: [mkdir]", `locked: {allow: ["@file-read", "@process", "@basic-io", "@info"]`, 1)
	p := startInPhases(t, []string{"/bin/sh", "-c", status + " </proc/self/status; read end"}, "run", "--policy", policyFile(t, policy), "--phase", "locked")
	line, err := p.out.ReadString('\n')
	if want := "Seccomp_filters:\t2\n"; err != nil || line != want {
		t.Errorf("%q, %v; want %q", line, err, want)
	}
	p.wait()
}
