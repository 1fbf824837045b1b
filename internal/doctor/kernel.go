// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/cgroup"
)

func checkKernel(_ context.Context, h *Host, _ Options) []Check {
	c := Check{Name: "kernel", Status: OK, Found: strings.TrimSpace(h.Release + " " + h.Machine), Uses: "recording needs 6.1 on x86_64"}
	switch {
	case !atLeast(h.Release, 6, 1):
		c.Status, c.Remedy = Missing, "boot Linux 6.1 or later to record; profiles are enforced from 5.0 on"
	case h.Machine != "x86_64":
		c.Status, c.Remedy = Missing, "record on x86_64: the recorder is built for no other machine"
	}
	return []Check{c}
}

// atLeast compares the first two numbers of a version, "6.1.0-13-amd64", with
// what is wanted. What can't be read is not enough.
func atLeast(version string, major, minor int) bool {
	var gotMajor, gotMinor int
	if n, _ := fmt.Sscanf(strings.TrimPrefix(version, "v"), "%d.%d", &gotMajor, &gotMinor); n != 2 {
		return false
	}
	return gotMajor > major || gotMajor == major && gotMinor >= minor
}

const toV2 = "boot with systemd.unified_cgroup_hierarchy=1 for cgroup v2 alone"

func checkCgroup(_ context.Context, h *Host, _ Options) []Check {
	c := Check{Name: "cgroup"}
	hierarchy, err := h.Cgroup()
	switch {
	case err != nil:
		c.Status, c.Found, c.Remedy = Error, oneLine(err.Error()), "mount -t cgroup2 none /sys/fs/cgroup"
	case hierarchy.Mode == cgroup.V1:
		c.Status, c.Found = Missing, "v1 only, no cgroup v2 hierarchy is mounted"
		c.Remedy = toV2 + ", or to record only: mount -o remount,rw /sys/fs/cgroup && mkdir /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified"
	case hierarchy.Mode == cgroup.Hybrid:
		c.Status, c.Found = Warn, "hybrid, v2 at "+hierarchy.Unified
		c.Uses = "cgroup ids from the v2 tree, limits through v1 controllers: no memory.high, io.max or unified"
		c.Remedy = toV2
	default:
		c.Status, c.Found, c.Uses = OK, "v2 at "+hierarchy.Unified, "cgroup ids and limits"
	}
	return []Check{c}
}

// features says what each of bpf.Probe's is for. Those that are needed are
// Missing where they fail, others a Warn, and those that nothing uses are fine
// either way.
var features = map[string]struct {
	needed       bool
	uses, remedy string
}{
	"btf":     {true, "reads the kernel's structures", "boot a kernel with CONFIG_DEBUG_INFO_BTF=y (/sys/kernel/btf/vmlinux)"},
	"ringbuf": {true, "first-seen events", "boot Linux 5.8 or later"},
	"tp_btf":  {true, "the recorder", "boot a kernel with CONFIG_BPF_EVENTS=y and CONFIG_DEBUG_INFO_BTF=y"},
	"fentry": {
		false, "live reports of violations at no cost",
		"boot a kernel with CONFIG_FUNCTION_TRACER=y and CONFIG_DYNAMIC_FTRACE_WITH_DIRECT_CALLS=y, as distributions' are",
	},
	"lsm": {
		false, "phases: files and sockets without a round trip",
		"boot a kernel with CONFIG_BPF_LSM=y and bpf in its lsm= list, as distributions' are",
	},
	"cgroup/connect4": {false, "phases: the network", "boot a kernel with CONFIG_CGROUP_BPF=y, and mount cgroup v2"},
}

const asRoot = "run this as root, or with CAP_BPF, CAP_PERFMON and CAP_SYS_ADMIN"

func checkBPF(_ context.Context, h *Host, _ Options) []Check {
	root := ""
	if hierarchy, err := h.Cgroup(); err == nil {
		root = hierarchy.Unified
	}
	privileged := h.capable(unix.CAP_SYS_ADMIN) || h.capable(unix.CAP_BPF) && h.capable(unix.CAP_PERFMON)
	var checks []Check
	for _, f := range h.Probe(root) {
		checks = append(checks, featureCheck(f, privileged))
	}
	c := Check{Name: "bpf.recorder", Status: OK, Found: "its programs load", Uses: "recording"}
	if err := h.OpenRecorder(); err != nil {
		c.Status, c.Found, c.Remedy = Missing, oneLine(err.Error()), "the checks above say what it lacks; if none does, report this as a bug of syslatch"
		if !privileged {
			c.Remedy = asRoot
		}
	}
	return append(checks, c)
}

func featureCheck(f bpf.Feature, privileged bool) Check {
	about, used := features[f.Name]
	c := Check{Name: "bpf." + f.Name, Status: OK, Found: "works", Uses: about.uses}
	if f.OK {
		return c
	}
	c.Status, c.Found, c.Remedy = Warn, "does not work", about.remedy
	if f.Err != nil {
		c.Found = oneLine(f.Err.Error())
	}
	switch {
	case !used:
		c.Status, c.Remedy = OK, ""
		c.Found += "; nothing uses it"
		return c
	case about.needed:
		c.Status = Missing
	}
	if !privileged && errors.Is(f.Err, fs.ErrPermission) {
		c.Remedy = asRoot
	}
	return c
}

// checkBPFFS looks for a mount by its file system, not by its path's existence:
// the empty directory is there without one. Of the mounts that hold the path the
// last counts: it covers those before it, or lies in them.
func checkBPFFS(_ context.Context, h *Host, o Options) []Check {
	c := Check{Name: "bpffs", Uses: "pins: recordings go on while the daemon is dead"}
	text, err := h.ReadFile("/proc/self/mountinfo")
	if err != nil {
		c.Status, c.Found, c.Remedy = Error, oneLine(err.Error()), "mount -t proc proc /proc"
		return []Check{c}
	}
	var others []string
	var point, kind string
	readOnly := false
	for line := range strings.Lines(string(text)) {
		before, after, _ := strings.Cut(line, " - ")
		fields, filesystem := strings.Fields(before), strings.Fields(after)
		if len(fields) < 6 || len(filesystem) == 0 {
			continue
		}
		at := fields[4]
		if at == "/" || at == o.BPFFS || strings.HasPrefix(o.BPFFS, at+"/") {
			point, kind = at, filesystem[0]
			ro := func(options string) bool { return slices.Contains(strings.Split(options, ","), "ro") }
			readOnly = ro(fields[5]) || ro(filesystem[len(filesystem)-1])
		} else if filesystem[0] == "bpf" {
			others = append(others, at)
		}
	}
	switch {
	case kind != "bpf":
		c.Status, c.Found = Missing, "not mounted at "+o.BPFFS
		c.Remedy = "mount -t bpf bpf " + o.BPFFS + " (or give syslatchd another with bpffs: in its policy file)"
		if len(others) > 0 {
			c.Found += ", but at " + strings.Join(others, ", ")
		}
	case readOnly:
		c.Status, c.Found, c.Remedy = Missing, "mounted at "+point+", read-only", "mount -o remount,rw "+point
	default:
		c.Status, c.Found = OK, "mounted at "+point
	}
	return []Check{c}
}

var capabilities = []struct {
	name     string
	bit      int
	required bool
	uses     string
}{
	{"CAP_BPF", unix.CAP_BPF, true, "loading programs"},
	{"CAP_PERFMON", unix.CAP_PERFMON, true, "programs that read the kernel's structures"},
	{"CAP_SYS_ADMIN", unix.CAP_SYS_ADMIN, false, "filters without no_new_privs, mounts, ids of others' objects"},
	{"CAP_SYS_RESOURCE", unix.CAP_SYS_RESOURCE, false, "lowering oom_score_adj, raising rlimits"},
	{"CAP_DAC_OVERRIDE", unix.CAP_DAC_OVERRIDE, false, "oom_score_adj by phase, of containers that don't run as root"},
	{"CAP_SYS_PTRACE", unix.CAP_SYS_PTRACE, false, "reading of other users' processes, filters for processes that run"},
}

// effective is this process's set of capabilities.
func (h *Host) effective() (uint64, error) {
	text, err := h.ReadFile("/proc/self/status")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, "CapEff:"); ok {
			return strconv.ParseUint(strings.TrimSpace(value), 16, 64)
		}
	}
	return 0, errors.New("/proc/self/status has no line CapEff")
}

func (h *Host) capable(bit int) bool {
	set, err := h.effective()
	return err == nil && set&(1<<bit) != 0
}

func checkCapabilities(_ context.Context, h *Host, _ Options) []Check {
	set, err := h.effective()
	if err != nil {
		return []Check{{Name: "capability", Status: Error, Found: oneLine(err.Error()), Remedy: "mount -t proc proc /proc"}}
	}
	var checks []Check
	for _, capability := range capabilities {
		c := Check{Name: "capability." + capability.name, Status: OK, Found: "effective", Uses: capability.uses}
		switch {
		case set&(1<<capability.bit) != 0:
		case capability.required && set&(1<<unix.CAP_SYS_ADMIN) != 0:
			c.Found = "not effective, CAP_SYS_ADMIN holds it"
		default:
			c.Status, c.Found = Warn, "not effective"
			if capability.required {
				c.Status = Missing
			}
			c.Remedy = "run as root, with it in the bounding set (CapabilityBoundingSet= of a unit, securityContext.capabilities.add of a pod)"
		}
		checks = append(checks, c)
	}
	return checks
}

// checkInject is what inject.Able is to a process that runs.
func checkInject(_ context.Context, h *Host, _ Options) []Check {
	c := Check{Name: "inject", Status: Warn, Uses: "filters for processes that run: irreversible phases, syslatch apply"}
	status, err := h.ReadFile("/proc/self/status")
	if err != nil {
		c.Status, c.Found, c.Remedy = Error, oneLine(err.Error()), "mount -t proc proc /proc"
		return []Check{c}
	}
	yama, _ := h.ReadFile("/proc/sys/kernel/yama/ptrace_scope") // there may be no yama
	switch {
	case !h.capable(unix.CAP_SYS_PTRACE) || !h.capable(unix.CAP_SYS_ADMIN):
		c.Found, c.Remedy = "not without CAP_SYS_PTRACE and CAP_SYS_ADMIN", "run as root, with both in the bounding set"
	case !strings.Contains(string(status), "\nSeccomp:\t0\n"):
		c.Found = "this process has a seccomp filter, so the kernel doesn't let it set those of others aside"
		c.Remedy = "run it without one (contrib/systemd/ratchet.conf)"
	case strings.TrimSpace(string(yama)) == "3":
		c.Found, c.Remedy = "kernel.yama.ptrace_scope is 3, which allows nobody until the next boot", "sysctl kernel.yama.ptrace_scope=1, and boot"
	default:
		c.Status, c.Found = OK, "possible"
	}
	return []Check{c}
}

func checkMemlock(_ context.Context, h *Host, _ Options) []Check {
	c := Check{Name: "memlock", Status: OK}
	limit := "unknown"
	if text, err := h.ReadFile("/proc/self/limits"); err == nil {
		for line := range strings.Lines(string(text)) {
			if rest, ok := strings.CutPrefix(line, "Max locked memory"); ok {
				if words := strings.Fields(rest); len(words) > 0 {
					limit = words[0]
				}
			}
		}
	}
	// Linux 5.11 accounts the memory of BPF objects to the memory cgroup.
	if atLeast(h.Release, 5, 11) {
		c.Found = "limit " + limit + ", not applied to BPF by this kernel"
		return []Check{c}
	}
	c.Found = "limit " + limit + ", applied to BPF by this kernel"
	if limit != "unlimited" {
		c.Status, c.Remedy = Warn, "ulimit -l unlimited (LimitMEMLOCK=infinity in a unit)"
	}
	return []Check{c}
}

func checkSeccomp(_ context.Context, h *Host, _ Options) []Check {
	s, err := h.Seccomp()
	if err != nil {
		return []Check{{Name: "seccomp.libseccomp", Status: Error, Found: oneLine(err.Error()), Remedy: "install libseccomp 2.5 or later"}}
	}
	library := Check{Name: "seccomp.libseccomp", Status: OK, Found: fmt.Sprintf("%s, API level %d", s.Library, s.API), Uses: "compiles and checks filters"}
	switch {
	case s.API < 3: // SECCOMP_RET_LOG, KILL_PROCESS and FILTER_FLAG_LOG
		library.Status, library.Remedy = Missing, "install libseccomp 2.5 or later on Linux 4.14 or later"
	case s.API < 6: // notification, and TSYNC beside it
		library.Status, library.Remedy = Warn, "install libseccomp 2.5 or later on Linux 5.7 or later: phases need notifications"
	case s.API < 7:
		library.Status, library.Remedy = Warn, "install libseccomp 2.6 for SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"
	}
	actions := Check{Name: "seccomp.actions", Status: OK, Uses: "filters"}
	var names, without []string
	for _, a := range s.Actions {
		names = append(names, strings.TrimPrefix(string(a), "SCMP_ACT_"))
	}
	for _, a := range []specs.LinuxSeccompAction{specs.ActErrno, specs.ActAllow, specs.ActLog, specs.ActNotify} {
		if !slices.Contains(s.Actions, a) {
			without = append(without, string(a))
		}
	}
	actions.Found = strings.Join(names, " ")
	if actions.Found == "" {
		actions.Found = "none"
	}
	if len(without) > 0 {
		actions.Status, actions.Remedy = Warn, "boot Linux 5.0 or later for "+strings.Join(without, ", ")
		if without[0] == string(specs.ActErrno) || without[0] == string(specs.ActAllow) {
			actions.Status, actions.Remedy = Missing, "boot a kernel with CONFIG_SECCOMP_FILTER=y"
		}
	}
	flags := Check{Name: "seccomp.flags", Status: OK, Uses: "logging of denied calls, listeners, filters for all threads"}
	var short []string
	for _, f := range s.Flags {
		short = append(short, strings.TrimPrefix(f, "SECCOMP_FILTER_FLAG_"))
	}
	flags.Found = strings.Join(short, " ")
	for _, f := range []string{"LOG", "NEW_LISTENER", "TSYNC", "WAIT_KILLABLE_RECV"} {
		if !slices.Contains(short, f) {
			flags.Status, flags.Remedy = Warn, "boot Linux 5.19 or later for SECCOMP_FILTER_FLAG_"+f
		}
	}
	if flags.Found == "" {
		flags.Found = "none"
	}
	return []Check{library, actions, flags, checkDenials(h)}
}

func checkDenials(h *Host) Check {
	c := Check{Name: "seccomp.denials", Status: OK, Uses: "events of what filters deny by themselves"}
	mechanism, err := h.Denials()
	if err != nil {
		c.Status, c.Found = Warn, oneLine(err.Error())
		c.Remedy = "it takes cgroup v2, errno in the sysctl kernel.seccomp.actions_logged, and CAP_BPF and CAP_PERFMON on a kernel with fentry, or CAP_AUDIT_READ in the host's network and pid namespaces"
		return c
	}
	c.Found = "seen by " + mechanism
	return c
}

func checkSystemd(_ context.Context, h *Host, _ Options) []Check {
	c := Check{Name: "systemd", Status: OK, Found: "runs this host", Uses: "may start syslatchd"}
	if err := h.Stat("/run/systemd/system"); err != nil {
		c.Status, c.Found, c.Uses = Warn, "does not run this host", ""
		c.Remedy = "start syslatchd by another service manager, or let the runtime start it (a link 10-syslatch in NRI's plugin directory)"
	}
	return []Check{c}
}
