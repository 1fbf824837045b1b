// SPDX-License-Identifier: Apache-2.0

package profiles

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestHookRules(t *testing.T) {
	const all = ^uint64(0)
	everything := HookRules{
		OpenRead: true, OpenWrite: true, WriteFiles: true, Exec: true, Families: all, Send: all, Receive: all,
		Connect: true, Bind: true, Listen: true, Accept: true,
	}
	with := func(change func(*HookRules)) HookRules {
		r := everything
		change(&r)
		return r
	}
	noNetwork := func(r *HookRules) {
		r.OpenWrite, r.WriteFiles = false, false
		r.Send, r.Receive = 0, 0
		r.Connect, r.Bind, r.Listen, r.Accept = false, false, false, false
	}
	// socket is static or asked about: no hook has its families.
	for _, tc := range []struct {
		host  PhaseHost
		phase string
		want  HookRules
	}{
		{everyHost, StartPhase, with(func(r *HookRules) { r.Connect, r.Bind, r.Listen, r.Accept = false, false, false, false })},
		{everyHost, "read_only", with(noNetwork)},
		{everyHost, "write_logs", with(func(r *HookRules) {
			noNetwork(r)
			r.OpenWrite, r.WriteFiles = true, true
			r.WritePaths = []string{"/var/log"}
		})},
		{everyHost, "network", with(func(r *HookRules) {
			r.OpenWrite, r.WriteFiles = false, false
			r.Network = []string{"10.0.0.0/8:443"}
		})},
		{everyHost, "nowhere", HookRules{ReadPaths: []string{}, WritePaths: []string{}, Network: []string{}}},
		{askHost, "read_only", everything},
		{askHost, "network", with(func(r *HookRules) { r.Network = []string{"10.0.0.0/8:443"} })},
		{PhaseHost{}, "network", everything},
	} {
		p := mustCompile(t, &agentSet, tc.host)
		got := p.HookRules(tc.phase)
		if h := p.hook("lsm/socket_create"); h != nil && tc.want.Families != 0 {
			got.Families = all // its regions are the other test's
		}
		if d := cmp.Diff(tc.want, got); d != "" {
			t.Errorf("%+v, %s (-want +got):\n%s", tc.host, tc.phase, d)
		}
	}
}

// What else passes a hook must not be denied by it.
func TestHookOthers(t *testing.T) {
	for name, hooked := range map[string]bool{"": true, "openat2": false, "open_by_handle_at": false, "mknodat": false, "unlinkat": true} {
		s := PhaseSet{Initial: "a", Phases: []Phase{
			{Name: "a", Allow: ruled("@file-read")},
			{Name: "b", Allow: ruled("@file-read", "openat")},
		}}
		if name != "" {
			s.Phases[0].Allow = append(s.Phases[0].Allow, ruled(name)...)
		}
		if got := mustCompile(t, &s, everyHost).hook("lsm/file_open") != nil; got != hooked {
			t.Errorf("with %s beside opens for reading: hooked %t, want %t", name, got, hooked)
		}
	}
}

// Groups of opens for reading and for writing together are all opens.
func TestHookGroups(t *testing.T) {
	s := PhaseSet{Initial: "a", Phases: []Phase{
		{Name: "a", Allow: ruled("@file-read")},
		{Name: "b", Allow: ruled("@file-read", "@file-write")},
	}}
	p := mustCompile(t, &s, everyHost)
	h := p.hook("lsm/file_open")
	if h == nil || !slices.Equal(h.Calls, []string{"open", "openat", "creat"}) {
		t.Fatalf("hook %+v", h)
	}
	if a, b := p.HookRules("a"), p.HookRules("b"); !a.OpenRead || a.OpenWrite || !b.OpenRead || !b.OpenWrite {
		t.Errorf("%+v, %+v", a, b)
	}
}

// A supervisor sees each execve, whatever hooks there are.
func TestHookExec(t *testing.T) {
	for _, host := range []PhaseHost{everyHost, {Notify: true, LSM: true}} {
		for _, c := range mustCompile(t, &agentSet, host).Calls {
			if c.Name == "execve" && c.Mechanism != MechanismNotify {
				t.Errorf("%+v: %+v", host, c)
			}
		}
	}
	p := mustCompile(t, &agentSet, PhaseHost{LSM: true})
	if p.HookRules("read_only").Exec || !p.HookRules(StartPhase).Exec {
		t.Error("without a supervisor the hook doesn't decide execve")
	}
}

func TestTreeGaps(t *testing.T) {
	phase := func(name string, trees ...string) Phase {
		return Phase{Name: name, Allow: ruled("@file-read", "openat"), WritePaths: trees}
	}
	for _, tc := range []struct {
		phases []Phase
		want   []string // phases with a gap
	}{
		{[]Phase{phase("a", "/log"), {Name: "b", Allow: ruled("@file-read")}}, nil},
		{[]Phase{phase("a", "/log"), phase("b", "/log/b")}, []string{"b"}},
		{[]Phase{phase("a", "/log"), phase("b", "/data")}, []string{"a", "b"}},
		{[]Phase{phase("a", "/log"), phase("b")}, []string{"a"}},
	} {
		p := mustCompile(t, &PhaseSet{Initial: "a", Phases: tc.phases}, everyHost)
		var got []string
		for _, g := range p.Gaps {
			if strings.Contains(g.What, "stay writable") {
				got = append(got, g.Phases...)
			}
		}
		if !slices.Equal(got, tc.want) {
			t.Errorf("gaps of %v, want %v: %v", got, tc.want, p.Gaps)
		}
	}
}
