// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/rawcalls"
)

// connecting are the loads of a connector. Each connect of TCP is one to a listener, of a
// socket of its own; UDP's are of one socket, as nothing else is as cheap.
var connecting = []load{
	{"udp", []string{"connect"}, 20_000},
	{"tcp", []string{"connect"}, 500},
}

// Variants of a connect, in the order of the report.
const (
	unattached   = iota
	onlyAllows   // a program with nothing in it but yes
	inPhase      // ours
	besideBefore // another cgroup's task, as unattached
	beside       // and while there is an instance
	connectVariants
)

var connectTitles = [connectVariants]struct{ name, title string }{
	unattached: {"bare", "nothing attached"},
	onlyAllows: {"trivial", "a program that allows all, so the kernel's own share"},
	inPhase:    {"allowed", "an instance whose phase allows the address"},
	beside:     {"beside", "a task of another cgroup meanwhile, to itself before"},
}

// connects measures what the programs that look at addresses add to a connect.
func (b *bench) connects(ctx context.Context, e *bpf.Enforcer) (err error) {
	c := &connectBench{enforcer: e}
	for _, w := range []**connector{&c.inside, &c.outside} {
		if *w, err = startConnector(); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, (*w).close()) }()
	}
	dir, err := c.inside.group.Open()
	if err != nil {
		return err
	}
	defer dir.Close()
	c.dir = dir
	if c.before, err = c.attached(); err != nil {
		return err
	}
	if c.trivial, err = ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "bench_allows", Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, License: "Apache-2.0",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	}); err != nil {
		return fmt.Errorf("load a program that allows: %w", err)
	}
	defer func() { err = errors.Join(err, c.trivial.Close()) }()
	for n := range b.opts.rounds {
		for i := range 3 {
			if err := ctx.Err(); err != nil {
				return err
			}
			take := [](func(n int) error){c.takeUnattached, c.takeTrivial, c.takeInstance}[(i+n)%3]
			if err := take(n); err != nil {
				return err
			}
		}
		b.progress("connects", n+1, b.opts.rounds)
	}
	b.connectReport(c)
	return nil
}

func (b *bench) connectReport(c *connectBench) {
	t := table{head: []string{"connect, over loopback"}}
	for _, l := range connecting {
		t.head = append(t.head, strings.ToUpper(l.name)+", ns", "ratio", "quartiles", "to the kernel's own", "quartiles")
	}
	for v, title := range connectTitles {
		if title.name == "" {
			continue
		}
		row := []string{title.title}
		for i, l := range connecting {
			ns := c.times[v][i]
			base := c.times[unattached][i]
			if v == beside {
				base = c.times[besideBefore][i]
			}
			b.report.metric(median(ns), "ns", "connect", l.name, title.name, "time")
			cells := []string{fmt.Sprintf("%.0f", median(ns)), "×1.00", "", "", ""}
			add := func(at int, base []float64, name string) float64 {
				r := paired(ns, base, ratio)
				b.report.metric(median(r), "ratio", "connect", l.name, title.name, name)
				cells[at] = fmt.Sprintf("×%.2f", median(r))
				cells[at+1] = fmt.Sprintf("%.2f–%.2f", quantile(r, 0.25), quantile(r, 0.75))
				return median(r)
			}
			if v != unattached {
				toBare := add(1, base, "ratio")
				if v == inPhase {
					add(3, c.times[onlyAllows][i], "to-trivial")
					b.report.goal("a connect of an instance that may, "+strings.ToUpper(l.name), "×%.2f of bare", toBare, 1.1)
				}
			}
			row = append(row, cells...)
		}
		t.rows = append(t.rows, row)
	}
	b.report.add(section{
		title:  "Connecting in a phase",
		tables: []table{t},
		notes: []string{
			fmt.Sprintf("Medians of %d rounds in which all took turns; ratios are medians of those within a round. One thread on one processor, by its own processor time, in a network namespace of its own, so that no firewall has a share. Nothing but the connects is timed; with TCP that is the whole handshake, both ends of it. The phase has the destinations 10.0.0.0/8 at port 443, 192.168.0.0/16, and 127.0.0.0/8 at the port.", b.opts.rounds),
			"The instance's programs: " + strings.Join(c.programs, ", ") + "." + othersNote(c.others),
		},
	})
}

func othersNote(n int) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprintf(" Somebody else's programs (%d) looked at connects on this machine meanwhile, so the kernel's share falls on what nothing is attached to as well.", n)
}

type connectBench struct {
	enforcer        *bpf.Enforcer
	trivial         *ebpf.Program
	inside, outside *connector
	dir             *os.File                      // the inside's cgroup
	before          int                           // programs that are attached above it
	others          int                           // connect4 programs of others, anywhere
	programs        []string                      // of the instance, by section name
	times           [connectVariants][2][]float64 // by load
}

// take measures one variant, with so many programs of ours on the way of the inside.
func (c *connectBench) take(v, n, own int, who *connector) error {
	have, err := c.attached()
	if err != nil {
		return err
	}
	if have != c.before+own {
		return fmt.Errorf("variant %d: %d programs look at a connect, want %d", v, have, c.before+own)
	}
	// What is attached to any cgroup has every connect pay.
	all, err := links(func(info *link.Info) bool {
		at := info.Cgroup()
		return info.Type == link.CgroupType && at != nil && ebpf.AttachType(at.AttachType) == ebpf.AttachCGroupInet4Connect
	})
	if err != nil {
		return err
	}
	c.others = max(c.others, all-own)
	for i := range connecting {
		at := (i + n) % len(connecting)
		t, err := who.run(connecting[at].name, connecting[at].rounds)
		if err != nil {
			return err
		}
		c.times[v][at] = append(c.times[v][at], t.CPU)
	}
	return nil
}

func (c *connectBench) attached() (int, error) {
	r, err := link.QueryPrograms(link.QueryOptions{Target: int(c.dir.Fd()), Attach: ebpf.AttachCGroupInet4Connect, QueryFlags: unix.BPF_F_QUERY_EFFECTIVE})
	if err != nil {
		return 0, err
	}
	return len(r.Programs), nil
}

func (c *connectBench) takeUnattached(n int) error {
	return errors.Join(c.take(unattached, n, 0, c.inside), c.take(besideBefore, n, 0, c.outside))
}

func (c *connectBench) takeTrivial(n int) (err error) {
	l, err := link.AttachCgroup(link.CgroupOptions{Path: c.inside.group.Path(), Attach: ebpf.AttachCGroupInet4Connect, Program: c.trivial})
	if err != nil {
		return fmt.Errorf("attach a program that allows: %w", err)
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	return c.take(onlyAllows, n, 1, c.inside)
}

func (c *connectBench) takeInstance(n int) (err error) {
	const may, mayNot = 0, 1
	some, none := bpf.AnyPhase(), bpf.AnyPhase()
	some.Destinations, none.Destinations = &bpf.Destinations{Prefixes: []bpf.Destination{
		{Prefix: netip.MustParsePrefix("10.0.0.0/8"), Port: 443},
		{Prefix: netip.MustParsePrefix("192.168.0.0/16")},
		{Prefix: netip.MustParsePrefix("127.0.0.0/8"), Port: c.inside.port},
	}}, &bpf.Destinations{}
	h, err := c.enforcer.Add(c.inside.group.ID(), bpf.PhaseSet{may: some, mayNot: none}, bpf.EnforceOptions{Dir: c.dir, Partial: true})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.enforcer.Remove(h)) }()
	all, err := c.enforcer.Instances()
	if err != nil {
		return err
	}
	c.programs = all[0].Programs
	if err := errors.Join(c.take(inPhase, n, 1, c.inside), c.take(beside, n, 1, c.outside)); err != nil {
		return err
	}
	// What was measured is what is claimed: it was judged.
	if err := c.enforcer.Set(h, mayNot); err != nil {
		return err
	}
	_, err = c.inside.run(refusedLoad, 1)
	return err
}

// connector is a process that connects to itself.
type connector struct {
	*worker
	port uint16
}

// refusedLoad is a connect of UDP that has to be denied.
const refusedLoad = "udp, denied"

func startConnector() (*connector, error) {
	w, err := startWorker(unix.CLONE_NEWNET, connectorRole)
	if err != nil {
		return nil, err
	}
	c := &connector{worker: w}
	if err := w.dec.Decode(&c.port); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", connectorRole, err), w.close())
	}
	return c, nil
}

// connect is its body.
func connect() error {
	if err := pin(); err != nil {
		return err
	}
	s, err := newSockets()
	if err != nil {
		return err
	}
	if err := json.NewEncoder(os.Stdout).Encode(s.port()); err != nil {
		return err
	}
	udp := func(want unix.Errno) body {
		list := []rawcalls.Call{s.connect(s.udp)}
		return body{1, func(rounds int, w *stopwatch) error {
			list[0].Times = uint64(rounds)
			return w.timed(func() error {
				rawcalls.Run(list)
				return result(&list[0], want)
			})
		}}
	}
	return obey(map[string]body{
		connecting[0].name: udp(0),
		connecting[1].name: {1, s.handshakes},
		refusedLoad:        udp(unix.EPERM),
	})
}

// backlog is how many connections of TCP are made before they are taken and ended.
const backlog = 100

// sockets are in a network namespace that nobody else is in.
type sockets struct {
	udp, listener int
	address       unix.RawSockaddrInet4
}

func newSockets() (*sockets, error) {
	s := &sockets{}
	var err error
	if s.udp, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return nil, err
	}
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return nil, err
	}
	lo.SetUint16(unix.IFF_UP)
	if err := unix.IoctlIfreq(s.udp, unix.SIOCSIFFLAGS, lo); err != nil {
		return nil, fmt.Errorf("loopback up: %w", err)
	}
	if s.listener, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return nil, err
	}
	if err := unix.Bind(s.listener, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		return nil, err
	}
	if err := unix.Listen(s.listener, backlog); err != nil {
		return nil, err
	}
	length := uint32(unsafe.Sizeof(s.address))
	if _, _, errno := unix.Syscall(unix.SYS_GETSOCKNAME, uintptr(s.listener), uintptr(unsafe.Pointer(&s.address)), uintptr(unsafe.Pointer(&length))); errno != 0 {
		return nil, fmt.Errorf("getsockname: %w", errno)
	}
	return s, nil
}

func (s *sockets) port() uint16 {
	p := (*[2]byte)(unsafe.Pointer(&s.address.Port)) // network byte order
	return uint16(p[0])<<8 | uint16(p[1])
}

func (s *sockets) connect(fd int) rawcalls.Call {
	return rawcalls.Call{
		Number: unix.SYS_CONNECT,
		Args:   [6]uint64{uint64(fd), uint64(uintptr(unsafe.Pointer(&s.address))), uint64(unsafe.Sizeof(s.address))},
	}
}

// handshakes connects to the listener, and leaves none in TIME_WAIT.
func (s *sockets) handshakes(rounds int, w *stopwatch) error {
	for left := rounds; left > 0; left -= backlog {
		list := make([]rawcalls.Call, min(left, backlog))
		for i := range list {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
				return err
			}
			list[i] = s.connect(fd)
		}
		if err := w.timed(func() error { rawcalls.Run(list); return nil }); err != nil {
			return err
		}
		for i := range list {
			if err := result(&list[i], 0); err != nil {
				return err
			}
			if err := unix.Close(int(list[i].Args[0])); err != nil { // resets it
				return err
			}
			fd, _, err := unix.Accept4(s.listener, unix.SOCK_CLOEXEC)
			if err != nil {
				return err
			}
			if err := unix.Close(fd); err != nil {
				return err
			}
		}
	}
	return nil
}
