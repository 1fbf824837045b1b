// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/bpf"
)

func openEnforcer(t testing.TB, dir string, opts bpf.EnforcerOptions) *bpf.Enforcer {
	t.Helper()
	needRoot(t)
	e, err := bpf.OpenEnforcer(dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	return e
}

// add puts a cgroup under phases. What is missing here is not asked for: tests of that
// are for kernels where it isn't.
func add(t testing.TB, e *bpf.Enforcer, cg cgroup, set bpf.PhaseSet, opts bpf.EnforceOptions) bpf.PhaseHandle {
	t.Helper()
	dir, err := os.Open(cg.path)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	opts.Dir, opts.Partial = dir, true
	h, err := e.Add(cg.id, set, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Remove(h); err != nil && !errors.Is(err, bpf.ErrUnknown) && !errors.Is(err, os.ErrClosed) {
			t.Error(err)
		}
	})
	return h
}

func set(t testing.TB, e *bpf.Enforcer, h bpf.PhaseHandle, phase uint8) {
	t.Helper()
	if err := e.Set(h, phase); err != nil {
		t.Fatal(err)
	}
}

// bpfLSM says whether this kernel has BPF LSM: it must where bpf is in the list of
// active modules, and on the guests' kernels in any case.
func bpfLSM(t testing.TB) bool {
	t.Helper()
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	if strings.HasSuffix(unix.ByteSliceToString(u.Release[:]), "-cloud-amd64") {
		return true
	}
	list, err := os.ReadFile("/sys/kernel/security/lsm")
	return err == nil && slices.Contains(strings.Split(string(list), ","), "bpf")
}

func needLSM(t testing.TB) {
	t.Helper()
	needRoot(t)
	if !bpfLSM(t) {
		t.Skip("this kernel has no BPF LSM (TestPhaseMissing checks that it says so); test/vm/run has kernels that do")
	}
}

// kernelBefore compares the kernel's version.
func kernelBefore(t testing.TB, major, minor int) bool {
	t.Helper()
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	var a, b int
	if _, err := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &a, &b); err != nil {
		t.Fatal(err)
	}
	return a < major || a == major && b < minor
}

// Each program is loaded by itself, and what a kernel refuses is named.
func TestPhaseMissing(t *testing.T) {
	e := openEnforcer(t, pinDir(t), bpf.EnforcerOptions{})
	missing := e.Missing()
	lsm := bpfLSM(t)
	for name, err := range missing {
		t.Logf("%s: %v", name, err)
		switch {
		case !errors.Is(err, bpf.ErrUnsupported):
			t.Errorf("%s is missing for no known reason: %v", name, err)
		case strings.HasPrefix(name, "cgroup/"), lsm && !(name == "lsm/file_truncate" && kernelBefore(t, 6, 2)):
			t.Errorf("%s is missing, and this kernel should have it: %v", name, err)
		case !lsm && !errors.Is(err, unix.EPERM):
			t.Errorf("%s: %v, want that the kernel does not allow it", name, err)
		}
	}
	if !lsm && len(missing) != 15 {
		t.Errorf("%d programs are missing on a kernel without BPF LSM, want all 15", len(missing))
	}
	if lsm {
		return
	}
	// What can't be enforced is refused, by name, unless that is asked for.
	cg := newCgroup(t)
	rules := bpf.AnyPhase()
	rules.OpenWrite = false
	_, err := e.Add(cg.id, bpf.PhaseSet{0: rules}, bpf.EnforceOptions{})
	var lack *bpf.MissingError
	if !errors.As(err, &lack) || !errors.Is(err, bpf.ErrUnsupported) || !slices.Equal(lack.Programs, []string{"lsm/file_open", "lsm/inode_create"}) {
		t.Errorf("Add: %v", err)
	}
}

// fewCapabilities opens an enforcer with what the daemon's unit leaves, and tells what
// is missing.
func fewCapabilities(out io.Writer) error {
	runtime.LockOSThread() // for good
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	for _, c := range []int{unix.CAP_BPF, unix.CAP_PERFMON} {
		data[c/32].Effective |= 1 << (c % 32)
		data[c/32].Permitted |= 1 << (c % 32)
	}
	if err := unix.Capset(&header, &data[0]); err != nil {
		return err
	}
	e, err := bpf.OpenEnforcer("", bpf.EnforcerOptions{NoPin: true})
	if err != nil {
		return err
	}
	missing := map[string]string{}
	for name, err := range e.Missing() {
		missing[name] = err.Error()
	}
	return errors.Join(json.NewEncoder(out).Encode(missing), e.Close())
}

// What a process may not load is named, with what it takes, and the rest is there.
func TestPhaseCapabilities(t *testing.T) {
	needRoot(t)
	p := start(t, nil, "few capabilities", nil)
	var missing map[string]string
	p.line(&missing)
	p.wait()
	for _, name := range []string{"cgroup/connect4", "cgroup/connect6", "cgroup/sendmsg4", "cgroup/sendmsg6"} {
		if !strings.Contains(missing[name], "CAP_NET_ADMIN") {
			t.Errorf("%s: %q", name, missing[name])
		}
		delete(missing, name)
	}
	delete(missing, "lsm/file_truncate")
	if bpfLSM(t) && len(missing) > 0 {
		t.Errorf("missing: %v", missing)
	}
}

func TestPhaseArguments(t *testing.T) {
	e := openEnforcer(t, "", bpf.EnforcerOptions{NoPin: true})
	cg := newCgroup(t)
	with := func(change func(*bpf.PhaseRules)) bpf.PhaseSet {
		r := bpf.AnyPhase()
		change(&r)
		return bpf.PhaseSet{0: r}
	}
	to := func(list ...bpf.Destination) bpf.PhaseSet {
		return with(func(r *bpf.PhaseRules) { r.Destinations = &bpf.Destinations{Prefixes: list} })
	}
	var ports, prefixes []bpf.Destination
	for i := range uint16(bpf.MaxPorts + 1) {
		ports = append(ports, bpf.Destination{netip.MustParsePrefix("10.0.0.0/8"), i + 1})
	}
	for i := range bpf.MaxDestinations + 1 {
		prefixes = append(prefixes, bpf.Destination{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24), 0})
	}
	trees := func(list ...string) bpf.PhaseSet {
		return with(func(r *bpf.PhaseRules) { r.WriteTrees = list })
	}
	for _, tc := range []struct {
		set  bpf.PhaseSet
		opts bpf.EnforceOptions
		want string
	}{
		{nil, bpf.EnforceOptions{}, "no phases"},
		{bpf.PhaseSet{8: bpf.AnyPhase()}, bpf.EnforceOptions{Phase: 8}, "phase 8: give one below 8"},
		{bpf.PhaseSet{1: bpf.AnyPhase()}, bpf.EnforceOptions{}, "first phase 0 is none"},
		{trees("var"), bpf.EnforceOptions{}, "no absolute clean path"},
		{trees("/var/"), bpf.EnforceOptions{}, "no absolute clean path"},
		{trees("/var/../etc"), bpf.EnforceOptions{}, "no absolute clean path"},
		{trees("/var//log"), bpf.EnforceOptions{}, "no absolute clean path"},
		{trees("/" + strings.Repeat("x", bpf.MaxTreeLength)), bpf.EnforceOptions{}, "at most 245 bytes"},
		{trees(slices.Repeat([]string{"/x"}, bpf.MaxTrees+1)...), bpf.EnforceOptions{}, "65 trees"},
		{to(ports...), bpf.EnforceOptions{}, "17 ports: give at most 16"},
		{to(prefixes...), bpf.EnforceOptions{}, "257 destinations"},
		{to(bpf.Destination{Prefix: netip.PrefixFrom(netip.MustParseAddr("10.0.0.1"), 8)}), bpf.EnforceOptions{}, "is no prefix"},
		{to(bpf.Destination{}), bpf.EnforceOptions{}, "is no prefix"},
	} {
		tc.opts.Partial = true
		if _, err := e.Add(cg.id, tc.set, tc.opts); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("error %v, want one with %q", err, tc.want)
		}
	}
	for _, opts := range []bpf.EnforcerOptions{{Instances: -1}, {Trees: 1 << 25}} {
		if _, err := bpf.OpenEnforcer("", opts); err == nil || !strings.Contains(err.Error(), "give a number") {
			t.Errorf("OpenEnforcer(%+v): %v", opts, err)
		}
	}
	// Nothing of what was refused is left.
	h := add(t, e, cg, to(ports[:bpf.MaxPorts]...), bpf.EnforceOptions{})
	for _, phase := range []uint8{1, 8, 9, 255} {
		if err := e.Set(h, phase); err == nil || !strings.Contains(err.Error(), "none of its phases") {
			t.Errorf("Set(%d): %v", phase, err)
		}
	}
	if _, err := e.Add(cg.id, to(), bpf.EnforceOptions{Partial: true}); !errors.Is(err, bpf.ErrTracked) {
		t.Errorf("a second Add: %v", err)
	}
	if err := e.Remove(h); err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{e.Set(h, 0), e.Remove(h), e.AddCgroup(h, cg.id)} {
		if !errors.Is(err, bpf.ErrUnknown) {
			t.Errorf("after Remove: %v", err)
		}
	}
	if _, err := e.Denials(h); !errors.Is(err, bpf.ErrUnknown) {
		t.Errorf("after Remove: %v", err)
	}
}

// reach are the rules of a phase that reaches some destinations: "unix", or a prefix
// and a port.
func reach(list ...any) bpf.PhaseRules {
	r := bpf.AnyPhase()
	r.Destinations = &bpf.Destinations{}
	for i := 0; i < len(list); i++ {
		if list[i] == "unix" {
			r.Destinations.Unix = true
			continue
		}
		r.Destinations.Prefixes = append(r.Destinations.Prefixes, bpf.Destination{netip.MustParsePrefix(list[i].(string)), uint16(list[i+1].(int))})
		i++
	}
	return r
}

// server listens at an address for TCP and UDP, and takes what comes.
type server struct {
	port int
	tcp  net.Listener
}

func serve(t testing.TB, host string) server {
	t.Helper()
	l, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		t.Fatal(err)
	}
	port := l.Addr().(*net.TCPAddr).Port
	u, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.ParseIP(host), Port: port})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close(); u.Close() })
	return server{port, l}
}

const (
	inet, inet6   = unix.AF_INET, unix.AF_INET6
	stream, dgram = unix.SOCK_STREAM, unix.SOCK_DGRAM
)

// connects makes a socket and connects it.
func (k *task) connects(errno unix.Errno, family, kind int, addr string) {
	k.t.Helper()
	fd := k.want(0, op{Do: "socket", Kind: family, Flags: kind})
	k.want(errno, op{Do: "connect", FD: fd, Addr: addr})
	k.want(0, op{Do: "close", FD: fd})
}

func (k *task) sends(errno unix.Errno, family, kind, flags int, addr string) {
	k.t.Helper()
	fd := k.want(0, op{Do: "socket", Kind: family, Flags: kind})
	k.want(errno, op{Do: "sendto", FD: fd, Addr: addr, Flags: flags})
	k.want(0, op{Do: "close", FD: fd})
}

// Addresses, by programs of the instance's cgroup and by BPF LSM where it is.
func TestPhaseAddresses(t *testing.T) {
	e := openEnforcer(t, pinDir(t), bpf.EnforcerOptions{})
	cg := newCgroup(t)
	a, b, six := serve(t, "127.0.0.1"), serve(t, "127.0.0.1"), serve(t, "::1")
	at := func(host string, port int) string { return net.JoinHostPort(host, fmt.Sprint(port)) }
	set0 := bpf.PhaseSet{
		0: bpf.AnyPhase(),
		1: reach("127.0.0.0/8", a.port),
		2: reach(),
		3: reach("::1/128", six.port, "127.0.0.2/32", b.port),
		4: reach("127.0.0.0/8", a.port, "127.0.0.1/32", b.port, "::/0", 0),
		5: reach("127.0.0.1/32", b.port),
	}
	h := add(t, e, cg, set0, bpf.EnforceOptions{Phase: 5})
	other := newCgroup(t)
	k, free := startTask(t, cg), startTask(t, other)
	verdict := func(ok bool) unix.Errno {
		if ok {
			return 0
		}
		return unix.EPERM
	}
	for _, tc := range []struct {
		phase             uint8
		a, b, six, mapped bool
	}{
		{5, false, true, false, true},
		{0, true, true, true, true},
		{1, true, false, false, false},
		{2, false, false, false, false},
		{3, false, false, true, false},
		{4, true, true, true, true},
		{1, true, false, false, false},
	} {
		set(t, e, h, tc.phase)
		for _, kind := range []int{stream, dgram} {
			k.connects(verdict(tc.a), inet, kind, at("127.0.0.1", a.port))
			k.connects(verdict(tc.b), inet, kind, at("127.0.0.1", b.port))
			k.connects(verdict(tc.six), inet6, kind, at("::1", six.port))
			k.connects(verdict(tc.mapped), inet6, kind, at("::ffff:127.0.0.1", b.port))
		}
		k.sends(verdict(tc.a), inet, dgram, 0, at("127.0.0.1", a.port))
		k.sends(verdict(tc.b), inet, dgram, 0, at("127.0.0.1", b.port))
		k.sends(verdict(tc.b), inet, dgram, 0, "unspec:"+at("127.0.0.1", b.port))
		k.sends(verdict(tc.six), inet6, dgram, 0, at("::1", six.port))
		k.sends(verdict(tc.mapped), inet6, dgram, 0, at("::ffff:127.0.0.1", b.port))
		k.sends(verdict(tc.b), inet6, dgram, 0, at("127.0.0.1", b.port))
		// A connect that a send hides.
		k.sends(verdict(tc.a), inet, stream, unix.MSG_FASTOPEN, at("127.0.0.1", a.port))
		k.sends(verdict(tc.b), inet, stream, unix.MSG_FASTOPEN, at("127.0.0.1", b.port))
		free.connects(0, inet, stream, at("127.0.0.1", b.port))
		if t.Failed() {
			t.Fatalf("in phase %d", tc.phase)
		}
	}
	// Taking a connection back is none.
	fd := k.want(0, op{Do: "socket", Kind: inet, Flags: dgram})
	k.want(0, op{Do: "connect", FD: fd, Addr: at("127.0.0.1", a.port)})
	set(t, e, h, 2)
	k.want(0, op{Do: "connect", FD: fd, Addr: "unspec:127.0.0.1:1"})

	denials, err := e.Denials(h)
	if err != nil {
		t.Fatal(err)
	}
	counts := map[string]uint64{}
	for _, d := range denials {
		counts[d.Program] += d.Count
		if d.Phase == 0 || d.Count == 0 {
			t.Errorf("denied in phase 0: %+v", d)
		}
	}
	want := []string{"cgroup/connect4", "cgroup/connect6", "cgroup/sendmsg4", "cgroup/sendmsg6"}
	if bpfLSM(t) {
		want = []string{"lsm/socket_connect", "lsm/socket_sendmsg"}
	}
	for _, name := range want {
		if counts[name] == 0 {
			t.Errorf("%s denied nothing: %v", name, denials)
		}
	}
	if err := e.Remove(h); err != nil {
		t.Fatal(err)
	}
	k.connects(0, inet, stream, at("127.0.0.1", b.port))
	k.ends()
	free.ends()
	noErrors(t, e)
}

func noErrors(t testing.TB, e *bpf.Enforcer) {
	t.Helper()
	if errs, err := e.Errors(); err != nil || len(errs) > 0 {
		t.Errorf("errors %v, %v", errs, err)
	}
}

// Nested cgroups belong to the instance, whether there is room for them or not.
func TestPhaseNested(t *testing.T) {
	for name, cgroups := range map[string]int{"room": 0, "none": 1} {
		t.Run(name, func(t *testing.T) {
			e := openEnforcer(t, pinDir(t), bpf.EnforcerOptions{Cgroups: cgroups})
			cg := newCgroup(t)
			before := cg.child(t, "before")
			h := add(t, e, cg, bpf.PhaseSet{0: bpf.AnyPhase(), 1: reach()}, bpf.EnforceOptions{Phase: 1})
			err := e.AddCgroup(h, before.id)
			if cgroups == 0 && err != nil || cgroups > 0 && !errors.Is(err, bpf.ErrEnforcerFull) {
				t.Fatalf("AddCgroup: %v", err)
			}
			after := cg.child(t, "after")
			deep := after.child(t, "deep")
			list := []cgroup{after, deep}
			if cgroups == 0 {
				list = append(list, before)
			}
			beside := newCgroup(t)
			out := startTask(t, beside)
			for _, c := range list {
				set(t, e, h, 1)
				k := startTask(t, c)
				k.connects(unix.EPERM, inet, dgram, "127.0.0.1:9")
				set(t, e, h, 0)
				k.connects(0, inet, dgram, "127.0.0.1:9")
				k.ends()
			}
			set(t, e, h, 1)
			out.connects(0, inet, dgram, "127.0.0.1:9")
			// Who moves in is under the phase, and who moves out no more.
			out.want(0, op{Do: "move", Path: filepath.Join(deep.path, "cgroup.procs")})
			out.connects(unix.EPERM, inet, dgram, "127.0.0.1:9")
			out.ends()
			errs, err := e.Errors()
			if err != nil || (errs["cgroup"] > 0) != (cgroups > 0) {
				t.Errorf("errors %v, %v", errs, err)
			}
			// With the last instance ancestors are forgotten.
			if err := e.Remove(h); err != nil {
				t.Fatal(err)
			}
			noErrors(t, e)
		})
	}
}

// What is pinned holds when nobody is there.
func TestPhasePins(t *testing.T) {
	dir, cg := pinDir(t), newCgroup(t)
	e := openEnforcer(t, dir, bpf.EnforcerOptions{})
	h := add(t, e, cg, bpf.PhaseSet{2: reach(), 3: bpf.AnyPhase()}, bpf.EnforceOptions{Phase: 2, Tag: 7})
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	if err := e.Set(h, 3); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Set after Close: %v", err)
	}
	k := startTask(t, cg)
	k.connects(unix.EPERM, inet, dgram, "127.0.0.1:9")
	again := openEnforcer(t, dir, bpf.EnforcerOptions{})
	all, err := again.Instances()
	if err != nil || len(all) != 1 || all[0].PhaseHandle != h || all[0].Cgroup != cg.id || all[0].Phase != 2 || all[0].Tag != 7 || !slices.Equal(all[0].Phases, []uint8{2, 3}) {
		t.Fatalf("instances %+v, %v", all, err)
	}
	if !slices.Contains(all[0].Programs, "cgroup/connect4") {
		t.Errorf("programs %v", all[0].Programs)
	}
	set(t, again, h, 3)
	k.connects(0, inet, dgram, "127.0.0.1:9")
	set(t, again, h, 2)
	k.connects(unix.EPERM, inet, dgram, "127.0.0.1:9")
	if err := again.Remove(h); err != nil {
		t.Fatal(err)
	}
	k.connects(0, inet, dgram, "127.0.0.1:9")
	k.ends()
	links, err := filepath.Glob(filepath.Join(dir, "layout-*", "links", "*"))
	if err != nil || len(links) > 0 {
		t.Errorf("links are left: %v, %v", links, err)
	}
}

// What a process leaves that is killed in the middle is undone.
func TestPhaseCrash(t *testing.T) {
	dir, cg := pinDir(t), newCgroup(t)
	e := openEnforcer(t, dir, bpf.EnforcerOptions{Instances: 1})
	h := add(t, e, cg, bpf.PhaseSet{0: reach("127.0.0.1/32", 1)}, bpf.EnforceOptions{})
	e.CrashInAdd(h)
	k := startTask(t, cg)
	k.connects(unix.EPERM, inet, dgram, "127.0.0.1:9")
	again := openEnforcer(t, dir, bpf.EnforcerOptions{})
	k.connects(0, inet, dgram, "127.0.0.1:9")
	if all, err := again.Instances(); err != nil || len(all) > 0 {
		t.Errorf("instances %+v, %v", all, err)
	}
	h = add(t, again, cg, bpf.PhaseSet{0: reach()}, bpf.EnforceOptions{})
	k.connects(unix.EPERM, inet, dgram, "127.0.0.1:1")
	if err := again.Remove(h); err != nil {
		t.Fatal(err)
	}
	k.ends()
}

func TestPhaseFull(t *testing.T) {
	needRoot(t)
	one := bpf.PhaseSet{0: reach("10.0.0.0/8", 1, "10.1.0.0/16", 2)}
	two := bpf.AnyPhase()
	two.ReadTrees, two.WriteTrees = []string{"/a", "/b"}, []string{"/c"}
	for _, tc := range []struct {
		opts bpf.EnforcerOptions
		set  bpf.PhaseSet
		want string
		nth  int // which Add is too much
	}{
		{bpf.EnforcerOptions{Instances: 2}, one, "all 2 slots", 3},
		{bpf.EnforcerOptions{Cgroups: 2}, one, "room for 2 cgroups", 3},
		{bpf.EnforcerOptions{Destinations: 5}, one, "room for 5 destinations", 3},
		{bpf.EnforcerOptions{Trees: 4}, bpf.PhaseSet{0: two}, "room for 4 trees", 2},
	} {
		tc.opts.NoPin = true
		e := openEnforcer(t, "", tc.opts)
		var last bpf.PhaseHandle
		for range tc.nth - 1 {
			last = add(t, e, newCgroup(t), tc.set, bpf.EnforceOptions{})
		}
		cg := newCgroup(t)
		for range 2 {
			if _, err := e.Add(cg.id, tc.set, bpf.EnforceOptions{Partial: true}); !errors.Is(err, bpf.ErrEnforcerFull) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("Add: %v, want %q", err, tc.want)
			}
		}
		if err := e.Remove(last); err != nil {
			t.Fatal(err)
		}
		// What one gave back another has.
		add(t, e, cg, tc.set, bpf.EnforceOptions{})
	}
}

// Whatever the prefixes and ports are, the kernel's table says of an address what they
// say together.
func TestPhaseRandomDestinations(t *testing.T) {
	e := openEnforcer(t, "", bpf.EnforcerOptions{NoPin: true})
	cg := newCgroup(t)
	k := startTask(t, cg)
	r := rand.New(rand.NewPCG(1, 2))
	v4 := k.want(0, op{Do: "socket", Kind: inet, Flags: dgram})
	v6 := k.want(0, op{Do: "socket", Kind: inet6, Flags: dgram})
	// Few bits, so that prefixes and addresses meet.
	random := func(six bool) netip.Addr {
		b := [16]byte{0: 0x20, 1: byte(r.IntN(2)), 15: byte(r.IntN(4))}
		if six {
			return netip.AddrFrom16(b)
		}
		return netip.AddrFrom4([4]byte{127, byte(r.IntN(2)), 0, byte(r.IntN(4))})
	}
	for range 8 {
		s := bpf.PhaseSet{}
		for phase := range uint8(bpf.Phases) {
			rules := reach()
			for range r.IntN(6) {
				a := random(r.IntN(2) == 0)
				p, err := a.Prefix([]int{0, 8, 15, 16, 30, 31, a.BitLen()}[r.IntN(7)])
				if err != nil {
					t.Fatal(err)
				}
				rules.Destinations.Prefixes = append(rules.Destinations.Prefixes, bpf.Destination{p, uint16(r.IntN(4))})
			}
			s[phase] = rules
		}
		h := add(t, e, cg, s, bpf.EnforceOptions{})
		for phase, rules := range s {
			set(t, e, h, phase)
			for range 40 {
				to := netip.AddrPortFrom(random(r.IntN(2) == 0), uint16(1+r.IntN(3)))
				o, asked := op{Do: "connect", FD: v4, Addr: to.String()}, to.String()
				if to.Addr().Is6() {
					o.FD = v6
				} else if r.IntN(3) == 0 {
					asked = netip.AddrPortFrom(netip.AddrFrom16(to.Addr().As16()), to.Port()).String()
					o.FD, o.Addr = v6, asked
				}
				want := slices.ContainsFunc(rules.Destinations.Prefixes, func(d bpf.Destination) bool {
					return d.Prefix.Contains(to.Addr()) && (d.Port == 0 || d.Port == to.Port())
				})
				// Others than EPERM are of routes that this machine has or not.
				if _, errno := k.try(o); (errno != unix.EPERM) != want {
					t.Fatalf("phase %d, %s: %s, want allowed %t by %v", phase, asked, text(errno), want, rules.Destinations.Prefixes)
				}
			}
		}
		if err := e.Remove(h); err != nil {
			t.Fatal(err)
		}
	}
	k.ends()
}

// BenchmarkPhaseConnect times connects of a UDP socket, which are the cheapest, and of TCP to
// a listener, by turns: without an instance, with one that allows the address, and
// from another cgroup than the instance's.
func BenchmarkPhaseConnect(b *testing.B) {
	e := openEnforcer(b, pinDir(b), bpf.EnforcerOptions{})
	cg, other := newCgroup(b), newCgroup(b)
	s := serve(b, "127.0.0.1")
	at := fmt.Sprintf("127.0.0.1:%d", s.port)
	go func() {
		for {
			c, err := s.tcp.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	k, out := startTask(b, cg), startTask(b, other)
	rules := bpf.PhaseSet{0: reach("10.0.0.0/8", 443, "192.168.0.0/16", 0, "127.0.0.0/8", s.port)}
	measure := func(k *task, what string, n int) float64 {
		return float64(k.want(0, op{Do: what, Addr: at, Flags: n})) / float64(n)
	}
	results := map[string][]float64{}
	for b.Loop() {
		for range 15 {
			for _, kind := range []string{"udp", "tcp"} {
				n := map[string]int{"udp": 20000, "tcp": 500}[kind]
				bare, outBare := measure(k, kind+" connects", n), measure(out, kind+" connects", n)
				h := add(b, e, cg, rules, bpf.EnforceOptions{})
				ours, others := measure(k, kind+" connects", n), measure(out, kind+" connects", n)
				if err := e.Remove(h); err != nil {
					b.Fatal(err)
				}
				results[kind+"-bare-ns"] = append(results[kind+"-bare-ns"], bare)
				results[kind+"-ns"] = append(results[kind+"-ns"], ours)
				results[kind+"-ratio"] = append(results[kind+"-ratio"], ours/bare)
				results[kind+"-others-ratio"] = append(results[kind+"-others-ratio"], others/outBare)
			}
		}
	}
	k.ends()
	out.ends()
	b.ReportMetric(0, "ns/op")
	for name, v := range results {
		b.ReportMetric(median(v), name)
	}
}

// BenchmarkPhaseSet is what a switch costs here.
func BenchmarkPhaseSet(b *testing.B) {
	e := openEnforcer(b, pinDir(b), bpf.EnforcerOptions{})
	h := add(b, e, newCgroup(b), bpf.PhaseSet{0: bpf.AnyPhase(), 1: bpf.AnyPhase()}, bpf.EnforceOptions{})
	phase := uint8(0)
	for b.Loop() {
		phase ^= 1
		if err := e.Set(h, phase); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkPhaseMemory is what the kernel's maps take.
func BenchmarkPhaseMemory(b *testing.B) {
	e := openEnforcer(b, pinDir(b), bpf.EnforcerOptions{})
	var n uint64
	for b.Loop() {
		var err error
		if n, err = e.Memory(); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(n), "bytes")
}

// What can't be told is denied.
func TestPhaseBroken(t *testing.T) {
	e := openEnforcer(t, pinDir(t), bpf.EnforcerOptions{})
	cg := newCgroup(t)
	h := add(t, e, cg, bpf.PhaseSet{0: reach("127.0.0.0/8", 0)}, bpf.EnforceOptions{})
	k := startTask(t, cg)
	fd := k.want(0, op{Do: "socket", Kind: inet, Flags: dgram})
	k.want(0, op{Do: "connect", FD: fd, Addr: "127.0.0.1:9"})
	e.BreakPhase(h)
	k.want(unix.EPERM, op{Do: "connect", FD: fd, Addr: "127.0.0.1:9"})
	if errs, err := e.Errors(); err != nil || errs["phase"] == 0 || errs["count"] == 0 {
		t.Errorf("errors %v, %v", errs, err)
	}
	set(t, e, h, 0)
	k.want(0, op{Do: "connect", FD: fd, Addr: "127.0.0.1:9"})
	k.ends()
}
