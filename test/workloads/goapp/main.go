// SPDX-License-Identifier: Apache-2.0

// Command goapp is a Go workload: threads, network, files, child processes. It
// prints the same lines on every run.
//
// What the Go runtime calls depends on time: it preempts by signals, gives
// memory back and parks threads when it sees fit. goapp makes it do each of these
// at least once, so that two runs of it make the same set of calls.
package main

import (
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == "child" {
		data, err := io.ReadAll(os.Stdin)
		if err != nil {
			fatal(err)
		}
		fmt.Print(strings.ToUpper(string(data)))
		return
	}
	for _, part := range []func() (string, error){threads, network, files, children, preempted} {
		line, err := part()
		if err != nil {
			fatal(err)
		}
		fmt.Println(line)
	}
}

func fatal(err error) {
	fmt.Fprintln(os.Stderr, "goapp:", err)
	os.Exit(1)
}

// threads keeps eight system threads busy at once.
func threads() (string, error) {
	var sum atomic.Int64
	var all, started sync.WaitGroup
	started.Add(8)
	for i := range 8 {
		all.Go(func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			started.Done()
			started.Wait()
			for j := range 100_000 {
				sum.Add(int64(i * j % 7))
			}
		})
	}
	all.Wait()
	return fmt.Sprint("threads ", sum.Load()), nil
}

func network() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%x", sha256.Sum256([]byte(r.URL.Path)))
	})}
	go s.Serve(l) //nolint:errcheck // ends with Close
	defer s.Close()
	sum := sha256.New()
	for i := range 50 {
		r, err := http.Get(fmt.Sprintf("http://%s/%d", l.Addr(), i))
		if err != nil {
			return "", err
		}
		_, err = io.Copy(sum, r.Body)
		r.Body.Close()
		if err != nil {
			return "", err
		}
	}
	return fmt.Sprintf("network %x", sum.Sum(nil)), nil
}

func files() (string, error) {
	dir, err := os.MkdirTemp("", "goapp-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	for i := range 20 {
		path := filepath.Join(dir, fmt.Sprint(i))
		if err := os.WriteFile(path+".new", []byte(strings.Repeat("x", i)), 0o600); err != nil {
			return "", err
		}
		if err := os.Rename(path+".new", path); err != nil {
			return "", err
		}
	}
	entries, err := os.ReadDir(dir)
	return fmt.Sprint("files ", len(entries)), err
}

func children() (string, error) {
	var out []string
	for i := range 3 {
		cmd := exec.Command("/proc/self/exe", "child")
		cmd.Stdin = strings.NewReader(fmt.Sprintf("child %d", i))
		b, err := cmd.Output()
		if err != nil {
			return "", err
		}
		out = append(out, string(b))
	}
	return strings.Join(out, ", "), nil
}

// preempted runs loops that only a signal can interrupt while the collector
// wants the world to stop, then gives all memory back.
func preempted() (string, error) {
	var all sync.WaitGroup
	var stop atomic.Bool
	for range 2 * runtime.GOMAXPROCS(0) {
		all.Go(func() {
			for !stop.Load() { // no function call, so no voluntary yield
			}
		})
	}
	end := time.Now().Add(300 * time.Millisecond)
	for time.Now().Before(end) {
		runtime.GC()
	}
	stop.Store(true)
	all.Wait()
	debug.FreeOSMemory()
	return "preempted", nil
}
