// SPDX-License-Identifier: Apache-2.0

package podman

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/internal/seccomp"
	"github.com/syslatch/syslatch/internal/store"
	"github.com/syslatch/syslatch/profiles"
)

// odd are calls that neither a shell, nor the Go runtime, nor a container runtime
// behind its filter makes.
var odd = []string{
	"acct", "adjtimex", "bpf", "chroot", "clock_settime", "copy_file_range", "creat", "delete_module",
	"epoll_create", "fadvise64", "fallocate", "fanotify_init", "fdatasync", "fgetxattr", "flistxattr", "flock",
	"fremovexattr", "fsconfig", "fsmount", "fsopen", "fspick", "ftruncate", "getcpu", "getitimer",
	"getpriority", "inotify_add_watch", "io_cancel", "io_destroy", "io_setup", "ioperm", "iopl", "ioprio_get",
	"kcmp", "kexec_load", "link", "mbind", "membarrier", "mincore", "modify_ldt", "move_pages",
	"mq_unlink", "name_to_handle_at", "perf_event_open", "process_vm_readv", "pwritev2", "quotactl",
	"readahead", "remap_file_pages", "request_key", "setdomainname",
}

// atOnce is how many containers run at once: fewer where all is slow
// (SYSLATCH_TEST_CONTAINERS).
func atOnce(t *testing.T) int {
	t.Helper()
	text := os.Getenv("SYSLATCH_TEST_CONTAINERS")
	if text == "" {
		return len(odd)
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 3 || n > len(odd) {
		t.Fatalf("SYSLATCH_TEST_CONTAINERS=%s: want 3 to %d", text, len(odd))
	}
	return n
}

// gate holds containers back until all are there, and lets them go at once.
type gate struct{ up, open *os.File }

func newGate(t *testing.T, dir string) *gate {
	t.Helper()
	fifo := func(name string) *os.File {
		path := filepath.Join(dir, name)
		if err := unix.Mkfifo(path, 0o600); err != nil {
			t.Fatal(err)
		}
		// For both: so it has no end, whoever closes it.
		f, err := os.OpenFile(path, os.O_RDWR|unix.O_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	return &gate{fifo("up"), fifo("open")}
}

// pass is what a container's shell does.
const pass = "echo >/gate/up; read line </gate/open; "

// wait waits until n containers are there. Abandon makes it return early.
func (g *gate) wait(n int) error {
	buf := make([]byte, 1)
	for i := range n {
		if _, err := g.up.Read(buf); err != nil {
			return fmt.Errorf("%d of %d containers started: %w", i, n, err)
		}
	}
	return nil
}

func (g *gate) abandon() { _ = g.up.SetReadDeadline(time.Now()) }

func (g *gate) release(n int) error {
	_, err := g.open.Write(slices.Repeat([]byte("\n"), n))
	return err
}

// Containers start at once, run at once and end at once: each version has its own
// container's calls and nobody else's. As each ends, another starts under its
// version, and answers the same.
func TestParallel(t *testing.T) {
	each(t, func(t *testing.T, runtime string) {
		e := newEnv(t, runtime, "", byAnnotation)
		n := atOnce(t)
		e.extend(15 * time.Minute)
		dir := t.TempDir()
		g := newGate(t, dir)
		free := []string{"--security-opt", "seccomp=unconfined", "--volume", dir + ":/gate"}
		own := func(i int) []string { return []string{odd[i], odd[(i+1)%n]} }
		scripts := make([]string, n)
		for i := range n {
			scripts[i] = "exec odd"
			for _, call := range own(i) {
				nr, ok := seccomp.Number("SCMP_ARCH_X86_64", call)
				if !ok {
					t.Fatalf("no number of %s", call)
				}
				scripts[i] += fmt.Sprint(" ", nr)
			}
		}
		run := func(name, m, workload, script string) result {
			options := append(mode(m), "--annotation", "syslatch.dev/workload="+workload)
			r, err := podman(e.ctx, e.conf, runArgs(name, append(options, free...), "sh", "-c", script)...)
			if err != nil {
				return result{-1, r.stdout, err.Error() + ": " + r.stderr}
			}
			return r
		}

		recorded, enforced := make([]result, n), make([]result, n)
		published := make([]error, n)
		var wg sync.WaitGroup
		began := time.Now()
		for i := range n {
			wg.Go(func() {
				name := fmt.Sprintf("p%d", i)
				if recorded[i] = run(name, "record", name, pass+scripts[i]); recorded[i].code != 0 {
					g.abandon()
					return
				}
				published[i] = e.published(name)
				enforced[i] = run("again-"+name, "enforce", name, scripts[i])
			})
		}
		err := g.wait(n)
		up := time.Since(began)
		if err == nil {
			if st := e.stats(); st.Instances != n {
				err = fmt.Errorf("%d instances in the kernel, want %d", st.Instances, n)
			}
		}
		if err != nil {
			t.Error(err)
		}
		if err := g.release(n); err != nil {
			t.Error(err)
		}
		wg.Wait()
		e.settle()
		t.Logf("%d containers ran at once after %s, all had ended, and again, after %s", n, up, time.Since(began))

		for i := range n {
			name := fmt.Sprintf("p%d", i)
			if recorded[i].code != 0 || enforced[i].code != 0 || recorded[i].stdout != enforced[i].stdout {
				t.Errorf("%s: recorded %+v, published: %v, enforced %+v", name, recorded[i], published[i], enforced[i])
				continue
			}
			v := e.version(name, 1)
			for _, call := range odd {
				if want := slices.Contains(own(i), call); has(v, call) != want {
					t.Errorf("%s: has %s: %v, want %v", name, call, !want, want)
				}
			}
			if _, err := e.store().Version(name, 2); err == nil {
				t.Errorf("%s has two versions", name)
			}
			recs, err := e.store().Recordings(name)
			if err != nil || len(recs) != 1 || blocked(recs[0]) {
				t.Errorf("%s: recordings %+v, %v", name, recs, err)
			}
		}
		e.idle()
	})
}

// published waits for a version, and settle for the end of podman's cleanup
// processes, which run poststop. podman itself waits for its own, but no longer
// than 20 s after conmon's end: so many take longer where all is slow.
func (e *env) published(workload string) error {
	return poll(2*time.Minute, func() (bool, error) {
		s, err := store.Open(e.dir+"/store", store.Options{ReadOnly: true})
		if err != nil {
			return false, err
		}
		defer s.Close()
		_, err = s.Version(workload, 1)
		return err == nil, err
	})
}

func (e *env) settle() {
	e.t.Helper()
	err := poll(2*time.Minute, func() (bool, error) {
		all, err := filepath.Glob("/proc/[0-9]*/cmdline")
		if err != nil {
			return true, err
		}
		for _, path := range all {
			line, err := os.ReadFile(path)
			if err != nil {
				continue // it has ended
			}
			if args := strings.Split(string(line), "\x00"); slices.Contains(args, scratch+"/root") && slices.Contains(args, "cleanup") {
				return false, fmt.Errorf("still there: %q", args)
			}
		}
		return true, nil
	})
	if err != nil {
		e.t.Error(err)
	}
}

// blocked says whether a recording lost calls. Who made a call first may be lost
// where many end at once.
func blocked(rec *profiles.Recording) bool {
	return slices.ContainsFunc(rec.Losses, func(l profiles.Loss) bool { return l.Kind != profiles.LossFirstSeen })
}

// As many as issue the store's lock and the journal's at once.
func TestManyOfOneWorkload(t *testing.T) {
	each(t, func(t *testing.T, runtime string) {
		e := newEnv(t, runtime, "", byAnnotation)
		const n = 6
		options := append(mode("record"), "--annotation", "syslatch.dev/workload=shared")
		var wg sync.WaitGroup
		results := make([]result, n)
		began := time.Now()
		for i := range n {
			wg.Go(func() {
				results[i], _ = podman(context.WithoutCancel(e.ctx), e.conf, runArgs(fmt.Sprintf("s%d", i), options, "ls", "/")...)
			})
		}
		wg.Wait()
		e.settle()
		for _, r := range results {
			if r.code != 0 {
				t.Errorf("%+v", r)
			}
		}
		recs, err := e.store().Recordings("shared")
		if err != nil || len(recs) != n {
			t.Errorf("%d recordings, %v, want %d", len(recs), err, n)
		}
		for _, rec := range recs {
			if blocked(rec) {
				t.Errorf("recording %s lost %v", rec.ID, rec.Losses)
			}
		}
		t.Logf("%d containers in %s", n, time.Since(began))
		e.idle()
	})
}
