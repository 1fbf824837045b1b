// SPDX-License-Identifier: Apache-2.0

package bpf

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"
)

// Feature is something of the kernel's that was tried.
type Feature struct {
	Name string // btf, ringbuf, tp_btf, raw_tp, tracepoint, fentry, fexit, lsm, cgroup/connect4
	OK   bool
	Err  error // why not
}

// Probe tries what the kernel really does, by loading and attaching a program
// that does nothing: some kernels load a type and refuse to attach it, which a
// feature test of loading alone doesn't show. The programs are off again when
// Probe returns. cgroupRoot is where cgroup version 2 is mounted; a cgroup is
// made there for a moment and removed. If it is empty, cgroup/connect4 is only
// loaded.
func Probe(cgroupRoot string) []Feature {
	// Where this matters the probes fail, and say so.
	_ = rlimit.RemoveMemlock()
	probes := []struct {
		name string
		try  func() error
	}{
		{"btf", func() error {
			_, err := btf.LoadKernelSpec()
			return err
		}},
		{"ringbuf", func() error { return features.HaveMapType(ebpf.RingBuf) }},
		{"tp_btf", func() error {
			return tryTracing(ebpf.AttachTraceRawTp, "sys_enter")
		}},
		{"raw_tp", tryRawTracepoint},
		{"tracepoint", tryTracepoint},
		{"fentry", func() error { return tryTracing(ebpf.AttachTraceFEntry, "audit_seccomp") }},
		{"fexit", func() error { return tryTracing(ebpf.AttachTraceFExit, "audit_seccomp") }},
		{"lsm", tryLSM},
		{"cgroup/connect4", func() error { return tryConnect(cgroupRoot) }},
	}
	all := make([]Feature, 0, len(probes))
	for _, p := range probes {
		err := p.try()
		all = append(all, Feature{Name: p.name, OK: err == nil, Err: err})
	}
	return all
}

// idle makes a program that returns a value and does nothing.
func idle(typ ebpf.ProgramType, at ebpf.AttachType, to string, value int32) (*ebpf.Program, error) {
	return ebpf.NewProgram(&ebpf.ProgramSpec{
		Name:         "syslatch_probe",
		Type:         typ,
		AttachType:   at,
		AttachTo:     to,
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, value), asm.Return()},
		License:      "GPL",
	})
}

// try loads and attaches a program, and takes both back.
func try(p *ebpf.Program, err error, attach func(*ebpf.Program) (link.Link, error)) error {
	if errors.Is(err, unix.EPERM) {
		// The library's advice about memory limits is for older kernels.
		return fmt.Errorf("load: %w: this kernel, or this process's privileges, don't allow the type", unix.EPERM)
	}
	if err != nil {
		return fmt.Errorf("load: %w", err)
	}
	defer p.Close()
	l, err := attach(p)
	if err != nil {
		return fmt.Errorf("attach: %w", err)
	}
	return l.Close()
}

func tryTracing(at ebpf.AttachType, to string) error {
	p, err := idle(ebpf.Tracing, at, to, 0)
	return try(p, err, func(p *ebpf.Program) (link.Link, error) {
		return link.AttachTracing(link.TracingOptions{Program: p, AttachType: at})
	})
}

func tryRawTracepoint() error {
	p, err := idle(ebpf.RawTracepoint, ebpf.AttachNone, "", 0)
	return try(p, err, func(p *ebpf.Program) (link.Link, error) {
		return link.AttachRawTracepoint(link.RawTracepointOptions{Name: "sys_enter", Program: p})
	})
}

// tryTracepoint needs tracefs: without one the error says so.
func tryTracepoint() error {
	p, err := idle(ebpf.TracePoint, ebpf.AttachNone, "", 0)
	return try(p, err, func(p *ebpf.Program) (link.Link, error) {
		return link.Tracepoint("sched", "sched_process_exec", p, nil)
	})
}

func tryLSM() error {
	p, err := idle(ebpf.LSM, ebpf.AttachLSMMac, "file_open", 0)
	return try(p, err, func(p *ebpf.Program) (link.Link, error) {
		return link.AttachLSM(link.LSMOptions{Program: p})
	})
}

// tryConnect attaches to an empty cgroup, so that nobody's connection passes
// the probe.
func tryConnect(cgroupRoot string) (err error) {
	p, err := idle(ebpf.CGroupSockAddr, ebpf.AttachCGroupInet4Connect, "", 1)
	if cgroupRoot == "" {
		if err != nil {
			return fmt.Errorf("load: %w", err)
		}
		return p.Close()
	}
	dir := filepath.Join(cgroupRoot, fmt.Sprintf("syslatch-probe-%d", os.Getpid()))
	if err := os.Mkdir(dir, 0o755); err != nil {
		return errors.Join(err, p.Close())
	}
	defer func() { err = errors.Join(err, os.Remove(dir)) }()
	return try(p, err, func(p *ebpf.Program) (link.Link, error) {
		return link.AttachCgroup(link.CgroupOptions{Path: dir, Attach: ebpf.AttachCGroupInet4Connect, Program: p})
	})
}
