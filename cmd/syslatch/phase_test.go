// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/sirupsen/logrus"

	"github.com/syslatch/syslatch/internal/api"
	"github.com/syslatch/syslatch/internal/api/apitest"
	"github.com/syslatch/syslatch/internal/phase"
)

// Two containers whose IDs begin alike, and a run.
const (
	webID = "4f2a91c0ffee4f2a91c0ffee4f2a91c0ffee4f2a91c0ffee4f2a91c0ffee4f2a"
	dbID  = "4f2b0000000000000000000000000000000000000000000000000000000000db"
)

func supervised() *apitest.Supervisor {
	web := apitest.Instance(webID, "web\x1b[2J")
	web.Uncovered = []string{"files that were opened for writing stay writable"}
	web.Denied = 3
	return apitest.New(web, apitest.Instance(dbID, "db"), apitest.Instance("run-77", ""))
}

// serveAPI serves at socket until the test ends; stop ends it earlier.
func serveAPI(t *testing.T, socket string, s *apitest.Supervisor) (stop func()) {
	t.Helper()
	l, err := api.Listen(socket, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	logger := logrus.New()
	logger.SetOutput(io.Discard)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := (&api.Server{Phases: s, Events: s, Log: logrus.NewEntry(logger)}).Serve(ctx, l); err != nil {
			t.Error(err)
		}
	}()
	stop = func() {
		cancel()
		<-done
	}
	t.Cleanup(stop)
	return stop
}

// TestVerify: exit status and text tell whether phases hold.
func TestVerify(t *testing.T) {
	lost := apitest.Instance(dbID, "db\x1b[2J")
	lost.State, lost.Uncovered = phase.Degraded, []string{"the listener is \x1b[2J lost"}
	ended := apitest.Instance("run-78", "")
	ended.State = phase.Ended
	for _, tc := range []struct {
		name      string
		instances []phase.Status
		args      []string
		code      int
		stdout    string
		stderr    string
	}{
		{"none", nil, nil, 0, "", ""},
		{"all hold", supervised().List()[:1], nil, 0, "4f2a91c0ffee read_only: holds\n- files that were opened for writing stay writable\n", ""},
		{
			"one doesn't",
			[]phase.Status{apitest.Instance("run-77", ""), lost},
			nil, 4,
			"4f2b00000000 read_only: degraded\n- \"the listener is \\x1b[2J lost\"\nrun-77 read_only: holds\n", "1 of 2 instances are not in a phase that holds",
		},
		{"one has ended", []phase.Status{apitest.Instance("run-77", ""), ended}, nil, 0, "run-78 read_only: ended\n", ""},
		{"another", []phase.Status{apitest.Instance("run-77", ""), lost}, []string{"run-77"}, 0, "run-77 read_only: holds\n", ""},
		{"as JSON", []phase.Status{lost}, []string{"-o", "json"}, 4, `"state": "degraded"`, "1 of 1"},
		{"unknown", nil, []string{"x"}, 1, "", "no such instance"},
		{"too many", nil, []string{"x", "y"}, 2, "", "at most 1 arg"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			socket := filepath.Join(t.TempDir(), "s")
			t.Setenv(socketVariable, socket)
			serveAPI(t, socket, apitest.New(tc.instances...))
			r := syslatch(t, append([]string{"verify"}, tc.args...)...)
			if r.code != tc.code || !strings.Contains(r.stdout, tc.stdout) || !strings.Contains(r.stderr, tc.stderr) || (r.stderr == "") != (tc.code == 0) {
				t.Errorf("%+v, want %d", r, tc.code)
			}
			if strings.ContainsRune(r.stdout+r.stderr, '\x1b') {
				t.Errorf("a name reached the terminal: %q", r.stdout)
			}
		})
	}
}

func TestPhase(t *testing.T) {
	t.Setenv("TZ", "UTC")
	s := supervised()
	socket := filepath.Join(t.TempDir(), "s")
	t.Setenv(socketVariable, socket)
	s.OnSet = func(_ context.Context, a apitest.Asked) error {
		status, _ := s.Get(a.ID)
		if a.To == "stuck" {
			status.Phase, status.Generation, status.State, status.Uncovered = a.To, 2, phase.Degraded, []string{"pid 12 sleeps uninterruptibly"}
			return &phase.IncompleteError{Status: status, Err: context.DeadlineExceeded}
		}
		return nil
	}
	serveAPI(t, socket, s)
	for _, tc := range []struct {
		name   string
		args   []string
		code   int
		stdout []string
		stderr string
	}{
		{"list", []string{"list"}, 0, []string{
			"INSTANCE      NAME          WORKLOAD                             PHASE      STATE   GENERATION  SINCE\n",
			`4f2a91c0ffee  "web\x1b[2J"  `, "holds+  1           2026-11-26 12:00:00\n", "run-77        -  ",
		}, ""},
		{"list as JSON", []string{"list", "-o", "json"}, 0, []string{`"id": "` + dbID + `"`}, ""},
		{"get", []string{"get", "4f2a"}, 0, []string{
			"instance    " + webID + "\n", "phase       read_only\nstate       holds\ngeneration  1\nsince       2026-11-26T12:00:00Z\nnext        write_logs network locked\ndenied      3 calls\n",
			"Not enforced:\n- files that were opened for writing stay writable\n",
		}, ""},
		{"get as JSON", []string{"get", "run-", "-o", "json"}, 0, []string{`"id": "run-77"`, `"uncovered": []`}, ""},
		{"ambiguous", []string{"get", "4f2"}, 1, nil, "2 instances begin with \"4f2\", say more of it: " + webID + ", " + dbID},
		{"unknown", []string{"get", "web"}, 1, nil, `no such instance: "web" ('syslatch phase list' shows what there is`},
		{"set", []string{"set", "4f2b", "network"}, 0, []string{"4f2b00000000 network: holds, generation 2\n"}, ""},
		{"refused", []string{"set", "run-77", "nowhere"}, 3, nil, "switch from read_only to nowhere: unknown phase (possible from here: write_logs, network, locked)"},
		{"no name", []string{"set", "run-77", "no where"}, 1, nil, "is no name of a phase"},
		{"generation", []string{"set", "run-77", "network", "--generation", "7"}, 3, nil, "generation is 1, not 7: the phase was switched meanwhile; look at it again"},
		{"set with generation", []string{"set", "4f2b", "locked", "--generation", "2", "-o", "json"}, 0, []string{`"phase": "locked"`, `"generation": 3`}, ""},
		{"incomplete", []string{"set", "run-77", "stuck"}, 4, nil, "phase stuck does not hold for every task: context deadline exceeded (pid 12 sleeps uninterruptibly)"},
		{"incomplete as JSON", []string{"set", "run-77", "stuck", "-o", "json"}, 4, []string{`"state": "degraded"`, `"pid 12 sleeps uninterruptibly"`}, "does not hold for every task"},

		{"no instance", []string{"set"}, 2, nil, "say which instance (see 'syslatch phase set --help')"},
		{"no phase", []string{"set", "x"}, 2, nil, "say which phase"},
		{"too many", []string{"get", "x", "y"}, 2, nil, "too many arguments"},
		{"timeout", []string{"set", "x", "y", "--timeout", "0s"}, 2, nil, "--timeout 0s: want more than 0"},
		{"long timeout", []string{"set", "x", "y", "--timeout", "2m"}, 2, nil, "at most 1m0s"},
		{"generation 0", []string{"set", "x", "y", "--generation", "0"}, 2, nil, "generations count from 1"},
		{"output", []string{"list", "-o", "yaml"}, 2, nil, "want text or json"},
		{"nobody", []string{"list", "--socket", socket + ".not"}, 1, nil, "nobody listens there"},
		{"what then", []string{"list", "--socket", socket + ".not"}, 1, nil, "syslatch run --policy FILE --api-socket PATH"},
	} {
		r := syslatch(t, append([]string{"phase"}, tc.args...)...)
		if r.code != tc.code || !strings.Contains(r.stderr, tc.stderr) || (r.stderr == "") != (tc.code == 0) || tc.stdout == nil && r.stdout != "" {
			t.Errorf("%s: %+v, want %d and %q", tc.name, r, tc.code, tc.stderr)
		}
		for _, want := range tc.stdout {
			if !strings.Contains(r.stdout, want) {
				t.Errorf("%s: no %q in\n%s", tc.name, want, r.stdout)
			}
		}
		if strings.ContainsRune(r.stdout+r.stderr, '\x1b') {
			t.Errorf("%s: a name reached the terminal: %q", tc.name, r.stdout)
		}
	}
	if os.Getuid() == 0 {
		r := syslatchAs(t, &syscall.Credential{Uid: 65534, Gid: 65534}, "phase", "list")
		if r.code != 1 || !strings.Contains(r.stderr, "permission denied (the API is root's: use sudo)") {
			t.Errorf("as nobody: %+v", r)
		}
	}
}

// What time cures is waited for: the socket, the instance, and a switch that is not
// finished, but not over somebody else's.
func TestPhaseSetWaits(t *testing.T) {
	s := apitest.New()
	socket := filepath.Join(t.TempDir(), "s")
	set := start(t, "phase", "set", "run-9", "network", "--wait", "--timeout", "20s", "--socket", socket)
	serveAPI(t, socket, s)
	var attempts atomic.Int32
	s.OnSet = func(_ context.Context, a apitest.Asked) error {
		status, _ := s.Get(a.ID)
		status.Generation = 1
		status.Uncovered = []string{"pid 12"}
		if attempts.Add(1) < 3 {
			return &phase.IncompleteError{Status: status, Err: errors.New("not frozen yet")}
		}
		return nil
	}
	s.Begin(apitest.Instance("run-9", ""))
	if code := set.end(); code != 0 || !strings.Contains(strings.Join(set.seen, "\n"), "run-9 network: holds, generation 2") {
		t.Errorf("exit %d: %q", code, set.seen)
	}
	asked := s.Asked()
	if len(asked) != 3 || asked[0].Options.Generation != 0 || asked[1].Options.Generation != 1 || asked[2].Options.Generation != 1 {
		t.Errorf("%+v", asked)
	}
	if r := syslatch(t, "phase", "set", "run-8", "network", "--wait", "--timeout", "50ms", "--socket", socket); r.code != 1 || !strings.Contains(r.stderr, "no such instance") {
		t.Errorf("%+v", r)
	}
	if r := syslatch(t, "phase", "set", "run-9", "nowhere", "--wait", "--timeout", "1h", "--socket", socket); r.code != 3 {
		t.Errorf("%+v", r)
	}
}

func TestPhaseWatch(t *testing.T) {
	s := supervised()
	socket := filepath.Join(t.TempDir(), "s")
	stop := serveAPI(t, socket, s)

	one := start(t, "phase", "watch", "run-", "--socket", socket)
	all := start(t, "phase", "watch", "-o", "json", "--socket", socket)
	interrupted := start(t, "phase", "watch", "--socket", socket)
	s.AwaitWatchers(3)
	s.Emit(phase.Event{Time: apitest.Time, Kind: phase.Denied, Instance: webID, From: "read_only", Count: 2, Call: "SCMP_ARCH_X86_64 mkdir", PID: 12})
	s.Emit(phase.Event{Time: apitest.Time, Kind: phase.Denied, Instance: webID, From: "read_only", Count: 3, Call: "lsm/file_open"})
	s.Emit(phase.Event{Time: apitest.Time, Kind: phase.Refused, Instance: "run-77", From: "read_only", To: "network", Origin: phase.Inside, By: "uid 5 pid 6", Message: "\x1b[2J"})
	s.End("run-77")
	if code := one.end(); code != 0 || len(one.seen) != 2 || strings.ContainsRune(one.seen[0], '\x1b') ||
		!strings.HasSuffix(one.seen[0], `  refused   run-77  read_only -> network  (inside, uid 5 pid 6)  "\x1b[2J"`) {
		t.Errorf("exit %d: %q", code, one.seen)
	}
	for _, want := range []string{"2 SCMP_ARCH_X86_64 mkdir in read_only, pid 12", "3 lsm/file_open in read_only"} {
		if line := interrupted.await(want); !strings.HasSuffix(line, want) {
			t.Errorf("%q, want it to end with %q", line, want)
		}
	}
	interrupted.signal(syscall.SIGINT)
	if code := interrupted.end(); code != 0 {
		t.Errorf("exit %d: %q", code, interrupted.seen)
	}
	var e phase.Event
	if err := json.Unmarshal([]byte(all.await("denied")), &e); err != nil || e.Instance != webID || e.Count != 2 {
		t.Errorf("%+v, %v", e, err)
	}
	all.await("ended")
	stop()
	if code := all.end(); code != 1 || !strings.Contains(strings.Join(all.seen, "\n"), "the stream has ended: its supervisor has stopped") {
		t.Errorf("exit %d: %q", code, all.seen)
	}
}

func TestPhaseCompletion(t *testing.T) {
	s := supervised()
	socket := filepath.Join(t.TempDir(), "s")
	serveAPI(t, socket, s)
	s.End(dbID)
	for _, tc := range []struct {
		args []string
		want string
	}{
		{[]string{"set", ""}, webID + "\t\"web\\x1b[2J in read_only\"\nrun-77\tin read_only\n:4\n"},
		{[]string{"get", "run"}, "run-77\tin read_only\n:4\n"},
		{[]string{"get", "run-77", ""}, ":4\n"},
		{[]string{"set", "run-77", ""}, "write_logs\nnetwork\nlocked\n:4\n"},
		{[]string{"set", "run-77", "n"}, "network\n:4\n"},
		{[]string{"set", "run-77", "network", ""}, ":4\n"},
		{[]string{"watch", "run"}, "run-77\tin read_only\n:4\n"},
	} {
		r := syslatch(t, append([]string{"__complete", "phase", tc.args[0], "--socket", socket}, tc.args[1:]...)...)
		if r.code != 0 || r.stdout != tc.want {
			t.Errorf("%q: %+v, want %q", tc.args, r, tc.want)
		}
	}
	if r := syslatch(t, "__complete", "phase", "get", "--socket", socket+".not", ""); r.code != 0 || r.stdout != ":4\n" {
		t.Errorf("nobody listens: %+v", r)
	}
}
