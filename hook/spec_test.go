// SPDX-License-Identifier: Apache-2.0

package hook

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/syslatch/syslatch/internal/adjust"
	"github.com/syslatch/syslatch/internal/policy"
)

func ptr[T any](v T) *T { return &v }

// podman's own spec, shortened, with fields that no Go type here knows and
// numbers that no float64 holds.
const spec = `{
  "ociVersion": "1.0.2-dev",
  "process": {"args": ["ls"], "rlimits": [{"type":"RLIMIT_NOFILE","hard":1048576,"soft":1048576},{"type":"RLIMIT_NPROC","hard":4194304,"soft":4194304}], "ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 3}},
  "root": {"path": "/var/lib/containers/storage/overlay/abc/merged"},
  "mounts": [{"destination": "/proc", "future": 1}],
  "hooks": {"createRuntime": [{"path": "/other"}], "futureStage": [{"path": "/x"}]},
  "annotations": {"io.container.manager": "libpod", "a<b>&c": "\u2028 é \ud83d\ude00"},
  "linux": {
    "resources": {"memory": {"limit": 18446744073709551615, "kernelTCP": 9007199254740993}, "pids": {"limit": 2048}, "unified": {"memory.high": "max"}, "future": [1e400, 0.10, -0]},
    "cgroupsPath": "machine.slice:libpod:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
    "seccomp": {"defaultAction": "SCMP_ACT_ERRNO"},
    "timeOffsets": {"monotonic": {"secs": 9223372036854775807}}
  },
  "zos": {"x": null, "y": [], "z": {}}
}`

const id = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

// generic decodes JSON with every number as it was written.
func generic(t *testing.T, data []byte) map[string]any {
	t.Helper()
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	var v map[string]any
	if err := d.Decode(&v); err != nil {
		t.Fatal(err)
	}
	return v
}

func TestUntouchedSpecSurvives(t *testing.T) {
	d, err := parse([]byte(spec))
	if err != nil {
		t.Fatal(err)
	}
	out, err := d.encode()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(generic(t, []byte(spec)), generic(t, out)); diff != "" {
		t.Errorf("(-in +out):\n%s", diff)
	}
}

func TestApply(t *testing.T) {
	d, err := parse([]byte(spec))
	if err != nil {
		t.Fatal(err)
	}
	if err := d.apply(&adjust.Plan{
		Mounts:  []specs.Mount{{Destination: "/run/x", Source: "/x"}},
		Seccomp: &specs.LinuxSeccomp{DefaultAction: specs.ActKill},
		Resources: &specs.LinuxResources{
			Memory: &specs.LinuxMemory{Limit: ptr[int64](64), Swap: ptr[int64](65)}, CPU: &specs.LinuxCPU{Quota: ptr[int64](1), Period: ptr[uint64](2), Shares: ptr[uint64](3)},
			Pids: &specs.LinuxPids{Limit: ptr[int64](7)}, Unified: map[string]string{"memory.low": "1"},
		},
		OOMScoreAdj: ptr(500),
		Rlimits:     []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: 2, Soft: 1}, {Type: "RLIMIT_CORE", Hard: ^uint64(0)}},
	}); err != nil {
		t.Fatal(err)
	}
	if err := d.addHook("createRuntime", specs.Hook{Path: "/first"}, true); err != nil {
		t.Fatal(err)
	}
	if err := d.addHook("poststart", specs.Hook{Path: "/last"}, false); err != nil {
		t.Fatal(err)
	}
	want := generic(t, []byte(strings.NewReplacer(
		`{"defaultAction": "SCMP_ACT_ERRNO"}`, `{"defaultAction": "SCMP_ACT_KILL"}`,
		`"limit": 18446744073709551615`, `"limit": 64, "swap": 65`,
		`"pids": {"limit": 2048}`, `"pids": {"limit": 7}, "cpu": {"quota":1,"period":2,"shares":3}`,
		`"memory.high": "max"`, `"memory.high": "max", "memory.low": "1"`,
		`{"type":"RLIMIT_NOFILE","hard":1048576,"soft":1048576},{"type":"RLIMIT_NPROC","hard":4194304,"soft":4194304}`,
		`{"type":"RLIMIT_NPROC","hard":4194304,"soft":4194304},{"type":"RLIMIT_NOFILE","hard":2,"soft":1},{"type":"RLIMIT_CORE","hard":18446744073709551615,"soft":0}`,
		`"ioPriority"`, `"oomScoreAdj": 500, "ioPriority"`,
		`"future": 1}]`, `"future": 1}, {"destination": "/run/x", "source": "/x"}]`,
		`[{"path": "/other"}]`, `[{"path": "/first"}, {"path": "/other"}], "poststart": [{"path": "/last"}]`,
	).Replace(spec)))
	out, err := d.encode()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, generic(t, out)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestParseRefuses(t *testing.T) {
	for in, says := range map[string]string{
		"":                                     "unexpected EOF",
		"[]":                                   "no JSON object",
		`"x"`:                                  "no JSON object",
		`{"a":1`:                               "unexpected EOF",
		`{"a":1}{}`:                            "something follows",
		`{"a":1} x`:                            "something follows",
		`{"a":1,"a":1}`:                        `"a" is repeated`,
		`{"linux":{"x":[{"b":1,"b":2}]}}`:      `"b" is repeated`,
		`{"a":1,"\u0061":2}`:                   `"a" is repeated`,
		`{"Linux":{}}`:                         `"Linux" is "linux" in another case`,
		`{"linux":{"SECCOMP":{}}}`:             `in another case`,
		`{"linux":[]}`:                         "linux",
		`{"hooks":"x"}`:                        "hooks",
		strings.Repeat(`{"a":`, maxDepth+1):    "nested deeper",
		`{"a":` + strings.Repeat("[", 10000):   "nested deeper",
		`{"linux":{"seccomp":{"syscalls":1}}}`: "syscalls",
	} {
		if _, err := parse([]byte(in)); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%.60q: got %v, want %q", in, err, says)
		}
	}
	if _, err := read(strings.NewReader(strings.Repeat(" ", maxInput+1))); err == nil {
		t.Error("huge input was read")
	}
}

func TestPodmanID(t *testing.T) {
	mount := func(destination, source string) string {
		return `"mounts":[{"destination":"` + destination + `","source":"` + source + `"}]`
	}
	other := strings.Repeat("e", 64)
	for in, want := range map[string]string{
		`{"linux":{"cgroupsPath":"/libpod_parent/libpod-` + id + `"}}`:                                        id,
		`{"linux":{"cgroupsPath":"machine.slice:libpod:` + id + `"}}`:                                         id,
		`{"linux":{"cgroupsPath":"/init/libpod-payload-` + id + `"}}`:                                         id,
		`{` + mount("/dev/shm", "/g/overlay-containers/"+id+"/userdata/shm") + `}`:                            id,
		`{` + mount("/run/.containerenv", "/r/overlay-containers/"+id+"/userdata/.containerenv") + `}`:        id,
		`{` + mount("/etc/hosts", "/r/overlay-containers/"+other+"/userdata/hosts") + `}`:                     "", // another's network
		`{"linux":{"cgroupsPath":"/a/` + id[1:] + `"}}`:                                                       "",
		`{"linux":{"cgroupsPath":"/a/x` + id + `"}}`:                                                          "",
		`{"linux":{"cgroupsPath":"/a/-` + id + `"},` + mount("/dev/shm", "/g/c/"+other+"/userdata/shm") + `}`: id,
		`{}`: "",
	} {
		d, err := parse([]byte(in))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := d.container(""); got.ID != want || err != nil {
			t.Errorf("%s: got %q, %v, want %q", in, got.ID, err, want)
		}
	}
}

// Name and image are in podman's storage only.
func TestStored(t *testing.T) {
	graph := t.TempDir()
	entry := func(id, layer, name, image string) string {
		return `{"id":"` + id + `","names":["n0"],"image":"i1","layer":"` + layer + `","metadata":"{\"image-name\":\"` + image + `\",\"name\":\"` + name + `\"}"}`
	}
	other := entry(strings.Repeat("f", 64), "def", "other", "x")
	list := "[" + other + "," + entry(id, "abc", "web", "docker.io/library/nginx:1.27") + "]"
	forged := "[" + other + "," + entry(id, "def", "web", "docker.io/library/nginx:1.27") + "]"
	in := strings.Replace(spec, "/var/lib/containers/storage", graph, 1)
	if err := os.Mkdir(filepath.Join(graph, "overlay-images"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(graph, "overlay-images/images.json"), []byte(`[{"id":"i0"},{"id":"i1","digest":"sha256:1","names":["x"]}]`), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		dir, file, list string
		mode            os.FileMode
		name, image     string
		err             string // what it says; it names the file too
		parent          os.FileMode
	}{
		"overlay":     {"overlay-containers", "containers.json", list, 0o600, "web", "docker.io/library/nginx:1.27", "", 0},
		"volatile":    {"overlay-containers", "volatile-containers.json", list, 0o600, "web", "docker.io/library/nginx:1.27", "", 0},
		"no metadata": {"overlay-containers", "containers.json", `[{"id":"` + id + `","layer":"abc","names":["n0"]}]`, 0o600, "n0", "", "", 0},
		"others":      {"overlay-containers", "containers.json", list, 0o666, "", "", "others than root can write it", 0},
		"forged":      {"overlay-containers", "containers.json", forged, 0o600, "", "", "it is another container's id", 0},
		"replaceable": {"overlay-containers", "containers.json", list, 0o600, "", "", "or its directory", 0o777},
		"garbage":     {"overlay-containers", "containers.json", list[1:], 0o600, "", "", "invalid character", 0},
		"elsewhere":   {"vfs-containers", "containers.json", list, 0o600, "", "", "", 0},
	} {
		t.Run(name, func(t *testing.T) {
			if os.Getuid() != 0 {
				t.Skip("files must be root's")
			}
			dir := filepath.Join(graph, c.dir)
			if err := os.MkdirAll(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			defer os.RemoveAll(dir)
			path := filepath.Join(dir, c.file)
			if err := os.WriteFile(path, []byte(c.list), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(path, c.mode); err != nil {
				t.Fatal(err)
			}
			if c.parent != 0 {
				if err := os.Chmod(dir, c.parent); err != nil {
					t.Fatal(err)
				}
			}
			d, err := parse([]byte(in))
			if err != nil {
				t.Fatal(err)
			}
			got, err := d.container("")
			if got.Name != c.name || got.Image != c.image {
				t.Errorf("got %q %q, want %q %q", got.Name, got.Image, c.name, c.image)
			}
			digest := ""
			if c.image != "" {
				digest = "sha256:1"
			}
			if got.ImageDigest != digest {
				t.Errorf("got digest %q, want %q", got.ImageDigest, digest)
			}
			if c.err == "" && err != nil || c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err) || !strings.Contains(err.Error(), path)) {
				t.Errorf("got error %v, want %q", err, c.err)
			}
		})
	}
}

func TestCRIO(t *testing.T) {
	d, err := parse([]byte(`{"annotations":{"io.kubernetes.cri-o.ImageName":"nginx:1","io.kubernetes.cri-o.ImageRef":"9f","io.kubernetes.cri-o.ImageRepoDigests":"nginx@sha256:1",
		"io.kubernetes.container.name":"web","io.kubernetes.pod.name":"p","io.kubernetes.pod.namespace":"ns","io.kubernetes.pod.uid":"u"}}`))
	if err != nil {
		t.Fatal(err)
	}
	got, err := d.container("abc")
	if err != nil {
		t.Fatal(err)
	}
	got.Annotations = nil
	if diff := cmp.Diff(policy.Container{ID: "abc", Name: "web", Pod: "p", Namespace: "ns", PodUID: "u", Image: "nginx:1", ImageDigest: "sha256:1"}, got); diff != "" {
		t.Error(diff)
	}
	if e := engineOf(d.view.Annotations); e != "cri-o" {
		t.Errorf("engine %q", e)
	}
	// podman sets two of CRI-O's annotations.
	if e := engineOf(map[string]string{"io.kubernetes.cri-o.TTY": "false", "io.kubernetes.cri-o.Created": "x"}); e != "" {
		t.Errorf("engine %q", e)
	}
}

// FuzzSpec: what is parsed is written with the same meaning, and what a plan
// changes is what it changes.
func FuzzSpec(f *testing.F) {
	f.Add([]byte(spec))
	f.Add([]byte(`{"linux":{"resources":null},"process":{},"hooks":{"createRuntime":null}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		d, err := parse(data)
		if err != nil {
			return
		}
		out, err := d.encode()
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(generic(t, data), generic(t, out)); diff != "" {
			t.Fatalf("(-in +out):\n%s", diff)
		}
		_, _ = d.container("") // whatever it says, it must not panic
		if err := d.apply(&adjust.Plan{OOMScoreAdj: ptr(5), Resources: &specs.LinuxResources{Pids: &specs.LinuxPids{Limit: ptr[int64](7)}}}); err != nil {
			return
		}
		if out, err = d.encode(); err != nil {
			t.Fatal(err)
		}
		var changed specs.Spec
		if err := json.Unmarshal(out, &changed); err == nil && (*changed.Process.OOMScoreAdj != 5 || *changed.Linux.Resources.Pids.Limit != 7) {
			t.Fatalf("not applied: %s", out)
		}
	})
}
