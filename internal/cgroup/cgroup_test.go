// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func TestMountinfo(t *testing.T) {
	type result struct {
		Mode    Mode
		Unified string
		V1      map[string]string // controller -> mount point
		Err     string
	}
	for name, want := range map[string]result{
		"v2": {Mode: V2, Unified: "/sys/fs/cgroup"},
		"hybrid": {Mode: Hybrid, Unified: "/sys/fs/cgroup/unified", V1: map[string]string{
			"systemd": "/sys/fs/cgroup/systemd", "memory": "/sys/fs/cgroup/memory", "pids": "/sys/fs/cgroup/pids",
			"cpu": "/sys/fs/cgroup/cpu,cpuacct", "cpuacct": "/sys/fs/cgroup/cpu,cpuacct",
		}},
		"v1": {Mode: V1, V1: map[string]string{
			"systemd": "/sys/fs/cgroup/systemd", "memory": "/sys/fs/cgroup/memory", "pids": "/sys/fs/cgroup/pids",
			"cpu": "/sys/fs/cgroup/cpu,cpuacct", "cpuacct": "/sys/fs/cgroup/cpu,cpuacct",
		}},
		"pod":  {Mode: V2, Unified: "/host/sys/fs/cgroup v2"},
		"mark": {Mode: V2, Unified: "/sys/fs/cgroup", V1: map[string]string{"net_cls": "/opt/vpn/net_cls"}},
		"none": {Err: "no cgroup hierarchy is mounted (mount -t cgroup2 none /sys/fs/cgroup)"},
	} {
		t.Run(name, func(t *testing.T) {
			f, err := os.Open(filepath.Join("testdata", name+".mountinfo"))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			var got result
			h, err := parseMountinfo(f, nil)
			if err != nil {
				got.Err = err.Error()
			} else {
				got.Mode, got.Unified = h.Mode, h.Unified
				for _, c := range h.V1Controllers() {
					if got.V1 == nil {
						got.V1 = map[string]string{}
					}
					got.V1[c] = h.v1[c].point
				}
				if noV2 := errors.Is(h.RequireV2(), ErrNoV2); noV2 != (want.Mode == V1) {
					t.Errorf("RequireV2 gives ErrNoV2: %v", noV2)
				}
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// What a v1-only host is told must name both what is missing and how to get it.
func TestV1OnlyRefusal(t *testing.T) {
	h := &Hierarchy{Mode: V1, v1: map[string]mount{"memory": {"/sys/fs/cgroup/memory", "/"}}}
	for what, f := range map[string]func() error{
		"RequireV2": h.RequireV2,
		"OfPID":     func() error { _, err := h.OfPID(os.Getpid()); return err },
		"Path":      func() error { _, err := h.Path(1); return err },
	} {
		err := f()
		if !errors.Is(err, ErrNoV2) {
			t.Errorf("%s: %v, want ErrNoV2", what, err)
			continue
		}
		for _, word := range []string{"no cgroup v2", "systemd.unified_cgroup_hierarchy=1", "mount -t cgroup2"} {
			if !strings.Contains(err.Error(), word) {
				t.Errorf("%s: %q doesn't say %q", what, err, word)
			}
		}
	}
}

// A mount below another one's mount point can't be reached.
func TestMountinfoCovered(t *testing.T) {
	const text = `29 22 0:26 / /old rw - cgroup2 cgroup2 rw
30 22 0:26 / /new rw - cgroup2 cgroup2 rw
`
	h, err := parseMountinfo(strings.NewReader(text), func(point string, dev uint64) bool {
		return point == "/new" && dev == unix.Mkdev(0, 26)
	})
	if err != nil {
		t.Fatal(err)
	}
	if h.Unified != "/new" {
		t.Errorf("Unified = %s, want the mount that can be reached, /new", h.Unified)
	}
}

func TestBelow(t *testing.T) {
	for _, tt := range []struct{ root, path, want, err string }{
		{"/", "/", "/cg", ""},
		{"/", "/a/b", "/cg/a/b", ""},
		{"/a", "/a", "/cg", ""},
		{"/a", "/a/b", "/cg/b", ""},
		{"/a", "/ab", "", "not below /a"},
		{"/a", "/", "", "not below /a"},
		{"/", "/../b", "", "outside of this process's cgroup namespace"},
		// The host's tree, mounted where the reader's namespace begins lower.
		{"/../..", "/../../kube/pod", "/cg/kube/pod", ""},
		{"/../..", "/../..", "/cg", ""},
		{"/../..", "/../sibling", "", errInside.Error()},
		{"/../..", "/", "", errInside.Error()},
		{"/../..", "/../../../x", "", "outside of this process's cgroup namespace"},
		{"/../x", "/../x/y", "/cg/y", ""},
		{"/../x", "/y", "", "not below /../x"},
		{"/a", "/a/../..", "", "no path"},
	} {
		got, err := below(mount{"/cg", tt.root}, tt.path)
		switch {
		case tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)):
			t.Errorf("below(%s, %s): error %v, want %q", tt.root, tt.path, err, tt.err)
		case tt.err == "" && (err != nil || got != tt.want):
			t.Errorf("below(%s, %s) = %q, %v, want %q", tt.root, tt.path, got, err, tt.want)
		}
	}
}

func FuzzBelow(f *testing.F) {
	f.Add("/", "/a/b")
	f.Add("/../..", "/../../a")
	f.Add("/..", "/a/../../b")
	f.Add("....", "..../..")
	f.Fuzz(func(t *testing.T, root, path string) {
		got, err := below(mount{"/cg", root}, path)
		if err == nil && got != "/cg" && !strings.HasPrefix(got, "/cg/") {
			t.Errorf("below(%q, %q) = %q, which is not below the mount", root, path, got)
		}
	})
}

func FuzzMountinfo(f *testing.F) {
	for _, name := range []string{"v2", "hybrid", "v1", "pod"} {
		text, err := os.ReadFile(filepath.Join("testdata", name+".mountinfo"))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(text), "/mnt")
	}
	f.Add("", "/a b\tc\\d\ne")
	escape := strings.NewReplacer(" ", `\040`, "\t", `\011`, "\n", `\012`, `\`, `\134`)
	f.Fuzz(func(t *testing.T, text, point string) {
		h, err := parseMountinfo(strings.NewReader(text), nil)
		if err == nil {
			if (h.Unified == "") != (h.Mode == V1) {
				t.Errorf("mode %v with v2 at %q", h.Mode, h.Unified)
			}
			if h.Mode != V2 && len(h.v1) == 0 {
				t.Errorf("mode %v without a v1 hierarchy", h.Mode)
			}
		}
		if !strings.HasPrefix(point, "/") || strings.ContainsAny(point, "\r\v\f\u0085\u00a0") || strings.TrimSpace(point) != point {
			return // the kernel writes no such fields unescaped, and Fields splits there
		}
		for _, r := range point {
			if r > 127 {
				return // Fields also splits at other spaces, which mountinfo does not escape
			}
		}
		line := fmt.Sprintf("29 22 0:26 / %s rw - cgroup2 none rw\n", escape.Replace(point))
		h, err = parseMountinfo(strings.NewReader(line), nil)
		if err != nil || h.Unified != point {
			t.Errorf("mount point %q is read as %+v, %v", point, h, err)
		}
	})
}

func TestProcCgroup(t *testing.T) {
	const hybrid = `12:cpu,cpuacct:/a:b
4:memory:/m
1:name=systemd:/s
0::/u/init (deleted)
`
	for controller, want := range map[string]string{
		"": "/u/init (deleted)", "cpu": "/a:b", "cpuacct": "/a:b", "memory": "/m", "systemd": "/s",
	} {
		if got, err := parseProcCgroup(hybrid, controller); err != nil || got != want {
			t.Errorf("%q: %q, %v, want %q", controller, got, err, want)
		}
	}
	if _, err := parseProcCgroup(hybrid, "pids"); err == nil || !strings.Contains(err.Error(), "pids is not listed") {
		t.Errorf("controller that isn't there: %v", err)
	}
	if _, err := parseProcCgroup("4:memory:/m\n", ""); !errors.Is(err, ErrNoV2) {
		t.Errorf("no v2 line: %v, want ErrNoV2", err)
	}
}

func FuzzProcCgroup(f *testing.F) {
	f.Add("4:memory:/m\n0::/u\n", "/a:b")
	f.Add("0:::\n", "/")
	f.Fuzz(func(t *testing.T, text, path string) {
		if got, err := parseProcCgroup(text, ""); err == nil && !strings.HasPrefix(got, "/") {
			t.Errorf("path %q is not absolute", got)
		}
		if strings.Contains(path, "\n") || !strings.HasPrefix(path, "/") {
			return
		}
		text = "7:cpu,cpuacct:/x\n3:name=n:" + path + "\n0::" + path + "\n"
		for _, controller := range []string{"", "n"} {
			if got, err := parseProcCgroup(text, controller); err != nil || got != path {
				t.Errorf("%q: %q, %v, want %q", controller, got, err, path)
			}
		}
	})
}

func TestStatusText(t *testing.T) {
	const good = "Name:\tSeccomp:\\n1\nCapEff:\t000001fffeffffff\nNoNewPrivs:\t1\nSeccomp:\t2\nSeccomp_filters:\t3\nSpeculation_Store_Bypass:\tvulnerable\n"
	got, err := parseStatus(good)
	if want := (ProcStatus{Seccomp: 2, SeccompFilters: 3, NoNewPrivs: true, Capabilities: 0x1fffeffffff}); err != nil || got != want {
		t.Errorf("%+v, %v, want %+v", got, err, want)
	}
	for text, want := range map[string]string{
		strings.Replace(good, "Seccomp_filters:\t3\n", "", 1): "CONFIG_SECCOMP_FILTER",
		strings.Replace(good, "CapEff", "CapPrm", 1):          "no CapEff",
		strings.Replace(good, "01fff", "01ggg", 1):            "CapEff: ",
		strings.Replace(good, "\t2", "\ttwo", 1):              "Seccomp: ",
		strings.Replace(good, "\t3", "\t-1", 1):               "Seccomp_filters: ",
	} {
		if _, err := parseStatus(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want one with %q", err, want)
		}
	}
}

func FuzzStatus(f *testing.F) {
	f.Add("CapEff:\t1\nSeccomp:\t2\nSeccomp_filters:\t3\nNoNewPrivs:\t1\n", uint16(2), true, uint64(1))
	f.Fuzz(func(t *testing.T, text string, filters uint16, nnp bool, caps uint64) {
		_, _ = parseStatus(text) // only that it returns
		n := 0
		if nnp {
			n = 1
		}
		want := ProcStatus{Seccomp: 2, SeccompFilters: int(filters), NoNewPrivs: nnp, Capabilities: caps}
		got, err := parseStatus(fmt.Sprintf("Name:\tx\nCapEff:\t%016x\nNoNewPrivs:\t%d\nSeccomp:\t2\nSeccomp_filters:\t%d\n", caps, n, filters))
		if err != nil || got != want {
			t.Errorf("%+v, %v, want %+v", got, err, want)
		}
	})
}

const limitsText = `Limit                     Soft Limit           Hard Limit           Units     
Max cpu time              unlimited            unlimited            seconds   
Max processes             63210                63211                processes 
Max open files            1024                 1048576              files     
Max nice priority         0                    19                   
Max realtime timeout      unlimited            unlimited            us        
`

func TestLimitsText(t *testing.T) {
	got, err := parseLimits(limitsText)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]Limit{
		"RLIMIT_CPU": {Unlimited, Unlimited}, "RLIMIT_NPROC": {63210, 63211}, "RLIMIT_NOFILE": {1024, 1048576},
		"RLIMIT_NICE": {0, 19}, "RLIMIT_RTTIME": {Unlimited, Unlimited},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	for _, text := range []string{"", "Max open files            1024\n", "Max open files            many                 1                    files\n"} {
		if got, err := parseLimits(text); err == nil {
			t.Errorf("%q: %v, want an error", text, got)
		}
	}
}

func FuzzLimits(f *testing.F) {
	f.Add(limitsText, uint64(1), uint64(Unlimited))
	f.Fuzz(func(t *testing.T, text string, soft, hard uint64) {
		_, _ = parseLimits(text) // only that it returns
		spell := func(n uint64) string {
			if n == Unlimited {
				return "unlimited"
			}
			return fmt.Sprint(n)
		}
		got, err := parseLimits(fmt.Sprintf("%-25s %-20s %-20s %-10s\n", "Max open files", spell(soft), spell(hard), "files"))
		if want := (Limit{soft, hard}); err != nil || got["RLIMIT_NOFILE"] != want {
			t.Errorf("%v, %v, want %v", got, err, want)
		}
	})
}

func TestStartTimeText(t *testing.T) {
	const text = "71 (a) (b c) S 1 71 71 0 -1 4194560 5 0 0 0 0 0 0 0 20 0 1 0 123456 1000 1 18446744073709551615 0\n"
	if got, err := parseStartTime(text); err != nil || got != 123456 {
		t.Errorf("%d, %v, want 123456", got, err)
	}
	if _, err := parseStartTime("71 (a) S 1"); err == nil {
		t.Error("a short line is taken")
	}
}

func FuzzStartTime(f *testing.F) {
	f.Add("cat", uint64(7))
	f.Fuzz(func(t *testing.T, comm string, at uint64) {
		_, _ = parseStartTime(comm) // only that it returns
		text := fmt.Sprintf("1 (%s) S %s%d 9 9 9\n", comm, strings.Repeat("0 ", 18), at)
		if got, err := parseStartTime(text); err != nil || got != at {
			t.Errorf("%q: %d, %v, want %d", text, got, err, at)
		}
	})
}
