// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/internal/cgroup"
)

// identity is a process for good: a pid is used again, but not with the same start.
type identity struct {
	pid   int
	start uint64 // clock ticks since boot
}

// stat is /proc/ID/stat.
type stat struct {
	identity
	command string
	state   byte
	parent  int
}

// dead says that a task runs no more: it has ended, and may wait for its parent or
// for the rest of its process.
func (s *stat) dead() bool { return s.state == 'Z' || s.state == 'X' || s.state == 'x' }

func parseStat(text string) (stat, error) {
	// The name may hold anything, parentheses and newlines too.
	open, end := strings.IndexByte(text, '('), strings.LastIndexByte(text, ')')
	bad := func() (stat, error) { return stat{}, fmt.Errorf("stat of unknown form: %q", text) }
	if open < 0 || end < open {
		return bad()
	}
	pid, err := strconv.Atoi(strings.TrimSpace(text[:open]))
	fields := strings.Fields(text[end+1:])
	const start = 22 - 3
	if err != nil || len(fields) <= start || len(fields[0]) != 1 {
		return bad()
	}
	parent, err := strconv.Atoi(fields[1])
	if err != nil {
		return bad()
	}
	ticks, err := strconv.ParseUint(fields[start], 10, 64)
	if err != nil {
		return bad()
	}
	return stat{identity{pid, ticks}, text[open+1 : end], fields[0][0], parent}, nil
}

// readProc reads /proc/PATH; ErrGone is wrapped where the task has ended.
func readProc(parts ...string) (string, error) {
	data, err := os.ReadFile(filepath.Join(append([]string{"/proc"}, parts...)...))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return "", fmt.Errorf("%w: %w", ErrGone, err)
	}
	return string(data), err
}

func readStat(tid int) (stat, error) {
	text, err := readProc(strconv.Itoa(tid), "stat")
	if err != nil {
		return stat{}, err
	}
	return parseStat(text)
}

// threadsOf lists a process's threads, dead ones included.
func threadsOf(pid int) ([]int, error) {
	return numbersIn(filepath.Join("/proc", strconv.Itoa(pid), "task"))
}

func numbersIn(dir string) ([]int, error) {
	f, err := os.Open(dir)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return nil, fmt.Errorf("%w: %w", ErrGone, err)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	names, err := f.Readdirnames(-1)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %w", ErrGone, err)
	}
	var out []int
	for _, name := range names {
		if n, err := strconv.Atoi(name); err == nil {
			out = append(out, n)
		}
	}
	return out, err
}

// status is what /proc/ID/status says and we need.
type status struct {
	state      string // "S (sleeping)"
	tgid       int
	tracer     int
	threads    int // of its process, with those that have ended and are not reaped
	uids       string
	kernel     bool
	noNewPrivs bool
	seccomp    int // 0 none, 1 strict, 2 filter
	filters    int
	caught     uint64 // signals that have a handler, bit 0 for SIGHUP
}

func readStatus(tid int) (status, error) {
	text, err := readProc(strconv.Itoa(tid), "status")
	if err != nil {
		return status{}, err
	}
	return parseStatus(text)
}

func parseStatus(text string) (status, error) {
	var s status
	numbers := map[string]*int{"Tgid": &s.tgid, "TracerPid": &s.tracer, "Threads": &s.threads, "Seccomp": &s.seccomp, "Seccomp_filters": &s.filters}
	found := 0
	memory := false
	for line := range strings.Lines(text) {
		key, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ":")
		value = strings.TrimSpace(value)
		switch key {
		case "State":
			s.state = value
		case "Uid":
			s.uids = value
		case "Kthread":
			s.kernel = value == "1"
		case "VmSize":
			memory = true
		case "SigCgt":
			n, err := strconv.ParseUint(value, 16, 64)
			if err != nil {
				return status{}, fmt.Errorf("status: %s: %w", key, err)
			}
			s.caught = n
		case "NoNewPrivs":
			s.noNewPrivs = value == "1"
		}
		if to := numbers[key]; to != nil {
			n, err := strconv.Atoi(value)
			if err != nil {
				return status{}, fmt.Errorf("status: %s: %w", key, err)
			}
			*to = n
			found++
		}
	}
	if found != len(numbers) {
		return status{}, errors.New("status: no Tgid, TracerPid, Threads, Seccomp or Seccomp_filters line: the kernel needs CONFIG_SECCOMP_FILTER and version 5.9")
	}
	// Before 6.10 there is no Kthread line. They alone have no memory and live.
	s.kernel = s.kernel || !memory && !strings.HasPrefix(s.state, "Z") && !strings.HasPrefix(s.state, "X")
	return s, nil
}

func (s *status) dead() bool {
	return strings.HasPrefix(s.state, "Z") || strings.HasPrefix(s.state, "X")
}

// scope is a Scope whose processes are held.
type scope struct {
	Scope
	roots []*cgroup.Process
	ids   []identity
	// followed are found by other ways: forked by a task that was traced.
	followed map[identity]bool
	// ended were seen in the tree when they had: before that they may have forked what a
	// list was too early for.
	ended map[identity]bool
}

func openScope(s Scope) (*scope, error) {
	out := &scope{Scope: s, followed: map[identity]bool{}, ended: map[identity]bool{}}
	if len(s.PIDs) == 0 && s.Cgroup == "" {
		return nil, errors.New("no process and no cgroup is given")
	}
	if s.Cgroup != "" && s.Freezer == nil {
		// The root of a hierarchy has none, nor have v1's other controllers.
		switch f, err := cgroup.NewFreezer(s.Cgroup); {
		case err == nil:
			out.Freezer = f
		case !errors.Is(err, fs.ErrNotExist):
			return nil, err
		}
	}
	for _, pid := range s.PIDs {
		fail := func(err error) (*scope, error) {
			out.close()
			return nil, &TaskError{pid, pid, err}
		}
		if pid == os.Getpid() {
			return fail(ErrSelf)
		}
		p, err := cgroup.OpenProcess(pid)
		if err != nil {
			out.close()
			if errors.Is(err, ErrGone) {
				return nil, &TaskError{pid, pid, fmt.Errorf("no such process: %w", ErrGone)}
			}
			return nil, err
		}
		out.roots = append(out.roots, p)
		text, err := p.ReadFile("stat")
		if err != nil {
			return fail(err)
		}
		st, err := parseStat(text)
		if err != nil {
			return fail(err)
		}
		if st.pid != pid {
			return fail(fmt.Errorf("%w: /proc is another pid namespace's", ErrGone))
		}
		info, err := readStatus(pid)
		switch {
		case err != nil:
			return fail(err)
		case info.tgid != pid:
			return fail(fmt.Errorf("is a thread of process %d: give that one", info.tgid))
		case info.kernel:
			return fail(ErrKernelThread)
		}
		out.ids = append(out.ids, st.identity)
	}
	return out, nil
}

func (s *scope) close() {
	for _, p := range s.roots {
		p.Close()
	}
}

// list gives the processes that there are in the scope, without those that have
// ended. A root that ends is nothing to complain about: its filter would, too.
//
// A process that ends while the list is made may have forked another that isn't in it:
// the list is made again then, tries times at most. It says whether something ended at
// the last time, too.
//
// Each process is handed to found, if that isn't nil, as soon as it is known to be in
// the scope: one that forks and ends all the time is gone when the list is made.
func (s *scope) list(tries int, found func(stat) error) (_ map[int]stat, vanished bool, err error) {
	out := map[int]stat{}
	for range tries {
		if vanished, err = s.scan(out, found); err != nil {
			return nil, false, err
		}
		if !vanished {
			break
		}
	}
	return out, vanished, nil
}

// scan adds to out, and says whether something ended meanwhile.
func (s *scope) scan(out map[int]stat, found func(stat) error) (vanished bool, err error) {
	add := func(st stat) error {
		if st.pid == os.Getpid() {
			return &TaskError{st.pid, 0, fmt.Errorf("%w, and would have to stop itself: run it from elsewhere", ErrSelf)}
		}
		if st.dead() && !hasLiveThread(st.pid) {
			if s.Tree && !s.ended[st.identity] {
				s.ended[st.identity], vanished = true, true
			}
			return nil
		}
		out[st.pid] = st
		if found != nil {
			return found(st)
		}
		return nil
	}
	// look reads about a process, nil if it has ended.
	look := func(pid int) (*stat, error) {
		st, err := readStat(pid)
		if errors.Is(err, ErrGone) {
			vanished = true
			return nil, nil
		}
		return &st, err
	}
	if s.Cgroup != "" {
		err := filepath.WalkDir(s.Cgroup, func(path string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) && path != s.Cgroup {
				return nil // removed, so it was empty
			}
			if err != nil || !d.IsDir() {
				return err
			}
			pids, err := processesIn(path)
			if err != nil {
				return err
			}
			for _, pid := range pids {
				st, err := look(pid)
				if err != nil {
					return err
				}
				if st != nil {
					if err := add(*st); err != nil {
						return err
					}
				}
			}
			return nil
		})
		if err != nil {
			return false, err
		}
	}
	roots := map[int]uint64{}
	for _, id := range s.ids {
		roots[id.pid] = id.start
	}
	for id := range s.followed {
		roots[id.pid] = id.start
	}
	all := map[int]stat{}
	children := map[int][]int{}
	added := map[int]bool{}
	if s.Tree {
		err := eachProcess(func(pid int) error {
			st, err := look(pid)
			if err != nil || st == nil {
				return err
			}
			all[pid] = *st
			children[st.parent] = append(children[st.parent], pid)
			if start, ok := roots[pid]; ok && start == st.start || added[st.parent] {
				added[pid] = true
				return add(*st)
			}
			return nil
		})
		if err != nil {
			return false, err
		}
	} else {
		for pid := range roots {
			st, err := readStat(pid)
			if err == nil {
				all[pid] = st
			} else if !errors.Is(err, ErrGone) {
				return false, err
			}
		}
	}
	var todo []int
	for pid, start := range roots {
		if st, ok := all[pid]; ok && st.start == start {
			todo = append(todo, pid)
		}
	}
	seen := map[int]bool{}
	for len(todo) > 0 {
		pid := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if seen[pid] {
			continue
		}
		seen[pid] = true
		if !added[pid] {
			if err := add(all[pid]); err != nil {
				return false, err
			}
		}
		todo = append(todo, children[pid]...)
	}
	return vanished, nil
}

// eachProcess goes through /proc, which lists by number, and by it reaches what is
// forked while it does.
func eachProcess(f func(pid int) error) error {
	dir, err := os.Open("/proc")
	if err != nil {
		return err
	}
	defer dir.Close()
	for {
		names, err := dir.Readdirnames(64)
		for _, name := range names {
			if pid, err := strconv.Atoi(name); err == nil {
				if err := f(pid); err != nil {
					return err
				}
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// hasLiveThread tells a process whose main thread has ended from one that has.
func hasLiveThread(pid int) bool {
	tids, err := threadsOf(pid)
	if err != nil {
		return false
	}
	for _, tid := range tids {
		if st, err := readStat(tid); err == nil && !st.dead() {
			return true
		}
	}
	return false
}

// processesIn reads cgroup.procs.
func processesIn(dir string) ([]int, error) {
	data, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if errors.Is(err, unix.ENODEV) {
		return nil, nil // removed meanwhile
	}
	if errors.Is(err, unix.EOPNOTSUPP) {
		return nil, fmt.Errorf("%s is a threaded cgroup: give the one above", dir)
	}
	if err != nil {
		return nil, err
	}
	var out []int
	for _, word := range strings.Fields(string(data)) {
		pid, err := strconv.Atoi(word)
		if err != nil {
			return nil, fmt.Errorf("%s/cgroup.procs: %w", dir, err)
		}
		if pid == 0 {
			return nil, fmt.Errorf("%s has processes of another pid namespace", dir)
		}
		out = append(out, pid)
	}
	return out, nil
}

// freezers answers, for each set of cgroups once, whether a task in it is frozen.
type freezers struct {
	hierarchy *cgroup.Hierarchy
	known     map[string]bool // by the text of /proc/PID/cgroup
}

func (f *freezers) frozen(pid int) (bool, error) {
	text, err := readProc(strconv.Itoa(pid), "cgroup")
	if err != nil {
		return false, err
	}
	if is, ok := f.known[text]; ok {
		return is, nil
	}
	if f.hierarchy == nil {
		if f.hierarchy, err = cgroup.Detect(); err != nil {
			return false, err
		}
	}
	is := false
	// Where a cgroup can't be seen from here, it is not known to be frozen.
	if dir, err := f.hierarchy.OfPID(pid); err == nil {
		data, err := os.ReadFile(filepath.Join(dir, "cgroup.events"))
		is = err == nil && bytes.Contains(data, []byte("frozen 1"))
	}
	if dir, err := f.hierarchy.Dir(pid, "freezer"); err == nil && !is {
		data, err := os.ReadFile(filepath.Join(dir, "freezer.state"))
		is = err == nil && !bytes.HasPrefix(data, []byte("THAWED"))
	}
	if f.known == nil {
		f.known = map[string]bool{}
	}
	f.known[text] = is
	return is, nil
}
