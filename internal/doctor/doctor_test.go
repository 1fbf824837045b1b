// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/bpf"
	"github.com/syslatch/syslatch/internal/cgroup"
	"github.com/syslatch/syslatch/internal/seccomp"
)

var update = flag.Bool("update", false, "write the golden files anew")

// machine is a host made of data.
type machine struct {
	files    map[string]string
	mode     cgroup.Mode
	unified  string
	broken   map[string]error // bpf.Feature by name
	recorder error
	seccomp  seccomp.Support
	programs map[string]map[string]string // name -> arguments -> output; an output "!x" is a failure that says x
	sockets  map[string]error             // that are there, and whether they answer
}

func (m *machine) host(release string) *Host {
	return &Host{
		Release: release, Machine: "x86_64",
		ReadFile: func(path string) ([]byte, error) {
			if text, ok := m.files[path]; ok {
				return []byte(text), nil
			}
			return nil, &fs.PathError{Op: "open", Path: path, Err: fs.ErrNotExist}
		},
		Stat: func(path string) error {
			_, file := m.files[path]
			_, socket := m.sockets[path]
			if file || socket {
				return nil
			}
			return fs.ErrNotExist
		},
		Cgroup: func() (*cgroup.Hierarchy, error) {
			return &cgroup.Hierarchy{Mode: m.mode, Unified: m.unified}, nil
		},
		Probe: func(root string) []bpf.Feature {
			if root != m.unified {
				panic("probed in " + root)
			}
			var all []bpf.Feature
			for _, name := range []string{"btf", "ringbuf", "tp_btf", "raw_tp", "tracepoint", "fentry", "fexit", "lsm", "cgroup/connect4"} {
				all = append(all, bpf.Feature{Name: name, OK: m.broken[name] == nil, Err: m.broken[name]})
			}
			return all
		},
		Seccomp: func() (seccomp.Support, error) { return m.seccomp, nil },
		Denials: func() (string, error) {
			if m.mode == cgroup.V1 {
				return "", errors.New("cgroup version 2 is not mounted")
			}
			if m.broken["fentry"] != nil && m.broken["tp_btf"] != nil {
				return "", m.broken["fentry"]
			}
			if m.broken["fentry"] != nil {
				return "audit netlink", nil
			}
			return "fentry/audit_seccomp", nil
		},
		OpenRecorder: func() error { return m.recorder },
		Find: func(name string) (string, error) {
			if m.programs[name] == nil {
				return "", fs.ErrNotExist
			}
			return "/usr/bin/" + name, nil
		},
		Run: func(_ context.Context, path string, args ...string) (string, error) {
			out, ok := m.programs[filepath.Base(path)][strings.Join(args, " ")]
			if said, bad := strings.CutPrefix(out, "!"); bad || !ok {
				return "", errors.New("exit status 1: " + said)
			}
			return out, nil
		},
		Dial: func(_ context.Context, socket string) error { return m.sockets[socket] },
	}
}

const (
	allCapabilities = "Name:\tsyslatch\nCapEff:\t000001ffffffffff\nSeccomp:\t0\n"
	mountinfo       = "29 22 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
	bpffsMount      = "30 22 0:27 / /sys/fs/bpf rw,nosuid,nodev,noexec,relatime shared:10 - bpf bpf rw,mode=700\n"
	limits          = "Limit                     Soft Limit           Hard Limit           Units     \nMax locked memory         8388608              8388608              bytes     \n"
)

func runtimeFeaturesText(supported ...string) string {
	type s map[string]any
	text, err := json.Marshal(s{"linux": s{"seccomp": s{
		"enabled": true, "actions": []string{"SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_NOTIFY"},
		"knownFlags": []string{"SECCOMP_FILTER_FLAG_TSYNC", "SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"}, "supportedFlags": supported,
	}}})
	if err != nil {
		panic(err)
	}
	return string(text)
}

func nriTable(settings string) string {
	return "version = 4\n[plugins.'io.containerd.nri.v1.nri']\n  socket_path = '/run/nri/nri.sock'\n  plugin_request_timeout = '2s'\n  plugin_path = '/opt/nri/plugins'\n" + settings
}

const validatorOn = "[plugins.'io.containerd.nri.v1.nri'.default_validator]\n  enable = true\n  required_plugins = ['syslatch']\n"

// good is a host on which there is nothing to mend.
func good() *machine {
	return &machine{
		files: map[string]string{
			"/proc/self/status": allCapabilities, "/proc/self/limits": limits,
			"/proc/self/mountinfo": mountinfo + bpffsMount, "/run/systemd/system": "",
		},
		mode: cgroup.V2, unified: "/sys/fs/cgroup",
		seccomp: seccomp.Support{
			Library: "2.6.0", API: 7,
			Actions: []specs.LinuxSeccompAction{specs.ActErrno, specs.ActNotify, specs.ActLog, specs.ActAllow},
			Flags:   []string{"SECCOMP_FILTER_FLAG_TSYNC", "SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_NEW_LISTENER", "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"},
		},
		programs: map[string]map[string]string{
			"runc": {
				"--version": "runc version 1.5.2\nspec: 1.3.0\n",
				"features":  runtimeFeaturesText("SECCOMP_FILTER_FLAG_TSYNC", "SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"),
			},
			"crun": {
				"--version": "crun version 1.24\ncommit: x\n",
				"features":  runtimeFeaturesText("SECCOMP_FILTER_FLAG_TSYNC", "SECCOMP_FILTER_FLAG_LOG"),
			},
			"podman": {"--version": "podman version 5.4.0\n"},
			"containerd": {
				"--version":   "containerd github.com/containerd/containerd/v2 v2.4.2 abc\n",
				"config dump": nriTable(validatorOn),
			},
		},
		sockets: map[string]error{"/run/nri/nri.sock": nil},
	}
}

// cases are hosts and what is wrong with them.
var cases = []struct {
	name    string
	release string
	change  func(*machine)
	works   bool
}{
	{"good", "6.12.0-13-amd64", func(*machine) {}, true},
	{"hybrid", "6.18.44", func(m *machine) {
		m.mode, m.unified = cgroup.Hybrid, "/sys/fs/cgroup/unified"
		denied := fmt.Errorf("load: %w: this kernel doesn't allow the type", unix.EPERM)
		m.broken = map[string]error{"fentry": denied, "fexit": denied, "lsm": denied}
		delete(m.files, "/run/systemd/system")
		m.sockets = nil
		m.programs["runc"]["features"] = runtimeFeaturesText("SECCOMP_FILTER_FLAG_TSYNC")
	}, true},
	{"v1-only", "6.1.0-30-amd64", func(m *machine) {
		m.mode, m.unified = cgroup.V1, ""
		m.files["/proc/self/mountinfo"] = bpffsMount
		m.recorder = errors.New("bpf: cgroup version 2 is not mounted")
	}, false},
	{"no-btf-no-bpffs", "6.1.0-30-cloud", func(m *machine) {
		m.files["/proc/self/mountinfo"] = mountinfo + "31 22 0:28 / /run/bpf rw - bpf bpf rw\n"
		m.broken = map[string]error{"btf": errors.New("not supported"), "tp_btf": errors.New("load: not supported"), "lsm": errors.New("load: not supported"), "fentry": errors.New("load: not supported")}
		m.recorder = errors.New("bpf: not supported: Linux 6.1 or later with CONFIG_DEBUG_INFO_BTF is needed")
	}, false},
	{"old-runtimes", "6.1.0-30-amd64", func(m *machine) {
		m.programs["runc"] = map[string]string{"--version": "runc version 1.0.0-rc93\n", "features": "!No help topic for 'features'"}
		m.programs["crun"] = map[string]string{"--version": "!"}
		m.programs["containerd"] = map[string]string{"--version": "containerd containerd.io 1.6.20\n", "config dump": "version = 2\n[plugins]\n"}
		delete(m.programs, "podman")
		m.sockets = nil
		m.seccomp.Library, m.seccomp.API = "2.4.4", 4
	}, true},
	{"unprivileged", "6.12.0-13-amd64", func(m *machine) {
		m.files["/proc/self/status"] = "CapEff:\t0000000000000000\n"
		denied := fmt.Errorf("load: %w", unix.EPERM)
		m.broken = map[string]error{"tp_btf": denied, "raw_tp": denied, "fentry": denied, "lsm": denied}
		m.recorder = fmt.Errorf("bpf: %w", unix.EPERM)
		m.sockets["/run/nri/nri.sock"] = &os.SyscallError{Syscall: "connect", Err: unix.EACCES}
	}, false},
	{"containerd-drops-seccomp", "6.12.0-13-amd64", func(m *machine) {
		m.programs["containerd"]["--version"] = "containerd github.com/containerd/containerd/v2 v2.1.4 abc\n"
	}, true},
	{"containerd-without-images", "6.12.0-13-amd64", func(m *machine) {
		m.programs["containerd"]["--version"] = "containerd github.com/containerd/containerd/v2 2.3.1 abc\n"
	}, true},
	{"validator-rejects", "6.12.0-13-amd64", func(m *machine) {
		m.programs["containerd"]["config dump"] = nriTable(validatorOn + "  reject_custom_seccomp_adjustment = true\n")
	}, true},
}

func golden(t *testing.T, file string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", file)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s (-update writes it anew): %s", path, diff)
	}
}

func TestReports(t *testing.T) {
	for _, tt := range cases {
		t.Run(tt.name, func(t *testing.T) {
			m := good()
			tt.change(m)
			r := Examine(t.Context(), m.host(tt.release), Options{})
			if r.Works != tt.works {
				t.Errorf("works = %v, want %v", r.Works, tt.works)
			}
			wellFormed(t, r)
			var text bytes.Buffer
			if err := r.WriteText(&text, false); err != nil {
				t.Fatal(err)
			}
			golden(t, tt.name+".txt", text.Bytes())
		})
	}
}

// wellFormed holds what every report promises.
func wellFormed(t *testing.T, r *Report) {
	t.Helper()
	statuses := []Status{OK, Warn, Missing, Error}
	seen := map[string]bool{}
	for _, c := range r.Checks {
		if seen[c.Name] {
			t.Errorf("two checks are named %s", c.Name)
		}
		seen[c.Name] = true
		if !slices.Contains(statuses, c.Status) || c.Found == "" || strings.Contains(c.Found, "\n") {
			t.Errorf("check %+v: want a status and one line of what was found", c)
		}
		if (c.Status == OK) != (c.Remedy == "") {
			t.Errorf("check %s is %s with remedy %q", c.Name, c.Status, c.Remedy)
		}
	}
	for _, m := range r.Mechanisms {
		if !slices.Contains(statuses, m.Status) || m.Uses == "" || (m.Status == OK) != (m.Remedy == "") {
			t.Errorf("mechanism %+v: want a status, a use, and a remedy unless ok", m)
		}
		// What a remedy sends its reader to must be there.
		_, names, found := strings.Cut(m.Remedy, "see ")
		for name := range strings.SplitSeq(names, ", ") {
			if found && !seen[name] {
				t.Errorf("mechanism %s: there is no check %q to see", m.Job, name)
			}
		}
	}
}

// Scripts hang on the names: this file changes only with Schema, or by
// additions.
func TestJSON(t *testing.T) {
	r := Examine(t.Context(), good().host("6.12.0-13-amd64"), Options{})
	got, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "good.json", append(got, '\n'))
	var back Report
	if err := json.Unmarshal(got, &back); err != nil || !cmp.Equal(&back, r) {
		t.Errorf("decoding what was encoded gives %+v, %v", back, err)
	}
}

func TestColour(t *testing.T) {
	r := Examine(t.Context(), good().host("6.12.0"), Options{})
	var plain, coloured bytes.Buffer
	if err := errors.Join(r.WriteText(&plain, false), r.WriteText(&coloured, true)); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(plain.String(), "\x1b") {
		t.Error("escapes without colour")
	}
	// Taken out again, nothing but colour differs: the columns stay aligned.
	stripped := coloured.String()
	for _, c := range colours {
		stripped = strings.ReplaceAll(stripped, c, "")
	}
	if stripped = strings.ReplaceAll(stripped, "\x1b[0m", ""); stripped != plain.String() {
		t.Error(cmp.Diff(plain.String(), stripped))
	}
	if coloured.Len() == plain.Len() {
		t.Error("no colour")
	}
}

// A check that hangs or panics costs its own lines only.
func TestChecksFailAlone(t *testing.T) {
	h := good().host("6.12.0")
	hang := make(chan struct{})
	probed := make(chan struct{})
	h.Probe = func(string) []bpf.Feature { close(probed); <-hang; return nil }
	h.Seccomp = func() (seccomp.Support, error) { panic("no\nlibrary") }
	r := Examine(t.Context(), h, Options{Timeout: 50 * time.Millisecond})
	<-probed
	close(hang)
	wellFormed(t, r)
	got := map[string]string{}
	for _, c := range r.Checks {
		if c.Status != OK {
			got[c.Name] = c.Found
		}
	}
	want := map[string]string{
		"bpf": "no answer in time", "seccomp": "the check panicked: no library",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if r.Works || r.Mechanisms[0].Status != Missing {
		t.Errorf("recording works without an answer about BPF: %+v", r.Mechanisms[0])
	}
}

func TestNRI(t *testing.T) {
	for name, tt := range map[string]struct {
		change         func(*machine)
		opts           Options
		socket, config Status
		says           string // by one of the two checks, found or remedy
	}{
		"fine":           {func(*machine) {}, Options{}, OK, OK, "required plugins: syslatch"},
		"validator off":  {func(m *machine) { m.dump(nriTable("")) }, Options{}, OK, Warn, `required_plugins = ["syslatch"]`},
		"not required":   {func(m *machine) { m.dump(nriTable(strings.Replace(validatorOn, "'syslatch'", "'other'", 1))) }, Options{}, OK, Warn, "required plugins: other"},
		"rejects":        {func(m *machine) { m.dump(nriTable(validatorOn + "reject_unconfined_seccomp_adjustment = true\n")) }, Options{}, OK, Error, "set reject_unconfined_seccomp_adjustment to false"},
		"short deadline": {func(m *machine) { m.dump(strings.Replace(nriTable(validatorOn), "'2s'", "'200ms'", 1)) }, Options{}, OK, Warn, "plugin_request_timeout 200ms"},
		"disabled":       {func(m *machine) { m.dump(nriTable("disable = true\n" + validatorOn)) }, Options{}, Missing, OK, "NRI is disabled in containerd config dump"},
		"no connections": {func(m *machine) { m.dump(nriTable("disable_connections = true\n" + validatorOn)) }, Options{}, Warn, OK, "link 10-syslatch in /opt/nri/plugins"},
		"nobody listens": {func(m *machine) { m.sockets["/run/nri/nri.sock"] = unix.ECONNREFUSED }, Options{}, Error, OK, "connection refused"},
		"no socket":      {func(m *machine) { m.sockets = nil }, Options{}, Missing, OK, "no socket at /run/nri/nri.sock"},
		"broken config":  {func(m *machine) { m.dump("plugins = 7") }, Options{}, Missing, Error, "containerd config dump must work"},
		"other config":   {func(m *machine) { m.programs["containerd"]["--config /k3s.toml config dump"] = nriTable(validatorOn) }, Options{ContainerdConfig: "/k3s.toml"}, OK, OK, "containerd --config /k3s.toml config dump"},
		"file only": {func(m *machine) {
			delete(m.programs, "containerd")
			m.files["/etc/containerd/config.toml"] = nriTable("")
		}, Options{}, OK, Warn, "not enabled (/etc/containerd/config.toml)"},
		"dump fails, file without": {func(m *machine) {
			delete(m.programs["containerd"], "config dump")
			m.files["/etc/containerd/config.toml"] = "version = 3\n"
		}, Options{}, Missing, Error, "containerd config dump: "},
		"no containerd":   {func(m *machine) { delete(m.programs, "containerd") }, Options{}, Missing, Missing, "no configuration of containerd's NRI found"},
		"strange setting": {func(m *machine) { m.dump(nriTable("disable = 'perhaps'\n")) }, Options{}, Missing, Error, "containerd config dump must work"},
	} {
		t.Run(name, func(t *testing.T) {
			m := good()
			tt.change(m)
			checks := checkNRI(t.Context(), m.host("6.12.0"), tt.opts)
			if checks[0].Status != tt.socket || checks[1].Status != tt.config {
				t.Errorf("socket %s, validator %s, want %s, %s", checks[0].Status, checks[1].Status, tt.socket, tt.config)
			}
			if said := fmt.Sprintf("%+v", checks); !strings.Contains(said, tt.says) {
				t.Errorf("%s doesn't say %q", said, tt.says)
			}
		})
	}
}

func (m *machine) dump(config string) { m.programs["containerd"]["config dump"] = config }

func TestBPFFS(t *testing.T) {
	for mounts, want := range map[string]string{
		bpffsMount: "ok mounted at /sys/fs/bpf",
		strings.Replace(bpffsMount, " rw,nosuid", " ro,nosuid", 1):          "missing mounted at /sys/fs/bpf, read-only",
		strings.Replace(bpffsMount, "/sys/fs/bpf", "/run/bpf", 1):           "missing not mounted at /sys/fs/bpf, but at /run/bpf",
		strings.Replace(bpffsMount, " - bpf bpf rw", " - tmpfs bpf bpf", 1): "missing not mounted at /sys/fs/bpf",
		"":                                    "missing not mounted at /sys/fs/bpf",
		"30 22 0:27 / /sys/fs/bpf rw - bpf\n": "ok mounted at /sys/fs/bpf",
		// Something else covers it.
		bpffsMount + "31 30 0:28 / /sys/fs/bpf rw - tmpfs tmpfs rw\n": "missing not mounted at /sys/fs/bpf",
		bpffsMount + "31 22 0:28 / /sys rw - tmpfs tmpfs rw\n":        "missing not mounted at /sys/fs/bpf",
		"29 22 0:28 / /sys rw - sysfs sysfs rw\n" + bpffsMount:        "ok mounted at /sys/fs/bpf",
		strings.Replace(bpffsMount, "bpf rw,mode", "bpf ro,mode", 1):  "missing mounted at /sys/fs/bpf, read-only",
	} {
		m := good()
		m.files["/proc/self/mountinfo"] = mountinfo + mounts
		c := checkBPFFS(t.Context(), m.host("6.12.0"), Options{BPFFS: defaultBPFFS})[0]
		if got := string(c.Status) + " " + c.Found; got != want {
			t.Errorf("%q: %s, want %s", mounts, got, want)
		}
	}
	// As it stands in a policy file.
	m := good()
	if c := checkBPFFS(t.Context(), m.host("6.12.0"), Options{BPFFS: "/sys/fs/bpf/syslatch"})[0]; c.Status != OK {
		t.Errorf("a directory in it: %+v", c)
	}
	if c := checkBPFFS(t.Context(), m.host("6.12.0"), Options{BPFFS: "/sys/fs/bpfx"})[0]; c.Status != Missing {
		t.Errorf("a directory beside it: %+v", c)
	}
}

func TestVersions(t *testing.T) {
	for text, want := range map[string]string{
		"runc version 1.1.5+ds1\ncommit: x":                             "1.1.5+ds1",
		"containerd github.com/containerd/containerd/v2 2.4.2+unknown ": "2.4.2+unknown",
		"containerd containerd.io v1.7.2 abc":                           "1.7.2",
		"podman version 4.3.1":                                          "4.3.1",
		"":                                                              "of unknown version",
		"hello":                                                         "of unknown version",
	} {
		if got := versionOf(text); got != want {
			t.Errorf("versionOf(%q) = %q, want %q", text, got, want)
		}
	}
	for version, want := range map[string]bool{
		"6.1.0-30-amd64": true, "6.0.19": false, "5.15": false, "7.0-rc1": true, "6.12": true, "": false, "six": false, "v6.1": true, "6": false,
	} {
		if got := atLeast(version, 6, 1); got != want {
			t.Errorf("atLeast(%q, 6, 1) = %v", version, got)
		}
	}
}

func FuzzParseNRI(f *testing.F) {
	f.Add(nriTable(validatorOn))
	f.Add("plugins = 7")
	f.Add("[plugins]\n'io.containerd.nri.v1.nri' = []\n")
	f.Fuzz(func(t *testing.T, text string) {
		n, err := parseNRI(text)
		if n == nil || err != nil {
			return
		}
		c := Check{Status: OK}
		n.judge(&c, "file")
		if (c.Status == OK) != (c.Remedy == "") || c.Found == "" {
			t.Errorf("%+v: want a remedy unless ok", c)
		}
	})
}

// What programs print goes to root's terminal.
func FuzzOneLine(f *testing.F) {
	f.Add("a\x1b[2Jb\nc")
	f.Fuzz(func(t *testing.T, text string) {
		got := oneLine(text)
		if strings.ContainsAny(got, "\x1b\n\r\x7f\u009b") || len([]rune(got)) > 163 {
			t.Errorf("oneLine(%q) = %q", text, got)
		}
	})
}
