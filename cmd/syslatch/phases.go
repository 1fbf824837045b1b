// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/spf13/cobra"

	"github.com/syslatch/syslatch/internal/cli"
	"github.com/syslatch/syslatch/internal/doctor"
	"github.com/syslatch/syslatch/internal/policy"
	"github.com/syslatch/syslatch/internal/seccomp"
	"github.com/syslatch/syslatch/profiles"
)

func newProfileGroupsCommand() *cobra.Command {
	var output string
	c := &cobra.Command{
		Use:   "groups [GROUP]",
		Short: "List the groups of system calls that phases may name, or a group's calls",
		Long: `Lists the groups that a phase of a policy may allow, or the calls of one, with the
conditions under which it allows them. "@floor" is what every phase allows; it can't
be named in a policy.`,
		Example: `  syslatch profile groups
  syslatch profile groups @file-read
  syslatch profile groups -o json | jq -r '.[] | .name'`,
		Args: cli.Args(cobra.MaximumNArgs(1)),
		ValidArgsFunction: func(_ *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
			var offers []string
			for _, g := range groupsAndFloor() {
				if len(args) == 0 && strings.HasPrefix(g.Name, prefix) {
					offers = append(offers, g.Name)
				}
			}
			return offers, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(c *cobra.Command, args []string) error {
			if err := cli.CheckOutput(output); err != nil {
				return err
			}
			all := groupsAndFloor()
			if len(args) == 0 {
				return listGroups(c.OutOrStdout(), all, output)
			}
			i := slices.IndexFunc(all, func(g profiles.Group) bool {
				return strings.TrimPrefix(g.Name, "@") == strings.TrimPrefix(args[0], "@")
			})
			if i < 0 {
				return fmt.Errorf("no group %q ('syslatch profile groups' lists them)", args[0])
			}
			return showGroup(c.OutOrStdout(), &all[i], output)
		},
	}
	cli.OutputFlag(c, &output)
	return c
}

// groupsAndFloor are the groups, and the floor in the form of one.
func groupsAndFloor() []profiles.Group {
	all := append(profiles.Groups(), profiles.Group{
		Name: "@floor", About: "what every phase allows, whatever its policy says",
		Rules: []profiles.PhaseRule{{Names: profiles.WholePhaseFloor()}, profiles.Threads()},
	})
	slices.SortFunc(all, func(a, b profiles.Group) int { return strings.Compare(a.Name, b.Name) })
	return all
}

func listGroups(w io.Writer, all []profiles.Group, output string) error {
	if output == "json" {
		return writeJSON(w, all)
	}
	return table(w, "GROUP\tCALLS\tABOUT", func(row func(...any)) {
		for _, g := range all {
			row(g.Name, len(g.Calls()), g.About)
		}
	})
}

func showGroup(w io.Writer, g *profiles.Group, output string) error {
	if output == "json" {
		return writeJSON(w, g)
	}
	fmt.Fprintf(w, "%s: %s\n", g.Name, g.About)
	for _, r := range g.Rules {
		if len(r.Args) == 0 {
			fmt.Fprintf(w, "\n%s", wrap(r.Names, 78))
		}
	}
	for _, r := range g.Rules {
		if len(r.Args) > 0 {
			fmt.Fprintf(w, "\n%s where %s\n", strings.Join(r.Names, " "), r.Form())
		}
	}
	return nil
}

type phasesFlags struct {
	policy, phase, runtime string
	assume                 string
	output                 string
	host                   doctor.Options
}

func newProfilePhasesCommand() *cobra.Command {
	var f phasesFlags
	c := &cobra.Command{
		Use:   "phases POLICY",
		Short: "Show what a policy's phases compile to, and what can't be enforced here",
		Long: `Reads a policy file, compiles the phases of one policy of it, and shows which calls
are allowed in which phase, and by what: the one seccomp filter of the container, BPF
programs, a supervisor that the filter asks, or a tighter filter that an irreversible
phase puts on every task. "start" is the time until the container's program is
executed: the initial phase, and what the runtime calls until then.

Then it says what can't be enforced on this host, why, and what would help. The host
is looked at as 'syslatch doctor' does; --assume takes its place, a list of notify,
wait-killable, lsm, cgroup-connect, inject and denials, or all, or none.

JSON output has the schema ` + phasesSchema + `; fields may be added to it.

Exit status: 0 the phases compile, whether all can be enforced here or not; 1 the
file has faults, or they don't; 2 the command line is wrong.`,
		Example: `  syslatch profile phases phases.yaml
  syslatch profile phases phases.yaml --policy agent --phase read_only
  syslatch profile phases phases.yaml --assume all -o json | jq .profile`,
		Args: cli.Args(func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return errors.New("say which policy file")
			}
			return nil
		}),
		ValidArgsFunction: func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			if len(args) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			return []string{"yaml", "yml", "conf"}, cobra.ShellCompDirectiveFilterFileExt
		},
		RunE: func(c *cobra.Command, args []string) error { return f.run(c, args[0]) },
	}
	fl := c.Flags()
	fl.StringVar(&f.policy, "policy", "", "`name` of the policy (default: the one that has phases)")
	fl.StringVar(&f.phase, "phase", "", "show this `phase` alone")
	fl.StringVar(&f.runtime, "runtime", "", "the OCI `runtime` that starts the container, runc or crun (default: either)")
	fl.StringVar(&f.assume, "assume", "", "`features` to assume of the host, instead of looking at it")
	fl.StringVar(&f.host.ContainerdConfig, "containerd-config", "", "containerd's configuration `file` (default: as containerd finds it)")
	cli.Must(c.RegisterFlagCompletionFunc("runtime", cobra.FixedCompletions([]string{"runc", "crun"}, cobra.ShellCompDirectiveNoFileComp)))
	cli.Must(c.RegisterFlagCompletionFunc("assume", cobra.FixedCompletions(append([]string{"all", "none"}, hostFeatures...), cobra.ShellCompDirectiveNoFileComp)))
	cli.Must(c.RegisterFlagCompletionFunc("policy", func(_ *cobra.Command, args []string, _ string) (names []string, _ cobra.ShellCompDirective) {
		if file, err := policy.Load(strings.Join(args, ""), policyOptions); err == nil {
			for i := range file.Policies {
				if file.Policies[i].Phases != nil {
					names = append(names, file.Policies[i].Name)
				}
			}
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	}))
	cli.Must(c.RegisterFlagCompletionFunc("phase", func(_ *cobra.Command, args []string, _ string) (names []string, _ cobra.ShellCompDirective) {
		if p, err := loadPhases(strings.Join(args, ""), f.policy, "--policy"); err == nil {
			names = phaseNames(p)
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	}))
	cli.OutputFlag(c, &f.output)
	return c
}

var policyOptions = policy.Options{KnownCall: seccomp.Known, Phases: true}

// loadPhases is the policy of a file that is named, or the one that has phases.
func loadPhases(path, name, flag string) (*policy.Policy, error) {
	file, err := policy.Load(path, policyOptions)
	if err != nil {
		return nil, err
	}
	return pickPhases(file, path, name, flag)
}

const phasesSchema = "syslatch.dev/phases/v1"

var hostFeatures = []string{"notify", "wait-killable", "lsm", "cgroup-connect", "inject", "denials"}

// featuresOf are the fields of a host by the names of hostFeatures.
func featuresOf(h *profiles.PhaseHost) []*bool {
	return []*bool{&h.Notify, &h.WaitKillable, &h.LSM, &h.CgroupConnect, &h.Inject, &h.Denials}
}

func parseAssume(text string) (h profiles.PhaseHost, err error) {
	for name := range strings.SplitSeq(text, ",") {
		i := slices.Index(hostFeatures, name)
		switch {
		case name == "none" && text == name:
		case name == "all" && text == name:
			for _, b := range featuresOf(&h) {
				*b = true
			}
		case i >= 0:
			*featuresOf(&h)[i] = true
		default:
			return h, fmt.Errorf("--assume %q: want %s, or all or none alone", text, strings.Join(hostFeatures, ", "))
		}
	}
	return h, nil
}

func (f *phasesFlags) run(c *cobra.Command, path string) error {
	if err := cli.CheckOutput(f.output); err != nil {
		return err
	}
	if f.runtime != "" && f.runtime != "runc" && f.runtime != "crun" {
		return cli.Usage(fmt.Errorf("--runtime %q: want runc or crun", f.runtime))
	}
	var host profiles.PhaseHost
	var checks []doctor.Check
	if f.assume != "" {
		var err error
		if host, err = parseAssume(f.assume); err != nil {
			return cli.Usage(err)
		}
	}
	p, err := loadPhases(path, f.policy, "--policy")
	if err != nil {
		return err
	}
	if f.assume == "" {
		host, checks = doctor.Examine(c.Context(), doctor.System(), f.host).PhaseHost(f.runtime)
	}
	plan, err := profiles.CompilePhases(p.Set(), host, profiles.PhaseOptions{
		Architectures: p.Architectures, Runtime: f.runtime, NewerThanKernel: seccomp.NewerThan(seccomp.KernelRelease()),
	})
	if err != nil {
		return err
	}
	for name, filter := range allFilters(plan) {
		if err := seccomp.Check(filter); err != nil {
			return fmt.Errorf("filter of %s: %w", name, err)
		}
	}
	v := newPhasesView(p, host, checks, plan)
	if f.phase != "" {
		v.Phases = slices.DeleteFunc(v.Phases, func(x phaseView) bool { return x.Name != f.phase })
		if len(v.Phases) == 0 {
			return cli.Usage(fmt.Errorf("--phase %q: want %s", f.phase, strings.Join(plan.Phases, ", ")))
		}
	}
	if f.output == "json" {
		return writeJSON(c.OutOrStdout(), v)
	}
	if f.phase != "" {
		return v.writePhase(c.OutOrStdout(), plan)
	}
	return v.write(c.OutOrStdout(), plan)
}

// pickPhases is the policy that was named, or the one that has phases. flag is how one
// is named.
func pickPhases(file *policy.File, path, name, flag string) (*policy.Policy, error) {
	var with []string
	var found *policy.Policy
	for i := range file.Policies {
		p := &file.Policies[i]
		if name != "" && p.Name == name {
			if p.Phases == nil {
				return nil, fmt.Errorf("%s: policy %q has no phases", path, p.Name)
			}
			return p, nil
		}
		if p.Phases != nil {
			with, found = append(with, p.Name), p
		}
	}
	switch {
	case len(with) == 0:
		return nil, fmt.Errorf("%s: no policy has phases", path)
	case name != "":
		return nil, fmt.Errorf("%s: no policy %q; with phases: %s", path, name, strings.Join(with, ", "))
	case len(with) > 1:
		return nil, cli.Usage(fmt.Errorf("%s has several policies with phases, say %s with one of %s", path, flag, strings.Join(with, ", ")))
	}
	return found, nil
}

func allFilters(plan *profiles.PhasePlan) map[string]*specs.LinuxSeccomp {
	out := maps.Clone(plan.Ratchets)
	out["the container"] = plan.Profile
	return out
}

// phasesView is `profile phases -o json`.
type phasesView struct {
	Schema  string               `json:"schema"`
	Policy  string               `json:"policy"`
	Initial string               `json:"initial"`
	Host    profiles.PhaseHost   `json:"host"`
	Checks  []doctor.Check       `json:"checks"` // by which Host is known; none under --assume
	Phases  []phaseView          `json:"phases"`
	Calls   []profiles.PhaseCall `json:"calls"`
	Hooks   []profiles.PhaseHook `json:"hooks"`
	Gaps    []profiles.PhaseGap  `json:"gaps"`
	Notes   []string             `json:"notes"`
	// Start is the supervisor's table until the container's program is executed.
	Start   *profiles.PhaseTable `json:"start"`
	Profile *specs.LinuxSeccomp  `json:"profile"`
}

type phaseView struct {
	Name         string   `json:"name"`
	Next         []string `json:"next"`
	Irreversible bool     `json:"irreversible,omitempty"`
	// TightenedBy are the phases that allow nothing that this one doesn't.
	TightenedBy []string             `json:"tightenedBy"`
	ReadPaths   []string             `json:"readPaths"`  // null: any
	WritePaths  []string             `json:"writePaths"` // null: any
	Network     []string             `json:"network"`    // null: any
	Limits      policy.Limits        `json:"limits,omitzero"`
	Table       *profiles.PhaseTable `json:"table"`
	Ratchet     *specs.LinuxSeccomp  `json:"ratchet,omitempty"`
}

func newPhasesView(p *policy.Policy, host profiles.PhaseHost, checks []doctor.Check, plan *profiles.PhasePlan) *phasesView {
	v := &phasesView{
		Schema: phasesSchema, Policy: p.Name, Initial: p.Phases.Initial, Host: host, Checks: notNil(checks),
		Calls: plan.Calls, Hooks: notNil(plan.Hooks), Gaps: notNil(plan.Gaps), Notes: notNil(plan.Notes),
		Start: plan.Table(profiles.StartPhase, seccomp.Number), Profile: plan.Profile,
	}
	set := p.Set()
	for _, phase := range p.Phases.Phases {
		x := phaseView{
			Name: phase.Name, Next: []string{}, Irreversible: phase.Irreversible, TightenedBy: []string{},
			ReadPaths: phase.ReadPaths, WritePaths: phase.WritePaths, Network: phase.Network, Limits: phase.Limits,
			Table: plan.Table(phase.Name, seccomp.Number), Ratchet: plan.Ratchets[phase.Name],
		}
		for _, other := range plan.Phases {
			if set.May(phase.Name, other) {
				x.Next = append(x.Next, other)
				if plan.Tightens(phase.Name, other) {
					x.TightenedBy = append(x.TightenedBy, other)
				}
			}
		}
		v.Phases = append(v.Phases, x)
	}
	return v
}

func notNil[T any](list []T) []T { return append([]T{}, list...) }

func (v *phasesView) writeHead(w io.Writer) {
	fmt.Fprintf(w, "policy %s, initial phase %s\n", v.Policy, v.Initial)
	var has []string
	for i, b := range featuresOf(&v.Host) {
		if *b {
			has = append(has, hostFeatures[i])
		}
	}
	if len(has) == 0 {
		has = []string{"nothing"}
	}
	from := "assumed"
	if len(v.Checks) > 0 {
		from = "as syslatch doctor finds"
	}
	fmt.Fprintf(w, "host has %s (%s)\n\n", strings.Join(has, " "), from)
}

func (v *phasesView) write(w io.Writer, plan *profiles.PhasePlan) error {
	v.writeHead(w)
	err := table(w, "PHASE\tNEXT\tFILES\tNETWORK\tLIMITS", func(row func(...any)) {
		for _, p := range v.Phases {
			next := strings.Join(p.Next, " ")
			if next == "" {
				next = "-"
			}
			row(p.Name, next, p.files(), p.network(), p.limits())
		}
	})
	if err != nil {
		return err
	}
	static, others := groupCalls(v.Calls)
	fmt.Fprintf(w, "\nIn every phase, by the filter:\n%s", wrap(static, 78))
	for _, m := range []struct {
		mechanism profiles.Mechanism
		heading   string
	}{
		{profiles.MechanismStatic, ""},
		{profiles.MechanismRatchet, "By the filter, until an irreversible phase denies it by one of its own:"},
		{profiles.MechanismHook, "By BPF programs:"},
		{profiles.MechanismNotify, "Asked of the supervisor (SCMP_ACT_NOTIFY):"},
		{profiles.MechanismNone, "Allowed in every phase, because it can't be enforced here:"},
	} {
		var rows []callGroup
		for _, g := range others {
			if g.Mechanism == m.mechanism {
				rows = append(rows, g)
			}
		}
		if len(rows) > 0 {
			fmt.Fprintf(w, "\n%s\n", m.heading)
			for _, g := range rows {
				g.write(w)
			}
		}
	}
	fmt.Fprintf(w, "\nEvery other call: %s\n", plan.DeniedSummary())
	if len(v.Hooks) > 0 {
		fmt.Fprintln(w)
		tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
		fmt.Fprintln(tw, "BPF PROGRAM\tPHASE\tALLOWS")
		for _, h := range v.Hooks {
			for _, phase := range append([]string{profiles.StartPhase}, plan.Phases...) {
				if allows, ok := h.Allows[phase]; ok {
					fmt.Fprintf(tw, "%s\t%s\t%s\n", h.Program, phase, allows)
				}
			}
		}
		if err := tw.Flush(); err != nil {
			return err
		}
	}
	return v.writeGaps(w, func([]string) bool { return true })
}

func (v *phasesView) writeGaps(w io.Writer, of func(phases []string) bool) error {
	gaps := slices.DeleteFunc(slices.Clone(v.Gaps), func(g profiles.PhaseGap) bool { return !of(g.Phases) })
	if len(gaps) == 0 {
		fmt.Fprintln(w, "\nAll of it can be enforced here.")
	} else {
		fmt.Fprintln(w, "\nCan't be enforced here:")
	}
	for _, g := range gaps {
		fmt.Fprintf(w, "- %s: %s\n  why: %s\n  remedy: %s\n", strings.Join(g.Phases, ", "), g.What, g.Why, g.Remedy)
	}
	for _, n := range v.Notes {
		fmt.Fprintf(w, "note: %s\n", n)
	}
	return nil
}

// writePhase shows the one phase that is left in v.
func (v *phasesView) writePhase(w io.Writer, plan *profiles.PhasePlan) error {
	v.writeHead(w)
	p := v.Phases[0]
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintf(tw, "phase\t%s\n", p.Name)
	if p.Irreversible {
		fmt.Fprintf(tw, "next\tnone, it is irreversible\n")
	} else {
		fmt.Fprintf(tw, "next\t%s\n", strings.Join(p.Next, " "))
		if len(p.TightenedBy) > 0 {
			fmt.Fprintf(tw, "tighter\t%s\n", strings.Join(p.TightenedBy, " "))
		}
	}
	fmt.Fprintf(tw, "files\t%s\nnetwork\t%s\nlimits\t%s\n", p.files(), p.network(), p.limits())
	for _, h := range v.Hooks {
		if allows, ok := h.Allows[p.Name]; ok {
			fmt.Fprintf(tw, "%s\t%s\n", h.Program, allows)
		}
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	var allowed, denied []profiles.PhaseCall
	for _, c := range v.Calls {
		if slices.Contains(c.Phases, p.Name) {
			allowed = append(allowed, c)
		} else if !slices.Equal(c.Phases, []string{profiles.StartPhase}) {
			denied = append(denied, c)
		}
	}
	for _, list := range []struct {
		heading string
		calls   []profiles.PhaseCall
	}{{"Allowed", allowed}, {"Denied here, and allowed in another phase", denied}} {
		byMechanism := map[profiles.Mechanism][]string{}
		for _, c := range list.calls {
			m := c.Mechanism
			if m == profiles.MechanismRatchet && !p.Irreversible {
				m = profiles.MechanismStatic // this phase knows no ratchet
			}
			byMechanism[m] = append(byMechanism[m], withForm(c))
		}
		for _, m := range slices.Sorted(maps.Keys(byMechanism)) {
			fmt.Fprintf(w, "\n%s (%s):\n%s", list.heading, m, wrap(byMechanism[m], 78))
		}
	}
	fmt.Fprintf(w, "\nEvery other call: %s\n", plan.DeniedSummary())
	return v.writeGaps(w, func(phases []string) bool { return slices.Contains(phases, p.Name) })
}

func withForm(c profiles.PhaseCall) string {
	if c.Form == "any" {
		return c.Name
	}
	return c.Name + "[" + c.Form + "]"
}

// callGroup are calls of which the same can be said.
type callGroup struct {
	profiles.PhaseCall
	names []string
}

// groupCalls separates what every phase allows in the filter from the rest.
func groupCalls(calls []profiles.PhaseCall) (static []string, others []callGroup) {
	for _, c := range calls {
		if c.Mechanism == profiles.MechanismStatic {
			static = append(static, withForm(c))
			continue
		}
		i := slices.IndexFunc(others, func(g callGroup) bool {
			return g.Mechanism == c.Mechanism && g.Form == c.Form && g.Hook == c.Hook && slices.Equal(g.Phases, c.Phases)
		})
		if i < 0 {
			i = len(others)
			others = append(others, callGroup{PhaseCall: c})
		}
		others[i].names = append(others[i].names, c.Name)
	}
	return static, others
}

func (g *callGroup) write(w io.Writer) {
	fmt.Fprintf(w, "  in %s", strings.Join(g.Phases, ", "))
	if g.Form != "any" {
		fmt.Fprintf(w, ", where %s", g.Form)
	}
	if g.Hook != "" {
		fmt.Fprintf(w, " (%s)", g.Hook)
	}
	fmt.Fprintln(w, ":")
	for line := range strings.Lines(wrap(g.names, 74)) {
		fmt.Fprintf(w, "    %s", line)
	}
}

func (p *phaseView) files() string {
	var parts []string
	if p.ReadPaths != nil {
		parts = append(parts, "read "+strings.Join(p.ReadPaths, " "))
	}
	switch {
	case p.WritePaths == nil:
	case len(p.WritePaths) == 0:
		parts = append(parts, "write none")
	default:
		parts = append(parts, "write "+strings.Join(p.WritePaths, " "))
	}
	if len(parts) == 0 {
		return "-"
	}
	return strings.Join(parts, "; ")
}

func (p *phaseView) network() string {
	switch {
	case p.Network == nil:
		return "-"
	case len(p.Network) == 0:
		return "none"
	}
	return strings.Join(p.Network, " ")
}

func (p *phaseView) limits() string {
	text, err := json.Marshal(p.Limits)
	if err != nil || string(text) == "{}" {
		return "-"
	}
	return string(text)
}
