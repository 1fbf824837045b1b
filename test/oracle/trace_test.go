// SPDX-License-Identifier: Apache-2.0

package oracle

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/syslatch/syslatch/profiles"
)

// call is what seccomp and the recorder mean by a system call. x32's numbers
// are without their bit.
type call struct {
	abi profiles.ABI
	nr  uint32
}

func (c call) String() string { return fmt.Sprintf("%s:%d", c.abi, c.nr) }

// entry is one call of one thread, as strace saw it.
type entry struct {
	thread int
	call
	name   string // strace's
	args   []uint64
	result string // after the "= "; "" if it has none: the thread was ended in it
	// certain: the kernel got as far as the recorder's place. Not so for a call
	// that its thread's end may have forestalled (strace stands before that
	// place), and for one of a thread on which another one was loading a filter.
	certain bool
}

// ok says whether the call succeeded.
func (e *entry) ok() bool {
	return e.result != "" && e.result != "?" && !strings.HasPrefix(e.result, "-1 ")
}

// trace is what strace saw after the filter's load.
type trace []entry

// set is the calls; only the certain ones if asked.
func (tr trace) set(certain bool) map[call]bool {
	set := map[call]bool{}
	for _, e := range tr {
		if e.certain || !certain {
			set[e.call] = true
		}
	}
	return set
}

// compare holds a recording against the trace, both ways.
func (tr trace) compare(t *testing.T, recorded map[call]bool) {
	t.Helper()
	name := func(c call) string {
		for _, e := range tr {
			if e.call == c {
				return c.String() + " " + e.name
			}
		}
		return c.String()
	}
	for c := range tr.set(true) {
		if !recorded[c] {
			t.Errorf("strace saw %s, which wasn't recorded", name(c))
		}
	}
	all := tr.set(false)
	for c := range recorded {
		if !all[c] {
			t.Errorf("recorded %s, which strace didn't see", name(c))
		}
	}
}

// straceArgs: all threads, numbers beside names, arguments raw but for those
// that tell a thread from a process, thread ids as strace's own pid namespace
// has them. Messages, which tell of another ABI, stand in line with the calls
// where both go to one pipe.
var straceArgs = []string{
	"-f", "-n", "--decode-pids=pidns", "--quiet=attach,exit", "--signal=none",
	"-e", "raw=!clone,clone3,fork,vfork", "-o", "/dev/stderr", "--",
}

// straceTimeout bounds one run under strace; the guest is some ten times slower.
const straceTimeout = 2 * time.Minute

// strace runs a command under strace and returns the calls of threads with more
// filters than base. The command itself starts with those of this process. The
// output is the command's, both streams.
func strace(t *testing.T, base int, command ...string) (_ trace, output string) {
	t.Helper()
	var out bytes.Buffer
	tr, err := tryStrace(t.Context(), base, nil, &out, command...)
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(command, " "), err, out.String())
	}
	return tr, out.String()
}

// tryStrace returns what strace saw of a command that failed, too.
func tryStrace(ctx context.Context, base int, stdin io.Reader, out io.Writer, command ...string) (trace, error) {
	ctx, cancel := context.WithTimeout(ctx, straceTimeout)
	defer cancel()
	// The command's standard error must not come between strace's lines.
	args := append(slices.Clone(straceArgs), "/bin/sh", "-c", `exec "$@" 2>&1`, "sh")
	cmd := exec.CommandContext(ctx, "strace", append(args, command...)...)
	var lines bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, out, &lines
	cmd.WaitDelay = 10 * time.Second
	ended := cmd.Run()
	if ctx.Err() != nil {
		return nil, fmt.Errorf("no end after %s: %w", straceTimeout, ctx.Err())
	}
	tr, err := parseTrace(lines.String(), ownFilters, base)
	if err != nil {
		return nil, fmt.Errorf("strace's output: %w", err)
	}
	return tr, ended
}

// A line is "THREAD [NUMBER] ", and then one of: "name(args) = result", the same
// cut in two ("name(args <unfinished ...>", "<... name resumed>args) = result"),
// "restart_syscall(<... resuming interrupted name ...>) = result", or a message.
var (
	lineForm     = regexp.MustCompile(`^(\d+) +\[ *(\d+|\?\?\?)\] (.*)$`)
	entryForm    = regexp.MustCompile(`^([\w:#]+)\((.*)$`)
	resumedForm  = regexp.MustCompile(`^<\.\.\. ([\w:#]+) resumed>(.*)$`)
	resultForm   = regexp.MustCompile(`\) += (.*)$`)
	childForm    = regexp.MustCompile(`^(\d+)(?: /\* (\d+) in strace's PID NS \*/)?$`)
	abiForm      = regexp.MustCompile(`\[ Process PID=(\d+) runs in (64 bit|32 bit|x32) mode\. \]`)
	supersedForm = regexp.MustCompile(`^\+\+\+ superseded by execve in pid (\d+) \+\+\+`)
	rawForm      = regexp.MustCompile(`^(0x[0-9a-f]+|\d+)$`)
)

var straceABIs = map[string]profiles.ABI{"64 bit": x64, "32 bit": i386, "x32": x32}

const x32Bit = 0x40000000

// step is a line that matters, in order.
type step struct {
	entry
	begins, ends int    // line numbers; ends is -1 without a result
	text         string // after the opening parenthesis
	child        int    // of a fork
	superseded   int    // not a call: the thread that took over thread's id
	assumed      bool   // its ABI is
	lost         bool   // not a call, by strace's mistake
}

// parseTrace follows the number of filters of each thread, as the kernel does
// (kernel/seccomp.c): it is inherited, a load adds one, a load with
// SECCOMP_FILTER_FLAG_TSYNC gives all threads of the process the caller's. Calls
// of threads with more than base are returned. The first thread starts with
// own.
func parseTrace(text string, own, base int) (trace, error) {
	steps, err := parseLines(text)
	if err != nil {
		return nil, err
	}
	var (
		filters = map[int]int{}
		process = map[int]int{}  // of a thread
		loading = map[int]int{}  // threads in a load: step
		counts  = map[int]bool{} // steps whose calls count
		windows = map[int]bool{} // of them, those in a window of uncertainty
	)
	// Ends of loads take their effect at their own lines.
	type event struct{ line, step int }
	var events []event
	for i, s := range steps {
		events = append(events, event{s.begins, i})
		if s.superseded == 0 && s.ends >= 0 && loads(&s.entry) {
			events = append(events, event{s.ends, ^i})
		}
	}
	slices.SortStableFunc(events, func(a, b event) int { return a.line - b.line })
	for n, ev := range events {
		if ev.step < 0 {
			i := ^ev.step
			s := steps[i]
			delete(loading, s.thread)
			filters[s.thread]++
			if !tsync(&s.entry) {
				continue
			}
			for other, p := range process {
				if p != process[s.thread] || other == s.thread {
					continue
				}
				filters[other] = filters[s.thread]
				if filters[other] <= base {
					continue
				}
				// What the other one called meanwhile, and the call that it was in
				// when the load began, may have come either side of it.
				before := -1
				for j, t := range steps {
					if t.thread != other || t.superseded != 0 || t.lost || t.begins > s.ends || counts[j] {
						continue
					}
					if t.begins < s.begins {
						before = j
					} else {
						counts[j], windows[j] = true, true
					}
				}
				if before >= 0 {
					counts[before], windows[before] = true, true
				}
			}
			continue
		}
		i := ev.step
		s := steps[i]
		if n == 0 {
			filters[s.thread], process[s.thread] = own, s.thread
		}
		have, known := filters[s.thread]
		if s.superseded != 0 {
			if from, ok := filters[s.superseded]; ok {
				filters[s.thread], process[s.thread] = from, s.thread
				delete(filters, s.superseded)
				delete(process, s.superseded)
			}
			continue
		}
		if !known {
			return nil, fmt.Errorf("thread %d calls %s, and nobody has made it", s.thread, s.name)
		}
		if have > base && !s.lost {
			counts[i] = true
		}
		if loads(&s.entry) {
			loading[s.thread] = i
		}
		if s.child != 0 {
			filters[s.child], process[s.child] = have, s.child
			if strings.Contains(s.text, "CLONE_THREAD") {
				process[s.child] = process[s.thread]
			}
		}
	}
	var tr trace
	for i, s := range steps {
		if counts[i] {
			s.certain = !windows[i] && s.result != ""
			tr = append(tr, s.entry)
		}
	}
	return tr, nil
}

// loads says whether a call has loaded a filter: seccomp(SECCOMP_SET_MODE_FILTER)
// or prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER).
func loads(e *entry) bool {
	if !e.ok() || len(e.args) < 3 {
		return false
	}
	return e.name == "seccomp" && e.args[0] == 1 || e.name == "prctl" && e.args[0] == 22 && e.args[1] == 2
}

func tsync(e *entry) bool { return e.name == "seccomp" && e.args[1]&1 != 0 }

func parseLines(text string) ([]step, error) {
	var (
		steps []step
		open  = map[int]int{} // by thread: step
		abis  = map[int]profiles.ABI{}
		// A new thread's mode is the one that strace saw last when it met the
		// thread, so most likely its parent's at the fork: known when that returns.
		assumed = map[int]bool{}
	)
	for n, l := range strings.Split(text, "\n") {
		if m := abiForm.FindStringSubmatch(l); m != nil {
			thread, err := strconv.Atoi(m[1])
			if err != nil {
				return nil, err
			}
			abis[thread] = straceABIs[m[2]]
			delete(assumed, thread)
			continue
		}
		m := lineForm.FindStringSubmatch(l)
		if m == nil {
			continue
		}
		thread, err := strconv.Atoi(m[1])
		if err != nil {
			return nil, err
		}
		rest := m[3]
		if m := supersedForm.FindStringSubmatch(rest); m != nil {
			by, err := strconv.Atoi(m[1])
			if err != nil {
				return nil, err
			}
			steps = append(steps, step{entry: entry{thread: thread}, begins: n, ends: -1, superseded: by})
			// Its call, the execve, ends under the other id.
			if i, ok := open[by]; ok {
				open[thread] = i
				delete(open, by)
			}
			abis[thread] = abis[by]
			continue
		}
		if abis[thread] == "" {
			abis[thread], assumed[thread] = x64, true
		}
		var i int
		if r := resumedForm.FindStringSubmatch(rest); r != nil {
			var ok bool
			if i, ok = open[thread]; !ok || steps[i].name != r[1] {
				return nil, fmt.Errorf("line %d: resumes what didn't begin: %s", n+1, l)
			}
			rest = r[2]
		} else if e := entryForm.FindStringSubmatch(rest); e != nil {
			if m[2] == "???" {
				return nil, fmt.Errorf("line %d: a call without a number: %s", n+1, l)
			}
			nr, err := strconv.ParseUint(m[2], 10, 64)
			if err != nil {
				return nil, fmt.Errorf("line %d: number %s", n+1, m[2])
			}
			// strace 6.1 takes, once in some thousand threads, a call's end for the
			// begin of another, with the result for its number: seen with -EAGAIN, of
			// a futex in runc. What began is not known.
			lost := int64(nr) < 0
			if abis[thread] == x32 {
				nr &^= x32Bit
			}
			i = len(steps)
			steps = append(steps, step{
				entry:  entry{thread: thread, call: call{abis[thread], uint32(nr)}, name: e[1], args: rawArgs(e[2])},
				begins: n, ends: -1, text: e[2], assumed: assumed[thread], lost: lost,
			})
			open[thread] = i
		} else {
			continue // an end of a thread
		}
		s := &steps[i]
		if r := resultForm.FindStringSubmatch(rest); r != nil {
			delete(open, thread)
			s.ends = n
			// "<unfinished ...>) = ?" is the end of a thread in the middle of a call;
			// of the calls that end one it is the success.
			if s.result = strings.TrimSpace(r[1]); s.result == "?" && !strings.HasPrefix(s.name, "exit") {
				s.result = ""
			}
		}
		if c := childForm.FindStringSubmatch(s.result); c != nil && slices.Contains([]string{"clone", "clone3", "fork", "vfork"}, s.name) {
			id := c[1]
			if c[2] != "" {
				id = c[2]
			}
			if s.child, err = strconv.Atoi(id); err != nil {
				return nil, err
			}
			if abis[s.child] == "" || assumed[s.child] {
				abis[s.child] = s.abi
				delete(assumed, s.child)
				for j := range steps {
					if steps[j].thread == s.child && steps[j].assumed {
						steps[j].abi = s.abi
					}
				}
			}
		}
	}
	adopt(steps)
	return steps, nil
}

// adopt finds the makers of threads in other pid namespaces that had ended when
// their maker's call did: by then strace can't translate their ids any more. A
// thread's first line stands within that call.
func adopt(steps []step) {
	first := map[int]int{} // line of each thread
	for _, s := range steps {
		if _, ok := first[s.thread]; !ok {
			first[s.thread] = s.begins
		}
	}
	orphans := maps.Clone(first)
	for _, s := range steps {
		delete(orphans, s.child)
	}
	for thread, line := range orphans {
		var makers []int
		for i, s := range steps {
			if _, translated := first[s.child]; s.child != 0 && !translated && s.begins < line && line < s.ends {
				makers = append(makers, i)
			}
		}
		if len(makers) == 1 {
			steps[makers[0]].child = thread
		}
	}
}

// rawArgs reads "0x1, 0, 0x7f)   = 0", or the start of it; nil if they aren't raw.
func rawArgs(text string) []uint64 {
	if end := strings.IndexAny(text, ")<"); end >= 0 {
		text = text[:end]
	}
	var args []uint64
	for a := range strings.SplitSeq(strings.TrimSpace(text), ", ") {
		if !rawForm.MatchString(a) {
			return args
		}
		v, err := strconv.ParseUint(a, 0, 64)
		if err != nil {
			return args
		}
		args = append(args, v)
	}
	return args
}

// The oracle's own reading, on lines of the kinds that it meets.
func TestParseTrace(t *testing.T) {
	const text = `10    [  59] execve(0x1, 0x2, 0x3) = 0
10    [ 317] seccomp(0x1, 0, 0)          = -1 EFAULT (Bad address)
10    [  39] getpid()                    = 0xa
10    [  56] clone(child_stack=0x1, flags=CLONE_VM|CLONE_THREAD) = 11
11    [ 186] gettid( <unfinished ...>
10    [ 317] seccomp(0x1, 0x1, 0x7f <unfinished ...>
11    [ 186] <... gettid resumed>)       = 0xb
11    [  35] nanosleep(0x1, 0 <unfinished ...>
10    [ 317] <... seccomp resumed>)      = 0
11    [  35] <... nanosleep resumed>)    = 0
11    [  24] sched_yield()               = 0
10    [  58] vfork( <unfinished ...>
12    [ 102] getuid()                    = 0
12    [  59] execve(0x1, 0x2, 0x3)       = 0
10    [  58] <... vfork resumed>)        = 2 /* 12 in strace's PID NS */
12    [ 102] [ Process PID=12 runs in 32 bit mode. ]
12    [  20] getpid()                    = 2
12    [  20] [ Process PID=12 runs in x32 mode. ]
12    [1073741863] getpid()              = -1 ENOSYS (Function not implemented)
12    [1073741863] [ Process PID=12 runs in 64 bit mode. ]
12    [18446744073709551605] syscall_0xfffffffffffffff5(0x1, 0, 0x1, 0, 0, 0 <unfinished ...>
12    [18446744073709551605] <... syscall_0xfffffffffffffff5 resumed>) = 0
12    [ 500] syscall_0x1f4(0x1, 0, 0x1, 0, 0, 0) = -1 ENOSYS (Function not implemented)
12    [ 231] exit_group(0)               = ?
11    [ 202] futex(0x1, 0x80, 0 <unfinished ...>
10    [ 231] exit_group(0)               = ?
11    [ 202] <... futex resumed>)        = ?
`
	got, err := parseTrace(text, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for _, e := range got {
		lines = append(lines, fmt.Sprintf("%d %s %s %v", e.thread, e.call, e.name, e.certain))
	}
	want := []string{
		"11 SCMP_ARCH_X86_64:186 gettid false",
		"11 SCMP_ARCH_X86_64:35 nanosleep false",
		"11 SCMP_ARCH_X86_64:24 sched_yield true",
		"10 SCMP_ARCH_X86_64:58 vfork true",
		"12 SCMP_ARCH_X86_64:102 getuid true",
		"12 SCMP_ARCH_X86_64:59 execve true",
		"12 SCMP_ARCH_X86:20 getpid true",
		"12 SCMP_ARCH_X32:39 getpid true",
		"12 SCMP_ARCH_X86_64:500 syscall_0x1f4 true",
		"12 SCMP_ARCH_X86_64:231 exit_group true",
		"11 SCMP_ARCH_X86_64:202 futex false",
		"10 SCMP_ARCH_X86_64:231 exit_group true",
	}
	if diff := cmp.Diff(want, lines); diff != "" {
		t.Errorf("calls that count (-want +got):\n%s", diff)
	}
	// One filter more was there before: the load is the outer one's.
	if got, err = parseTrace(text, 0, 1); err != nil || len(got) != 0 {
		t.Errorf("with a base of 1: %v, %v", got, err)
	}
	if got, err = parseTrace(text, 1, 1); err != nil || len(got) != len(want) {
		t.Errorf("with 1 inherited and a base of 1: %d calls, %v", len(got), err)
	}
	const ended = `10 [ 317] seccomp(0x1, 0, 0x7f) = 0
10 [  56] clone(child_stack=0x1, flags=CLONE_VM|CLONE_THREAD <unfinished ...>
12 [ 186] gettid() = 0x3
12 [  60] exit(0) = ?
10 [  56] <... clone resumed>) = 3
`
	if got, err = parseTrace(ended, 0, 0); err != nil || len(got) != 3 || got[1].thread != 12 {
		t.Errorf("thread of a pid namespace that ended early: %+v, %v", got, err)
	}
	if _, err := parseTrace("10 [ 39] getpid() = 10\n11 [ 39] getpid() = 11\n", 0, 0); err == nil {
		t.Error("a thread without a parent was taken")
	}
	const taken = `10 [ 317] seccomp(0x1, 0, 0x7f) = 0
10 [  56] clone(child_stack=0x1, flags=CLONE_VM|CLONE_THREAD) = 11
10 [  34] pause( <unfinished ...>
11 [  59] execve(0x1, 0x2, 0x3 <unfinished ...>
10 [  34] <... pause resumed>) = ?
10 [  59] +++ superseded by execve in pid 11 +++
10 [  59] <... execve resumed>) = 0
10 [  12] brk(0) = 0x1
`
	if got, err = parseTrace(taken, 0, 0); err != nil || len(got) != 4 || got[1].certain || !got[2].certain || got[3].name != "brk" {
		t.Errorf("execve of a thread: %+v, %v", got, err)
	}
}
