// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/internal/adjust"
	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/policy"
)

var alice, bob = policy.User{UID: 1000, Name: "alice"}, policy.User{UID: 1001}

const forUsers = `
- name: users
  match: {users: ["*"]}
  mode: "off"
  annotations: [mode, workload]
  allowedModes: [off, record, audit, enforce]
  failure: deny
`

// userHook is one run of a user's hook, whose pid is this process's.
func (w *world) userHook(u policy.User, stage func(*UserHooks) error) error {
	return w.hook(func(h *Hooks) error { return stage(&UserHooks{h, u, os.Getpid()}) })
}

func (w *world) userPrecreate(u policy.User, c *container) (plan *adjust.Plan, err error) {
	err = w.userHook(u, func(h *UserHooks) (err error) {
		plan, err = h.Plan(w.t.Context(), c.Container, adjust.Runtime{Adapter: adjust.AdapterHook})
		return err
	})
	if plan != nil && plan.Seccomp != nil {
		c.Seccomp = plan.Seccomp
	}
	return plan, err
}

func (w *world) userCreateRuntime(u policy.User, c *container) error {
	return w.userHook(u, func(h *UserHooks) error {
		return h.Created(w.t.Context(), c.ID, c.pid(), func() (policy.Container, adjust.Runtime, error) {
			return c.Container, adjust.Runtime{Adapter: adjust.AdapterHook}, nil
		})
	})
}

func (w *world) userPoststop(u policy.User, c *container) error {
	return w.userHook(u, func(h *UserHooks) error { return h.Stopped(w.t.Context(), c.ID) })
}

// owned is made, by a user's runtime.
func (c *container) owned(u policy.User) {
	c.made()
	c.w.host.mu.Lock()
	defer c.w.host.mu.Unlock()
	c.w.host.users[c.pid()] = u.UID
}

func (w *world) mustNot(err error, says string) {
	w.t.Helper()
	if err == nil || !strings.Contains(err.Error(), says) {
		w.t.Errorf("got %v, want %q", err, says)
	}
}

// Three containers of one id, root's and two users', know nothing of each other.
func TestUsersApart(t *testing.T) {
	w := newWorld(t, forHooks+forUsers)
	record := "syslatch.dev/mode=record"
	roots, alices, bobs := w.newContainer(1), w.newContainer(2, record), w.newContainer(3, record)
	alices.ID, bobs.ID = roots.ID, roots.ID
	if _, err := w.precreate(roots); err != nil {
		t.Fatal(err)
	}
	roots.made()
	if err := w.createRuntime(roots); err != nil {
		t.Fatal(err)
	}
	// Before hers is planned, there is nothing of this id for Alice.
	alices.owned(alice)
	if err := w.userPoststop(alice, alices); err != nil {
		t.Error(err)
	}
	for u, c := range map[*policy.User]*container{&alice: alices, &bob: bobs} {
		if plan, err := w.userPrecreate(*u, c); err != nil || plan == nil || plan.Workload != fmt.Sprintf("user@%d/%s", u.UID, workload) {
			t.Fatalf("%s: %+v, %v", u, plan, err)
		}
		c.owned(*u)
		if err := w.userCreateRuntime(*u, c); err != nil {
			t.Fatal(err)
		}
	}
	roots.exec("mkdir")
	alices.exec("rmdir")
	bobs.exec("rename")
	bobs.exit()
	if err := w.userPoststop(bob, bobs); err != nil {
		t.Fatal(err)
	}
	left := strings.Join(w.journalFiles(), " ")
	if !strings.Contains(left, "1000@c1.json") || !strings.Contains(left, " c1.json") || strings.Contains(left, "1001@") {
		t.Errorf("Bob's end left %s, want root's instance and Alice's", left)
	}
	alices.exit()
	if err := w.userPoststop(alice, alices); err != nil {
		t.Fatal(err)
	}
	roots.exit()
	if err := w.poststop(roots); err != nil {
		t.Fatal(err)
	}
	for name, call := range map[string]string{workload: "mkdir", "user@1000/" + workload: "rmdir", "user@1001/" + workload: "rename"} {
		v, err := w.openStore().Version(name, 1)
		if err != nil {
			t.Fatal(err)
		}
		for _, other := range []string{"mkdir", "rmdir", "rename"} {
			if got := v.Manifest.Calls.Has(x8664, other); got != (other == call) {
				t.Errorf("%s has %s: %v", name, other, got)
			}
		}
	}
	w.clean()
}

// What a user tells is believed of that user's own only.
func TestUserTells(t *testing.T) {
	w := newWorld(t, forHooks+forUsers)
	c := w.newContainer(1, "syslatch.dev/mode=record")
	for _, id := range []string{"../x", "1001@c1", "1000@c1", "", ".x", strings.Repeat("x", 129)} {
		named := *c
		named.ID = id
		_, err := w.userPrecreate(alice, &named)
		for _, err := range []error{
			err, w.userCreateRuntime(alice, &named), w.userPoststop(alice, &named),
			w.userHook(alice, func(h *UserHooks) error { return h.Started(t.Context(), id, 1) }),
		} {
			w.mustNot(err, "container id")
		}
	}

	// Somebody else's process.
	if _, err := w.userPrecreate(alice, c); err != nil {
		t.Fatal(err)
	}
	c.owned(bob)
	w.mustNot(w.userCreateRuntime(alice, c), "is not of a rootless container of alice (uid 1000)")
	w.clean()

	// An instance that says it is another's, should one ever get there.
	if _, err := w.userPrecreate(alice, c); err != nil {
		t.Fatal(err)
	}
	if err := w.hook(func(h *Hooks) error {
		in, err := h.load("1000@" + c.ID)
		if err != nil {
			return err
		}
		in.Container.User = &bob
		return h.a.journal.save(in)
	}); err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{w.userCreateRuntime(alice, c), w.userPoststop(alice, c)} {
		w.mustNot(err, "is not alice (uid 1000)'s")
	}
}

// A container whose processes can't be told from others is not recorded; to enforce
// takes no cgroup.
func TestUserWithoutCgroup(t *testing.T) {
	w := newWorld(t, forUsers)
	c := w.newContainer(1, "syslatch.dev/mode=record")
	record := func(own bool) error {
		if _, err := w.userPrecreate(alice, c); err != nil {
			t.Fatal(err)
		}
		c.owned(alice)
		if !own {
			delete(w.host.cgroups, c.pid())
		}
		return w.userCreateRuntime(alice, c)
	}
	w.mustNot(record(false), "no cgroup of its own (on cgroup v2, start it without --cgroups=disabled")
	w.clean()
	if err := record(true); err != nil {
		t.Fatal(err)
	}
	c.exec("mkdir")
	c.exit()
	if err := w.userPoststop(alice, c); err != nil {
		t.Fatal(err)
	}
	c.Annotations["syslatch.dev/mode"], c.Seccomp = "enforce", nil
	plan, err := w.userPrecreate(alice, c)
	if err != nil || plan.Version != 1 || plan.Seccomp == nil {
		t.Fatalf("%+v, %v", plan, err)
	}
	delete(w.host.cgroups, c.pid())
	if err := w.userCreateRuntime(alice, c); err != nil {
		t.Fatal(err)
	}
	if err := w.userHook(alice, func(h *UserHooks) error { return h.Started(t.Context(), c.ID, 1) }); err != nil {
		t.Error(err)
	}
	if err := w.userPoststop(alice, c); err != nil {
		t.Fatal(err)
	}
	w.clean()
}

// libseccomp isn't asked about a user's profile here.
func TestUserProfile(t *testing.T) {
	w := newWorld(t, forUsers)
	c := w.newContainer(1, "syslatch.dev/mode=record")
	c.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Syscalls: []specs.LinuxSyscall{{Names: []string{"read"}, Action: specs.ActAllow}}}
	err := w.userHook(alice, func(h *UserHooks) error {
		h.h.a.check = func(*specs.LinuxSeccomp) error { return errors.New("asked") }
		plan, err := h.Plan(t.Context(), c.Container, adjust.Runtime{Adapter: adjust.AdapterHook})
		if err == nil && !plan.Record {
			t.Errorf("plan %+v", plan)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// Who asks for what isn't there is told; who doesn't is left alone.
func TestUserAsks(t *testing.T) {
	const none = `
- name: bob
  match: {users: [1001]}
  mode: "off"
- name: all
  match: {}
  mode: record
`
	const trace = policy.AnnotationTrace + "=of:/tmp/x"
	for name, c := range map[string]struct {
		u          policy.User
		annotation string
		trace      policy.TraceSyscall
		says       string
	}{
		"no policy, asks":   {alice, "syslatch.dev/mode=record", policy.TraceRefuse, "no policy of syslatchd's is for this rootless container of alice (uid 1000)"},
		"no policy":         {alice, "x=y", policy.TraceRefuse, ""},
		"trace":             {bob, trace, policy.TraceRefuse, "not served to rootless containers"},
		"trace, to root":    {bob, trace, policy.TraceServe, "not served to rootless containers"},
		"trace, no policy":  {alice, trace, policy.TraceServe, "not served to rootless containers"},
		"trace, another's":  {bob, trace, policy.TraceIgnore, ""},
		"trace, another's2": {alice, trace, policy.TraceIgnore, ""},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, none)
			w.policy.Hook.TraceSyscall, w.policy.Hook.TraceDirectories = c.trace, []string{"/tmp"}
			plan, err := w.userPrecreate(c.u, w.newContainer(1, c.annotation))
			if plan != nil || (err == nil) != (c.says == "") || err != nil && !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %+v, %v, want %q", plan, err, c.says)
			}
			w.clean()
		})
	}
}

// One user can't have everything.
func TestUserHasTooMany(t *testing.T) {
	w := newWorld(t, forUsers)
	for n := range maxOfUser {
		if _, err := w.userPrecreate(alice, w.newContainer(n, "syslatch.dev/mode=record")); err != nil {
			t.Fatal(err)
		}
	}
	more := w.newContainer(maxOfUser, "syslatch.dev/mode=record")
	_, err := w.userPrecreate(alice, more)
	w.mustNot(err, "alice (uid 1000) has 128 containers that syslatchd looks after")
	more.owned(alice)
	w.mustNot(w.userCreateRuntime(alice, more), "alice (uid 1000) has 128 containers") // without precreate
	if _, err := w.userPrecreate(bob, more); err != nil {
		t.Error("another user:", err)
	}
	if plan, err := w.userPrecreate(alice, w.newContainer(maxOfUser)); plan != nil || err != nil {
		t.Errorf("one that is left alone: %+v, %v", plan, err)
	}
	if _, err := w.userPrecreate(alice, w.newContainer(0, "syslatch.dev/mode=record")); err != nil {
		t.Error("again:", err)
	}
}

func TestIDMap(t *testing.T) {
	for text, want := range map[string]struct{ root, user bool }{
		"":                              {false, false},
		"0 0 4294967295\n":              {true, true},
		"         0       1000      1":  {false, true},
		"0 1000 1\n1 100000 65536\n":    {false, true},
		"0 100000 65536\n":              {false, false},
		"0 999 1\n1 1001 1\n":           {false, false},
		"0 4294967295 1\n1 1000 1":      {false, true},
		"0 1000 0\n":                    {false, false},
		"0 4294967290 4294967295\n":     {false, false}, // no id wraps around
		"0 1 999\n1000 1000 1\n5 0 1\n": {true, true},
	} {
		m, err := parseIDMap(text)
		if err != nil || m.has(0) != want.root || m.has(1000) != want.user {
			t.Errorf("%q: %v, %v", text, m, err)
		}
	}
	for _, text := range []string{"0 0", "a b c", "-1 0 1", "0 0 4294967296"} {
		if m, err := parseIDMap(text); err == nil {
			t.Errorf("%q: got %v", text, m)
		}
	}
}

// The kernel's word on whose a process and its cgroup are.
func TestCgroupOfUser(t *testing.T) {
	needRoot(t)
	h := detect(t)
	u := policy.User{UID: 59911}
	mine := &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER, UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: int(u.UID), Size: 1}, {ContainerID: 1, HostID: 700000, Size: 10}}}
	others := &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER, UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 59912, Size: 1}}}
	roots := &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER, UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 60000}}}
	hosts := &syscall.SysProcAttr{}
	usersOnHost := &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: u.UID, Gid: u.UID}}
	start := func(attr *syscall.SysProcAttr, g *cgroup.Group, below string) int {
		t.Helper()
		dir, err := os.Open(filepath.Join(g.Path(), below))
		if err != nil {
			t.Fatal(err)
		}
		defer dir.Close()
		a := *attr
		a.UseCgroupFD, a.CgroupFD = true, int(dir.Fd())
		if attr.Cloneflags != 0 {
			a.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: int(u.UID), Size: 1}}
		}
		cmd := exec.Command("/bin/cat")
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		cmd.SysProcAttr = &a
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { in.Close(); _ = cmd.Wait() })
		return cmd.Process.Pid
	}
	group := func(uid int) *cgroup.Group {
		t.Helper()
		g := newGroup(t)
		if err := os.Chown(g.Path(), uid, 0); err != nil {
			t.Fatal(err)
		}
		return g
	}
	own := int(u.UID)
	good := group(own)
	pid := start(mine, good, "")
	if id, err := h.CgroupOfUser(pid, u, os.Getpid()); err != nil || id != good.ID() {
		t.Errorf("got %d, %v, want %d", id, err, good.ID())
	}
	subordinate := group(700003)
	if id, err := h.CgroupOfUser(start(mine, subordinate, ""), u, os.Getpid()); err != nil || id != subordinate.ID() {
		t.Errorf("a subordinate id's: %d, %v", id, err)
	}
	refused := func(name string, pid, hook int, noCgroup bool, says string) {
		t.Helper()
		_, err := h.CgroupOfUser(pid, u, hook)
		if err == nil || errors.Is(err, errNoOwnCgroup) != noCgroup || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: got %v, want %q", name, err, says)
		}
	}
	for name, attr := range map[string]*syscall.SysProcAttr{"another user's": others, "root's": roots, "the host's": hosts, "the user's, on the host": usersOnHost} {
		refused(name+" process", start(attr, group(own), ""), os.Getpid(), false, "is not of a rootless container of uid 59911")
		g := group(own)
		pid := start(mine, g, "")
		start(attr, g, "")
		refused("with "+name+" process", pid, os.Getpid(), true, "is not of a rootless container of uid 59911")
	}
	for name, uid := range map[string]int{"root's": 0, "another user's": 59912} {
		refused(name+" cgroup", start(mine, group(uid), ""), os.Getpid(), true, fmt.Sprintf("is of uid %d, not of uid 59911", uid))
	}
	g := group(own)
	pid = start(mine, g, "")
	refused("the hook's cgroup", pid, start(mine, g, ""), true, "the hook runs in "+g.Path()+", too")
	if err := os.Mkdir(filepath.Join(g.Path(), "below"), 0o755); err != nil {
		t.Fatal(err)
	}
	refused("the hook below", pid, start(mine, g, "below"), true, "the hook runs in "+g.Path()+", too")
	g = group(own)
	if err := os.Mkdir(filepath.Join(g.Path(), "below"), 0o755); err != nil {
		t.Fatal(err)
	}
	pid = start(mine, g, "")
	start(hosts, g, "below")
	refused("a process of the host's below", pid, os.Getpid(), true, "is not of a rootless container")

	gone := exec.Command("/bin/true")
	if err := gone.Run(); err != nil {
		t.Fatal(err)
	}
	if _, err := h.CgroupOfUser(gone.Process.Pid, u, os.Getpid()); !errors.Is(err, cgroup.ErrGone) {
		t.Errorf("a process that has ended: %v", err)
	}
}

// Stages of one id at once, for containers in two cgroups: no slot of the kernel's is
// left that the journal doesn't know.
func TestUserStagesAtOnce(t *testing.T) {
	for range 20 {
		w := newWorld(t, forUsers)
		first, second := w.newContainer(1, "syslatch.dev/mode=record"), w.newContainer(2, "syslatch.dev/mode=record")
		second.ID = first.ID
		done := make(chan error, 2)
		for _, c := range []*container{first, second} {
			c.owned(alice)
			go func() { done <- w.userCreateRuntime(alice, c) }()
			c.exit()
		}
		for range 2 {
			if err := <-done; err != nil {
				t.Log(err) // the other's is in its place
			}
		}
		if err := w.userPoststop(alice, first); err != nil {
			t.Error(err)
		}
		w.clean()
	}
}
