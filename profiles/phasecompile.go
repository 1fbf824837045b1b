// SPDX-License-Identifier: Apache-2.0

package profiles

import (
	"maps"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

type phaseCompiler struct {
	*PhasePlan
	host          PhaseHost
	architectures []ABI
	log           bool
	hooked        map[string]string // call -> program
	unenforced    map[string]bool   // calls that should ask, where nobody can be asked
	static        map[string]region // what the filter allows at once of calls that it asks about
}

// calls lists, sorted, what any phase allows.
func (c *phaseCompiler) calls() []string {
	var out []string
	for _, calls := range c.regions {
		out = append(out, slices.Collect(maps.Keys(calls))...)
	}
	return sorted(out)
}

// all is start and every phase.
func (c *phaseCompiler) all() []string { return append([]string{StartPhase}, c.Phases...) }

// union is what any phase allows of a call.
func (c *phaseCompiler) union(name string) region {
	var out region
	for _, phase := range c.all() {
		out = out.or(c.regions[phase][name])
	}
	return out
}

// alike says whether a call is allowed alike in every phase of a list. What can't be
// compared is not.
func (c *phaseCompiler) alike(name string, phases []string) bool {
	for _, phase := range phases[1:] {
		if same, err := c.regions[phase][name].equal(c.regions[phases[0]][name]); err != nil || !same {
			return false
		}
	}
	return true
}

// kernelHooks are LSM hooks that see what a filter sees of these calls, and nothing
// else: a program there can tell a phase's forms apart as the supervisor would.
//
// file_open has the flags after the kernel has read them; what it can't undo, a file
// made by O_CREAT, the program denies at inode_create. bprm_check_security is passed
// once for each interpreter, too. socket_create is passed by socketpair.
var kernelHooks = []struct {
	program string
	calls   []string
	// scalar is the argument that the hook sees, by call; a call that isn't there is
	// seen or not, whatever its arguments.
	scalar map[string]uint
	known  func() region // forms that it can tell apart; nil: any value
	// others pass the hook as well, and not with what a filter sees of them: it
	// decides only where the phases that allow them allow all the rest.
	others []string
}{
	{"lsm/file_open", []string{"open", "openat", "creat"}, openArgument, func() region {
		return region{{0: bits{openWrites, 0}}}
	}, []string{"openat2", "open_by_handle_at", "mknod", "mknodat", "acct", "swapon", "swapoff"}},
	{"lsm/socket_create", []string{"socket", "socketpair"}, map[string]uint{"socket": 0, "socketpair": 0}, nil, nil},
	{"lsm/socket_connect", []string{"connect"}, nil, nil, nil},
	{"lsm/socket_bind", []string{"bind"}, nil, nil, nil},
	{"lsm/socket_listen", []string{"listen"}, nil, nil, nil},
	{"lsm/socket_accept", []string{"accept", "accept4"}, nil, nil, nil},
	{"lsm/bprm_check_security", []string{"execve", "execveat"}, nil, nil, nil},
}

// Programs that look at more than calls.
const (
	cgroupAddresses = "cgroup/connect4, cgroup/connect6, cgroup/sendmsg4, cgroup/sendmsg6"
	lsmAddresses    = "lsm/socket_connect, lsm/socket_sendmsg"
	lsmOpenSockets  = "lsm/socket_sendmsg, lsm/socket_recvmsg"
)

// What [PhaseHook.Allows] says of them.
const (
	onlyReading = "reading"
	anySocket   = "any"
	noSocket    = "none"
)

// projectCall is a call's arguments as a hook sees them: the one scalar in the first
// place. creat is an open for writing.
func projectCall(scalar map[string]uint) func(string, [6]uint64) [6]uint64 {
	return func(name string, args [6]uint64) (out [6]uint64) {
		if i, ok := scalar[name]; ok {
			out[0] = args[i]
		} else if name == "creat" {
			out[0] = openWrites
		}
		return out
	}
}

// findHooks gives calls that differ between phases to the kernel's hooks.
func (c *phaseCompiler) findHooks() {
	c.hooked = map[string]string{}
	if !c.host.LSM {
		return
	}
	for _, k := range kernelHooks {
		// A supervisor has to see the execve that ends StartPhase; next to what an
		// execve takes, being asked about each is nothing.
		if c.host.Notify && slices.Equal(k.calls, beginsPhases) {
			continue
		}
		var calls []string
		varies := false
		for _, name := range k.calls {
			if len(c.union(name)) > 0 {
				calls = append(calls, name)
				varies = varies || !c.alike(name, c.reversible())
			}
		}
		if !varies {
			continue
		}
		seen := map[string]map[string]region{} // call -> phase -> as projected
		ok := true
		for _, name := range calls {
			// The filter allows what any phase does, and has to be able to say that.
			_, ok2 := exactRules(c.union(name))
			ok = ok && ok2
			seen[name] = map[string]region{}
			for _, phase := range c.all() {
				r, can := projectRegion(k.scalar, k.known, name, c.regions[phase][name])
				ok = ok && can
				seen[name][phase] = r
			}
		}
		if !ok || !c.agree(calls, seen) {
			continue
		}
		if !c.othersPass(calls, seen, k.others) {
			continue
		}
		h := PhaseHook{Program: k.program, Calls: calls, Allows: map[string]string{}, regions: map[string]region{}, project: projectCall(k.scalar)}
		for _, phase := range c.all() {
			for _, name := range calls {
				h.regions[phase] = h.regions[phase].or(seen[name][phase])
			}
			h.Allows[phase] = hookForm(k.program, h.regions[phase])
		}
		for _, name := range calls {
			c.hooked[name] = k.program
		}
		c.Hooks = append(c.Hooks, h)
	}
}

// projectRegion is a region of a call as a hook sees it; false if the hook can't tell
// it from others.
func projectRegion(scalar map[string]uint, known func() region, name string, r region) (region, bool) {
	if len(r) == 0 {
		return nil, true
	}
	if name == "creat" && r.any() {
		return region{{0: bits{openWrites, openWrites}}}, true
	}
	index, has := scalar[name]
	if !has {
		return anything, r.any()
	}
	// Opens for reading and those for writing, from two groups, are all that there are.
	if rest, err := anything.minus(r); err == nil && len(rest) == 0 {
		return anything, true
	}
	if at, ok := argument(r); !ok || at != int(index) {
		return nil, false
	}
	var out region
	for _, b := range r {
		if b[index].mask&above != 0 {
			return nil, false // the kernel keeps no upper half
		}
		out = append(out, box{0: b[index]})
	}
	if known == nil {
		return out, true
	}
	part := known()
	rest, err := anything.minus(part)
	for _, form := range []region{part, rest} {
		if same, e := out.equal(form); err == nil && e == nil && same {
			return form, true
		}
	}
	return nil, false
}

// agree says whether calls that one hook sees are allowed alike: it can't tell one
// from the other. What no phase allows of a call its filter denies.
func (c *phaseCompiler) agree(calls []string, seen map[string]map[string]region) bool {
	union := map[string]region{}
	for _, name := range calls {
		for _, phase := range c.all() {
			union[name] = union[name].or(seen[name][phase])
		}
	}
	for _, a := range calls {
		for _, b := range calls {
			for _, phase := range c.all() {
				x, err1 := seen[a][phase].and(union[b])
				y, err2 := seen[b][phase].and(union[a])
				same, err3 := x.equal(y)
				if err1 != nil || err2 != nil || err3 != nil || !same {
					return false
				}
			}
		}
	}
	return true
}

// othersPass says whether a hook would stand in the way of calls that it isn't for.
func (c *phaseCompiler) othersPass(calls []string, seen map[string]map[string]region, others []string) bool {
	for _, phase := range c.all() {
		if !slices.ContainsFunc(others, func(name string) bool { return len(c.regions[phase][name]) > 0 }) {
			continue
		}
		if !slices.ContainsFunc(calls, func(name string) bool { return seen[name][phase].any() }) {
			return false
		}
	}
	return true
}

func hookForm(program string, r region) string {
	if program == "lsm/file_open" && len(r) > 0 && !r.any() {
		if r.has(specs.ArchX86_64, [6]uint64{}) {
			return onlyReading
		}
		return "writing"
	}
	return strings.ReplaceAll(r.String(), "arg0", "family")
}

// reversible are start and the phases that can be left, or that have no ratchet.
func (c *phaseCompiler) reversible() []string {
	out := []string{StartPhase}
	for _, p := range c.set.Phases {
		if !p.Irreversible || !c.host.Inject {
			out = append(out, p.Name)
		}
	}
	return out
}

// gated are the phases for which the first filter, the supervisor or a hook has to
// tell a call's forms apart: not those whose ratchet does.
func (c *phaseCompiler) gated(name string) []string {
	out := c.reversible()
	for phase := range c.Ratchets {
		if _, ok := exactRules(c.regions[phase][name]); !ok {
			out = append(out, phase)
		}
	}
	return out
}

// exactRules are a region as rules of one filter that has no others for the call:
// one rule, or rules with one condition each.
func exactRules(r region) ([][]specs.LinuxSeccompArg, bool) {
	if rules, ok := r.rules(false); ok && len(rules) <= maxCallRules {
		return rules, true
	}
	if len(r) != 1 {
		return nil, false
	}
	var args []specs.LinuxSeccompArg
	for i := range r[0] {
		one := box{}
		one[i] = r[0][i]
		rules, ok := region{one}.rules(false)
		if !ok {
			return nil, false
		}
		args = append(args, rules[0]...)
	}
	return [][]specs.LinuxSeccompArg{args}, true
}

// builder collects rules for one profile.
type builder struct {
	action map[specs.LinuxSeccompAction][]string // without conditions
	rules  []specs.LinuxSyscall
}

func (b *builder) add(name string, action specs.LinuxSeccompAction, rules [][]specs.LinuxSeccompArg) {
	for _, args := range rules {
		if len(args) == 0 {
			b.action[action] = append(b.action[action], name)
			return // says all
		}
	}
	for _, args := range rules {
		b.rules = append(b.rules, specs.LinuxSyscall{Names: []string{name}, Action: action, Args: args})
	}
}

func (c *phaseCompiler) build(b *builder, asks bool) *specs.LinuxSeccomp {
	eperm, enosys := errnoEPERM, errnoENOSYS
	p := &specs.LinuxSeccomp{DefaultAction: specs.ActErrno, DefaultErrnoRet: &eperm, Architectures: slices.Clone(c.architectures)}
	for _, action := range []specs.LinuxSeccompAction{specs.ActAllow, specs.ActNotify} {
		if list := sorted(b.action[action]); len(list) > 0 {
			p.Syscalls = append(p.Syscalls, specs.LinuxSyscall{Names: list, Action: action})
		}
	}
	ruled := map[string]bool{}
	for _, r := range slices.Concat(p.Syscalls, b.rules) {
		for _, name := range r.Names {
			ruled[name] = true
		}
	}
	fallback := append(slices.Collect(maps.Keys(flagsInMemory)), "io_uring_setup", "io_uring_enter", "io_uring_register")
	if slices.Contains(c.architectures, specs.ArchX86) {
		// Without a rule of their own, libseccomp makes them of what they reach.
		fallback = append(fallback, slices.Collect(maps.Keys(multiplexers))...)
	}
	fallback = slices.DeleteFunc(sorted(append(fallback, c.newer...)), func(name string) bool { return ruled[name] })
	if len(fallback) > 0 {
		p.Syscalls = append(p.Syscalls, specs.LinuxSyscall{Names: fallback, Action: specs.ActErrno, ErrnoRet: &enosys})
	}
	p.Syscalls = append(p.Syscalls, b.rules...)
	if asks && c.host.WaitKillable {
		p.Flags = append(p.Flags, "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV")
	}
	if c.log {
		p.Flags = append(p.Flags, FlagLog)
	}
	return p
}

// ratchets makes the filters of irreversible phases. A call whose forms it can't tell
// apart a ratchet allows: the supervisor goes on to decide it.
func (c *phaseCompiler) ratchets() {
	for _, p := range c.set.Phases {
		if !p.Irreversible || !c.host.Inject {
			continue
		}
		b := &builder{action: map[specs.LinuxSeccompAction][]string{}}
		for _, name := range slices.Sorted(maps.Keys(c.regions[p.Name])) {
			rules, ok := exactRules(c.regions[p.Name][name])
			if !ok {
				rules = [][]specs.LinuxSeccompArg{nil}
			}
			b.add(name, specs.ActAllow, rules)
		}
		c.Ratchets[p.Name] = c.build(b, false)
	}
}

// profile makes the first filter, and says what becomes of each call.
func (c *phaseCompiler) profile() {
	b := &builder{action: map[specs.LinuxSeccompAction][]string{}}
	c.unenforced, c.static = map[string]bool{}, map[string]region{}
	// beginsPhases last, as they depend on the others.
	for _, name := range append(without(c.calls(), beginsPhases), beginsPhases...) {
		gated := c.gated(name)
		// always is what all gated phases allow, ever what any phase does.
		always, ever := c.regions[gated[0]][name], c.union(name)
		if len(ever) == 0 {
			continue
		}
		for _, phase := range gated[1:] {
			var err error
			if always, err = always.and(c.regions[phase][name]); err != nil {
				always = nil
				if name == "clone" {
					always = region{threadBox} // the floor's
				}
				break
			}
		}
		c.call(b, name, always, ever)
		c.tell(name, always)
	}
	slices.SortStableFunc(c.Calls, func(a, b PhaseCall) int { return strings.Compare(a.Name, b.Name) })
	c.Profile = c.build(b, len(c.notified) > 0)
	c.Listener = len(c.notified) > 0
}

func (c *phaseCompiler) call(b *builder, name string, always, ever region) {
	// Where the union is what all allow, or a hook tells the rest apart, the filter
	// allows it.
	alike, err := ever.within(always)
	// See findHooks. What enters an irreversible phase by an execve needs its ratchet, and
	// programs may have to be there before the execve.
	if slices.Contains(beginsPhases, name) && (len(c.notified) > 0 || len(c.Ratchets)+len(c.Hooks) > 0 && c.host.Notify) {
		c.notified[name] = true
		b.add(name, specs.ActNotify, [][]specs.LinuxSeccompArg{nil})
		return
	}
	if alike = alike && err == nil; alike || c.hooked[name] != "" {
		if rules, ok := exactRules(ever); ok {
			b.add(name, specs.ActAllow, rules)
			return
		}
	}
	if !c.host.Notify {
		c.unenforced[name] = true
		rules, ok := exactRules(ever)
		if !ok {
			rules = [][]specs.LinuxSeccompArg{nil}
		}
		b.add(name, specs.ActAllow, rules)
		return
	}
	c.notified[name] = true
	static, allow, ask := split(name, always, ever)
	c.static[name] = static
	b.add(name, specs.ActAllow, allow)
	b.add(name, specs.ActNotify, ask)
}

// split makes disjoint rules: what is allowed at once, and what is asked about. The
// former is as much of always as can be said in rules with one condition each that
// leave a rest which can be said so, too; the latter at least the rest of ever, and
// may be more, which the table then decides as the phase says.
func split(name string, always, ever region) (static region, allow, ask [][]specs.LinuxSeccompArg) {
	if _, one := argument(always, ever); one {
		if rest, err := ever.spread(always); err == nil {
			allow, ok := always.rules(false)
			ask, ok2 := loosen(rest, always).rules(true)
			if ok && ok2 && len(allow)+len(ask) <= maxCallRules {
				return always, allow, ask
			}
		}
	}
	// The one form that leaves most calls alone; for clone that of threads, which is
	// in the floor.
	best := -1
	for i, b := range always {
		if at, one := argument(region{b}); !one || at < 0 || b[at].mask&above != 0 {
			continue
		}
		thread := name != "clone" || b.covers(threadBox)
		if thread && (best < 0 || masks(b) < masks(always[best])) {
			best = i
		}
	}
	if best >= 0 {
		static = region{always[best]}
		if rest, err := anything.spread(static); err == nil {
			allow, ok := static.rules(false)
			ask, ok2 := rest.rules(false)
			if ok && ok2 {
				return static, allow, ask
			}
		}
	}
	return nil, nil, [][]specs.LinuxSeccompArg{nil}
}

var threadBox = box{0: bits{cloneThread | cloneNamespaces, cloneThread}}

// masks counts the bits that a box fixes.
func masks(b box) (n int) {
	for i := range b {
		for m := b[i].mask; m != 0; m &= m - 1 {
			n++
		}
	}
	return n
}

// loosen makes what is above 32 bits one form, where that stays apart from always:
// there is no condition for a part of it.
func loosen(rest, always region) region {
	out := slices.Clone(rest)
	for i := range out {
		for j := range out[i] {
			if out[i][j].mask&above == 0 || out[i][j].val&above == 0 {
				continue
			}
			var wide box
			wide[j] = bits{above, above}
			if slices.ContainsFunc(always, func(b box) bool { return !b.disjoint(wide) }) {
				return region{{0: bits{1, 1}, 1: bits{1, 1}}} // can't be said in rules
			}
			out[i] = wide
		}
	}
	return out.tidy()
}

// tell lists the forms of a call with their phases and mechanisms.
func (c *phaseCompiler) tell(name string, always region) {
	mechanism, hook := MechanismStatic, c.hooked[name]
	switch {
	case c.unenforced[name]:
		mechanism = MechanismNone
	case hook != "":
		mechanism = MechanismHook
	case c.notified[name]:
		mechanism = MechanismNotify
	}
	if mechanism == MechanismNotify {
		always = c.static[name]
	}
	everywhere := always
	for _, phase := range c.Phases {
		both, err := everywhere.and(c.regions[phase][name])
		if err != nil {
			both = nil
		}
		everywhere = both
	}
	if len(everywhere) > 0 {
		c.Calls = append(c.Calls, PhaseCall{Name: name, Form: everywhere.String(), Mechanism: MechanismStatic, Phases: c.all()})
	}
	var rows []PhaseCall
	row := func(phase string, r region, m Mechanism, hook string) {
		if len(r) == 0 {
			return
		}
		form := r.tidy().String()
		if i := slices.IndexFunc(rows, func(r PhaseCall) bool { return r.Form == form && r.Mechanism == m }); i >= 0 {
			rows[i].Phases = append(rows[i].Phases, phase)
			return
		}
		rows = append(rows, PhaseCall{Name: name, Form: form, Mechanism: m, Hook: hook, Phases: []string{phase}})
	}
	for _, phase := range c.all() {
		whole := c.regions[phase][name]
		// What the first filter allows, and a ratchet may not.
		static, err := whole.and(always)
		if err == nil {
			static, err = static.minus(everywhere)
		}
		rest, err2 := whole.minus(always)
		if err != nil || err2 != nil {
			static, rest = nil, whole
		}
		row(phase, static, MechanismRatchet, "")
		row(phase, rest, mechanism, hook)
	}
	c.Calls = append(c.Calls, rows...)
}

// gaps lists what was asked for and isn't had.
func (c *phaseCompiler) gaps(o PhaseOptions) {
	if !c.host.Notify && len(c.unenforced) > 0 {
		var starts []string
		byPhases := map[string][]string{}
		for name := range c.unenforced {
			var without []string
			for _, phase := range c.Phases {
				if ok, err := c.union(name).within(c.regions[phase][name]); err != nil || !ok {
					without = append(without, phase)
				}
			}
			if c.onlyAtStart(name) {
				starts = append(starts, name)
				continue
			}
			key := strings.Join(without, " ")
			byPhases[key] = append(byPhases[key], name)
		}
		for _, key := range slices.Sorted(maps.Keys(byPhases)) {
			c.Gaps = append(c.Gaps, PhaseGap{strings.Fields(key), "still allowed: " + strings.Join(sorted(byPhases[key]), " "), noNotify, notifyRemedy})
		}
		if len(starts) > 0 {
			c.Gaps = append(c.Gaps, PhaseGap{slices.Clone(c.Phases), "still allowed, because container runtimes start with it: " + strings.Join(sorted(starts), " "), noNotify, notifyRemedy})
		}
	}
	for _, p := range c.set.Phases {
		switch {
		case !p.Irreversible:
		case !c.host.Inject:
			c.Gaps = append(c.Gaps, PhaseGap{[]string{p.Name}, "it is left if the supervisor says so", "no filter can be put on running tasks", "give syslatchd CAP_SYS_PTRACE and CAP_SYS_ADMIN, and no filter of its own"})
		case !c.host.Notify:
			c.Gaps = append(c.Gaps, PhaseGap{[]string{p.Name}, "what begins in it, or is executed in it from outside, is not given its filter", noNotify, notifyRemedy})
		}
	}
	if o.Log && !c.host.Denials {
		c.Gaps = append(c.Gaps, PhaseGap{
			slices.Clone(c.Phases), "what the filter denies by itself is not told",
			"what filters deny can't be seen here, or no runtime knows SECCOMP_FILTER_FLAG_LOG",
			"give syslatchd CAP_BPF and CAP_PERFMON, or CAP_AUDIT_READ; take runc 1.2, or crun; or leave logDenials out of the policy",
		})
	}
	if c.Listener && !c.host.WaitKillable {
		c.Notes = append(c.Notes, "a signal interrupts a call that waits for the supervisor, which is then asked again: SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV is not supported here (libseccomp 2.6, Linux 5.19)")
	}
	if missing := MissingForStart(c.Profile, o.Runtime, true); len(missing) > 0 {
		c.Notes = append(c.Notes, "no container starts: its runtime needs "+strings.Join(missing, " "))
	}
	reading, err := regionOf("openat", readingOpen("openat"))
	if ok, e := reading.within(c.regions[c.set.Initial]["openat"]); err == nil && e == nil && !ok {
		c.Notes = append(c.Notes, "phase "+c.set.Initial+" is initial and opens no files: a program with shared libraries doesn't start in it")
	}
}

// Why nobody can be asked, and what to do.
const (
	noNotify     = "nobody can be asked: there is no SCMP_ACT_NOTIFY with a listener"
	notifyRemedy = "use runc 1.2 or crun 1.9 or later, linked with libseccomp 2.5 or later, on Linux 5.0 or later"
)

func (c *phaseCompiler) onlyAtStart(name string) bool {
	return !slices.ContainsFunc(c.Phases, func(phase string) bool { return len(c.regions[phase][name]) > 0 })
}

// ringGaps tells of io_uring, whose rings outlive a phase.
func (c *phaseCompiler) ringGaps() {
	var with, without []string
	for _, phase := range c.Phases {
		if len(c.regions[phase]["io_uring_setup"]) > 0 {
			with = append(with, phase)
		} else {
			without = append(without, phase)
		}
	}
	if len(with) == 0 {
		return
	}
	const remedy = "leave io_uring_setup out"
	if len(without) > 0 {
		c.Gaps = append(c.Gaps, PhaseGap{without, "a ring that was made in " + strings.Join(with, ", ") + " goes on", "io_uring does its work past filters", remedy})
	}
	if !c.host.LSM {
		c.Gaps = append(c.Gaps, PhaseGap{with, "io_uring opens files and connects whatever the phase allows", "io_uring does its work past filters, and there is no BPF LSM", remedy + ", or boot a kernel with BPF LSM"})
	}
}

const (
	noLSM     = "a filter sees no paths and no open files, and there is no BPF LSM"
	bootLSM   = "boot a kernel with CONFIG_BPF_LSM=y and bpf in its lsm= list"
	noSockets = "a filter doesn't see what a descriptor is, and there is no BPF LSM"
	noAddress = "a filter sees no addresses, and there are neither cgroup/connect programs nor BPF LSM"
)

// fileGaps adds the hooks for paths and open files, or the gaps.
func (c *phaseCompiler) fileGaps() {
	paths, writing := map[string]string{}, map[string]string{}
	var writers, readers, withPaths []string
	for _, p := range c.set.Phases {
		if p.ReadPaths != nil || len(p.WritePaths) > 0 {
			paths[p.Name] = "read " + pathList(p.ReadPaths) + "; write " + pathList(p.WritePaths)
			withPaths = append(withPaths, p.Name)
		}
		if changes := c.changes(p.Name); len(p.WritePaths) > 0 && len(changes) > 0 {
			c.Gaps = append(c.Gaps, PhaseGap{
				[]string{p.Name},
				"files elsewhere can be changed, too, by " + strings.Join(changes, " "),
				"paths are looked at where a file is opened, and nowhere else", "leave these calls out of a phase that has write paths",
			})
		}
		if c.writes(p.Name) {
			writers = append(writers, p.Name)
			writing[p.Name] = "any"
		} else {
			readers = append(readers, p.Name)
			writing[p.Name] = onlyReading
		}
	}
	if len(withPaths) > 0 {
		if c.host.LSM {
			c.addPaths(paths)
		} else {
			for _, phase := range withPaths {
				c.Gaps = append(c.Gaps, PhaseGap{[]string{phase}, "files elsewhere can be opened, too (" + paths[phase] + ")", noLSM, bootLSM})
			}
		}
	}
	if c.host.LSM {
		c.treeGaps(writers)
	}
	if len(writers) == 0 || len(readers) == 0 {
		return
	}
	if c.host.LSM {
		c.Hooks = append(c.Hooks, PhaseHook{Program: "lsm/file_permission", Allows: writing})
	} else {
		c.Gaps = append(c.Gaps, PhaseGap{readers, "files that were opened for writing in " + strings.Join(writers, ", ") + " stay writable", noLSM, bootLSM})
	}
	c.Notes = append(c.Notes, "files that were mapped shared and writable in "+strings.Join(writers, ", ")+" stay so until they are unmapped")
}

// treeGaps tells of what a hook can't undo, or doesn't see, of paths.
func (c *phaseCompiler) treeGaps(writers []string) {
	for _, p := range c.set.Phases {
		if len(p.WritePaths) == 0 {
			continue
		}
		others := slices.DeleteFunc(slices.Clone(writers), func(other string) bool {
			return other == p.Name || inside(c.phase(other).WritePaths, p.WritePaths)
		})
		if len(others) > 0 {
			c.Gaps = append(c.Gaps, PhaseGap{
				[]string{p.Name},
				"files elsewhere that were opened for writing in " + strings.Join(others, ", ") + " stay writable",
				"paths are looked at where a file is opened, and nowhere else", "give them the same write paths, or none to one of them",
			})
		}
		c.Notes = append(c.Notes, "phase "+p.Name+" denies an open that would make a file outside of its write paths when the file is made, which stays, empty")
	}
}

// changes lists the calls by which a phase changes files that it names, other than by
// opening them.
func (p *PhasePlan) changes(phase string) (names []string) {
	for _, name := range fileChanges {
		if name != "umask" && len(p.regions[phase][name]) > 0 {
			names = append(names, name)
		}
	}
	return sorted(names)
}

// writes says whether a phase opens files for writing.
func (p *PhasePlan) writes(phase string) bool {
	if len(p.regions[phase]["creat"]) > 0 || len(p.regions[phase]["openat2"]) > 0 {
		return true
	}
	for _, name := range []string{"open", "openat"} {
		reading, err := regionOf(name, readingOpen(name))
		if err != nil {
			return true
		}
		if only, err := p.regions[phase][name].within(reading); err != nil || !only {
			return true
		}
	}
	return false
}

func (c *phaseCompiler) addPaths(paths map[string]string) {
	i := slices.IndexFunc(c.Hooks, func(h PhaseHook) bool { return h.Program == "lsm/file_open" })
	if i < 0 {
		c.Hooks = append(c.Hooks, PhaseHook{Program: "lsm/file_open", Allows: paths})
		return
	}
	for phase, text := range paths {
		c.Hooks[i].Allows[phase] += "; " + text
	}
}

func pathList(list []string) string {
	switch {
	case list == nil:
		return "anywhere"
	case len(list) == 0:
		return "nowhere"
	}
	return strings.Join(list, " ")
}

// networkGaps adds the hooks for addresses and open sockets, or the gaps.
func (c *phaseCompiler) networkGaps() {
	allows := map[string]string{}
	var bound, cut, connecting []string
	for _, p := range c.set.Phases {
		connects := len(c.regions[p.Name]["connect"]) > 0 || len(c.regions[p.Name]["sendto"]) > 0 || len(c.regions[p.Name]["sendmsg"]) > 0 || len(c.regions[p.Name]["sendmmsg"]) > 0
		switch {
		case len(p.Network) > 0:
			allows[p.Name] = strings.Join(p.Network, " ")
			bound = append(bound, p.Name)
		case p.Network != nil:
			allows[p.Name] = "none"
		}
		if connects {
			connecting = append(connecting, p.Name)
		} else {
			cut = append(cut, p.Name)
		}
	}
	switch {
	case len(bound) == 0:
	case c.host.CgroupConnect:
		c.Hooks = append(c.Hooks, PhaseHook{Program: cgroupAddresses, Allows: allows})
		if !c.host.LSM {
			c.Gaps = append(c.Gaps, PhaseGap{bound, "other addresses can be reached by raw sockets, and by sockets from outside of the cgroup", "programs of cgroups don't see them, and there is no BPF LSM", bootLSM})
		}
	case c.host.LSM:
		c.Hooks = append(c.Hooks, PhaseHook{Program: lsmAddresses, Allows: allows})
	default:
		for _, phase := range bound {
			c.Gaps = append(c.Gaps, PhaseGap{[]string{phase}, "other addresses can be reached, too (" + allows[phase] + ")", noAddress, "boot a kernel with CONFIG_CGROUP_BPF=y, and mount cgroup v2"})
		}
	}
	// open is what sockets that exist are good for.
	open, differs := map[string]string{}, len(connecting) > 0 && len(cut) > 0
	for _, phase := range cut {
		open[phase] = noSocket
	}
	for _, phase := range connecting {
		open[phase] = anySocket
		others := slices.DeleteFunc(slices.Clone(connecting), func(other string) bool {
			return slices.Equal(c.phase(other).Network, c.phase(phase).Network)
		})
		if c.phase(phase).Network == nil || len(others) == 0 {
			continue
		}
		open[phase], differs = allows[phase], true
		if !c.host.LSM {
			c.Gaps = append(c.Gaps, PhaseGap{[]string{phase}, "sockets that were connected in " + strings.Join(others, ", ") + " go on", noSockets, bootLSM})
		}
	}
	switch {
	case !differs:
	case c.host.LSM:
		c.Hooks = append(c.Hooks, PhaseHook{Program: lsmOpenSockets, Allows: open})
	case len(cut) > 0:
		c.Gaps = append(c.Gaps, PhaseGap{cut, "sockets that were connected in " + strings.Join(connecting, ", ") + " go on, with read and write", noSockets, bootLSM})
	}
}

// DeniedSummary is one line on how calls that no phase allows are answered.
func (p *PhasePlan) DeniedSummary() string {
	for _, r := range p.Profile.Syscalls {
		if r.Action == specs.ActErrno {
			return "EPERM; ENOSYS, so that a libc takes another: " + strings.Join(r.Names, " ")
		}
	}
	return "EPERM"
}
