// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/sirupsen/logrus"

	"github.com/syslatch/syslatch/internal/adjust"
	"github.com/syslatch/syslatch/internal/policy"
)

// fakeAgent answers every event with do.
type fakeAgent struct {
	do func(ctx context.Context) (*adjust.Plan, error)
	// seen is what the last Plan or Synchronize was given.
	seen    []policy.Container
	started []string    // ids
	stopped chan string // gets ids, if it is not nil
}

func (f *fakeAgent) Plan(ctx context.Context, c policy.Container, _ adjust.Runtime) (*adjust.Plan, error) {
	f.seen = []policy.Container{c}
	return f.do(ctx)
}

func (f *fakeAgent) event(ctx context.Context) error                     { _, err := f.do(ctx); return err }
func (f *fakeAgent) Starting(ctx context.Context, _ string, _ int) error { return f.event(ctx) }
func (f *fakeAgent) Started(ctx context.Context, id string, _ int) error {
	f.started = append(f.started, id)
	return f.event(ctx)
}

func (f *fakeAgent) Stopped(ctx context.Context, id string) error {
	if f.stopped != nil {
		f.stopped <- id
	}
	return f.event(ctx)
}

func (f *fakeAgent) Synchronize(ctx context.Context, running []policy.Container) error {
	f.seen = running
	return f.event(ctx)
}

func newPlugin(t *testing.T, a Agent, opts Options) *handlers {
	t.Helper()
	log := logrus.New()
	log.SetOutput(io.Discard)
	opts.Name, opts.Index = "syslatch", "10"
	p, err := New(a, logrus.NewEntry(log), opts)
	if err != nil {
		t.Fatal(err)
	}
	return (*handlers)(p)
}

// every event of the interface, as the runtime would send it.
var events = map[string]func(*handlers) error{
	"Synchronize": func(h *handlers) error {
		_, err := h.Synchronize(context.Background(), nil, nil)
		return err
	},
	"CreateContainer": func(h *handlers) error {
		_, _, err := h.CreateContainer(context.Background(), &api.PodSandbox{}, &api.Container{Name: "app"})
		return err
	},
	"StartContainer": func(h *handlers) error {
		return h.StartContainer(context.Background(), nil, &api.Container{Name: "app"})
	},
	"PostStartContainer": func(h *handlers) error {
		return h.PostStartContainer(context.Background(), nil, &api.Container{Name: "app"})
	},
	"StopContainer": func(h *handlers) error {
		_, err := h.StopContainer(context.Background(), nil, &api.Container{Name: "app"})
		return err
	},
	"RemoveContainer": func(h *handlers) error {
		return h.RemoveContainer(context.Background(), nil, &api.Container{Name: "app"})
	},
}

func TestHandlersFailClosed(t *testing.T) {
	refused := errors.New("store locked")
	faults := map[string]struct {
		do   func(context.Context) (*adjust.Plan, error)
		want string
	}{
		"error": {func(context.Context) (*adjust.Plan, error) { return nil, refused }, "store locked"},
		"panic": {func(context.Context) (*adjust.Plan, error) { panic("nil map") }, "internal error: nil map"},
		"hang": {func(ctx context.Context) (*adjust.Plan, error) {
			<-ctx.Done()
			<-make(chan struct{}) // as a system call that doesn't see the context
			return nil, nil
		}, "no answer within"},
	}
	for fault, tc := range faults {
		for event, send := range events {
			t.Run(event+"/"+fault, func(t *testing.T) {
				h := newPlugin(t, &fakeAgent{do: tc.do}, Options{Timeout: 50 * time.Millisecond})
				err := send(h)
				if err == nil || !strings.Contains(err.Error(), tc.want) {
					t.Errorf("got error %v, want one that contains %q", err, tc.want)
				}
			})
		}
	}
}

func TestCreateAnswersNothingForNoPlan(t *testing.T) {
	h := newPlugin(t, &fakeAgent{do: func(context.Context) (*adjust.Plan, error) { return nil, nil }}, Options{})
	got, updates, err := h.CreateContainer(context.Background(), &api.PodSandbox{}, &api.Container{})
	if got != nil || updates != nil || err != nil {
		t.Errorf("got %v, %v, %v, want all nil", got, updates, err)
	}
}

func TestFromNRI(t *testing.T) {
	pod := &api.PodSandbox{
		Id: "p1", Name: "agent-0", Uid: "u1", Namespace: "agents",
		Labels:      map[string]string{"app": "agent"},
		Annotations: map[string]string{"mode.syslatch.dev/pod": "record"},
	}
	errno := uint(1)
	tests := map[string]struct {
		pod  *api.PodSandbox
		c    *api.Container
		want policy.Container
	}{
		"containerd": {pod, &api.Container{
			Id: "c1", Name: "worker", Labels: map[string]string{"l": "v"}, Pid: 12,
			Image: &api.Image{Name: "docker.io/library/nginx:1.27", Digest: "sha256:00"},
			Linux: &api.LinuxContainer{
				CgroupsPath: "/k8s/c1",
				SeccompPolicy: &api.LinuxSeccomp{
					DefaultAction: "SCMP_ACT_ERRNO", DefaultErrno: &api.OptionalUInt32{Value: 1},
					Architectures: []string{"SCMP_ARCH_X86_64"}, Flags: []string{"SECCOMP_FILTER_FLAG_LOG"},
					Syscalls: []*api.LinuxSyscall{{Names: []string{"read"}, Action: "SCMP_ACT_ALLOW"}},
				},
			},
		}, policy.Container{
			ID: "c1", Name: "worker", Namespace: "agents", Pod: "agent-0", PodUID: "u1",
			PodLabels: pod.Labels, Labels: map[string]string{"l": "v"}, Annotations: pod.Annotations,
			Image: "docker.io/library/nginx:1.27", ImageDigest: "sha256:00", CgroupsPath: "/k8s/c1", PID: 12,
			Seccomp: &specs.LinuxSeccomp{
				DefaultAction: "SCMP_ACT_ERRNO", DefaultErrnoRet: &errno,
				Architectures: []specs.Arch{"SCMP_ARCH_X86_64"}, Flags: []specs.LinuxSeccompFlag{"SECCOMP_FILTER_FLAG_LOG"},
				Syscalls: []specs.LinuxSyscall{{Names: []string{"read"}, Action: "SCMP_ACT_ALLOW", Args: []specs.LinuxSeccompArg{}}},
			},
		}},
		"cri-o tells the image by annotation and no profile": {pod, &api.Container{
			Id: "c1", Name: "worker",
			Annotations: map[string]string{
				crioImageName: "quay.io/x/y:1", crioSeccomp: "RuntimeDefault",
				crioRepoDigests: "localhost/y@sha256:22,quay.io/x/y@sha256:11",
			},
		}, policy.Container{
			ID: "c1", Name: "worker", Namespace: "agents", Pod: "agent-0", PodUID: "u1",
			PodLabels: pod.Labels, Annotations: pod.Annotations,
			Image: "quay.io/x/y:1", ImageDigest: "sha256:11", SeccompUnknown: true,
		}},
		"cri-o and an unconfined container": {pod, &api.Container{
			Id: "c1", Name: "worker",
			Annotations: map[string]string{crioImageName: "y@sha256:11", crioSeccomp: "Unconfined", crioRepoDigests: "y@sha256:11"},
		}, policy.Container{
			ID: "c1", Name: "worker", Namespace: "agents", Pod: "agent-0", PodUID: "u1",
			PodLabels: pod.Labels, Annotations: pod.Annotations,
			Image: "y@sha256:11", ImageDigest: "sha256:11",
		}},
		// Its digests would be the pod's word.
		"cri-o and an image without a name": {pod, &api.Container{
			Id: "c1", Name: "worker",
			Annotations: map[string]string{crioImageName: "", crioSeccomp: "RuntimeDefault", crioRepoDigests: "quay.io/x/y@sha256:11"},
		}, policy.Container{
			ID: "c1", Name: "worker", Namespace: "agents", Pod: "agent-0", PodUID: "u1",
			PodLabels: pod.Labels, Annotations: pod.Annotations,
			SeccompUnknown: true,
		}},
		"an older cri-o, and a pod that claims": {
			&api.PodSandbox{Id: "p1", Annotations: map[string]string{crioSeccomp: "Unconfined"}},
			&api.Container{Id: "c1", Annotations: map[string]string{crioSeccomp: "Unconfined"}},
			policy.Container{ID: "c1", SeccompUnknown: true, Annotations: map[string]string{crioSeccomp: "Unconfined"}},
		},
		"containerd: an annotation is the pod's word": {nil, &api.Container{
			Id: "c1", Annotations: map[string]string{crioImageName: "quay.io/x/y:1"},
		}, policy.Container{ID: "c1"}},
		"nothing known": {nil, &api.Container{Id: "c1"}, policy.Container{ID: "c1"}},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			engine := "containerd"
			if strings.Contains(name, engineCRIO) {
				engine = engineCRIO
			}
			if diff := cmp.Diff(tc.want, fromNRI(engine, tc.pod, tc.c)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestTakesErrno(t *testing.T) {
	for version, want := range map[string]bool{
		"": false, "unknown": false, "(devel)": false, "v0.10.0": false, "v0.11.0": false, "0.9.1": false,
		"v0.12.0": true, "v0.12.3": true, "0.13.0": true, "v1.0.0": true,
	} {
		if takesErrno(version) != want {
			t.Errorf("NRI %q: got %v", version, !want)
		}
	}
}

func ptr[T any](v T) *T { return &v }

func TestToNRI(t *testing.T) {
	plan := &adjust.Plan{
		Seccomp: &specs.LinuxSeccomp{
			DefaultAction: "SCMP_ACT_ERRNO",
			Architectures: []specs.Arch{"SCMP_ARCH_X86_64"},
			Syscalls: []specs.LinuxSyscall{
				{Names: []string{"read"}, Action: "SCMP_ACT_ALLOW"},
				{Names: []string{"mseal"}, Action: "SCMP_ACT_ERRNO", ErrnoRet: ptr(uint(38))},
			},
		},
		Resources: &specs.LinuxResources{
			Memory:  &specs.LinuxMemory{Limit: ptr(int64(1 << 20))},
			CPU:     &specs.LinuxCPU{Quota: ptr(int64(50000)), Period: ptr(uint64(100000)), Shares: ptr(uint64(512))},
			Pids:    &specs.LinuxPids{Limit: ptr(int64(64))},
			Unified: map[string]string{"memory.high": "524288"},
		},
		OOMScoreAdj: ptr(500),
		Rlimits:     []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 100, Hard: 200}},
	}
	a := toNRI(plan)
	got := a.GetLinux().GetResources().ToOCI()
	if diff := cmp.Diff(plan.Resources.Memory.Limit, got.Memory.Limit); diff != "" {
		t.Errorf("memory (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(plan.Resources.CPU, got.CPU); diff != "" {
		t.Errorf("cpu (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(plan.Resources.Pids, got.Pids); diff != "" {
		t.Errorf("pids (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(plan.Resources.Unified, got.Unified); diff != "" {
		t.Errorf("unified (-want +got):\n%s", diff)
	}
	if got := a.GetLinux().GetOomScoreAdj().GetValue(); got != 500 {
		t.Errorf("oom_score_adj: got %d, want 500", got)
	}
	if r := a.GetRlimits(); len(r) != 1 || r[0].GetType() != "RLIMIT_NOFILE" || r[0].GetSoft() != 100 || r[0].GetHard() != 200 {
		t.Errorf("rlimits: got %v", r)
	}
	back := existingSeccomp(&api.Container{Linux: &api.LinuxContainer{SeccompPolicy: a.GetLinux().GetSeccompPolicy()}})
	if back.DefaultAction != plan.Seccomp.DefaultAction || len(back.Syscalls) != 2 || *back.Syscalls[1].ErrnoRet != 38 {
		t.Errorf("seccomp: got %+v", back)
	}
}

// A plan without seccomp or limits must own no field: NRI fails a creation in
// which two plugins own one.
func TestToNRIOwnsNothingByItself(t *testing.T) {
	if a := toNRI(&adjust.Plan{}); a.GetLinux() != nil || a.GetRlimits() != nil {
		t.Errorf("got %v, want an empty adjustment", a)
	}
}

func TestConfigureMakesTheAgent(t *testing.T) {
	var given string
	h := newPlugin(t, nil, Options{Configure: func(_ context.Context, config string) (Agent, error) {
		given = config
		if config == "bad" {
			return nil, errors.New("line 1: bad")
		}
		return &fakeAgent{do: func(context.Context) (*adjust.Plan, error) { return nil, nil }}, nil
	}})
	if _, err := h.Configure(context.Background(), "bad", "containerd", "2.4.2"); err == nil || !strings.Contains(err.Error(), "line 1") {
		t.Errorf("bad configuration: got %v", err)
	}
	if _, err := h.Configure(context.Background(), "good", "containerd", "2.4.2"); err != nil || given != "good" {
		t.Errorf("got %v with configuration %q", err, given)
	}
	if err := events["CreateContainer"](h); err != nil {
		t.Error(err)
	}
}

func TestSynchronizeLeavesOutStoppedContainers(t *testing.T) {
	agent := &fakeAgent{do: func(context.Context) (*adjust.Plan, error) { return nil, nil }}
	h := newPlugin(t, agent, Options{})
	_, err := h.Synchronize(context.Background(), []*api.PodSandbox{{Id: "p", Namespace: "ns"}}, []*api.Container{
		{Id: "runs", PodSandboxId: "p", State: api.ContainerState_CONTAINER_RUNNING},
		{Id: "waits", PodSandboxId: "p", State: api.ContainerState_CONTAINER_CREATED},
		{Id: "ended", PodSandboxId: "p", State: api.ContainerState_CONTAINER_STOPPED},
	})
	if err != nil {
		t.Fatal(err)
	}
	want := []policy.Container{{ID: "runs", Namespace: "ns"}, {ID: "waits", Namespace: "ns"}}
	if diff := cmp.Diff(want, agent.seen); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	// One that runs may have been started unseen.
	if diff := cmp.Diff([]string{"runs"}, agent.started); diff != "" {
		t.Errorf("started (-want +got):\n%s", diff)
	}
}

// A plan behind the deadline reaches nobody: it must not stay planned.
func TestLatePlanIsTakenBack(t *testing.T) {
	for name, tc := range map[string]struct {
		answer func() (*adjust.Plan, error)
		want   string // id that is stopped
	}{
		"plan":  {func() (*adjust.Plan, error) { return &adjust.Plan{}, nil }, "c1"},
		"error": {func() (*adjust.Plan, error) { return nil, errors.New("too late") }, ""},
		"panic": {func() (*adjust.Plan, error) { panic("too late") }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				goOn := make(chan struct{})
				agent := &fakeAgent{stopped: make(chan string, 1), do: func(context.Context) (*adjust.Plan, error) {
					<-goOn // minds no context
					return tc.answer()
				}}
				h := newPlugin(t, agent, Options{Timeout: time.Second})
				began := time.Now()
				_, _, err := h.CreateContainer(context.Background(), &api.PodSandbox{}, &api.Container{Id: "c1", Name: "app"})
				if !errors.Is(err, context.DeadlineExceeded) || time.Since(began) != time.Second {
					t.Errorf("got %v after %s, want a deadline of 1s", err, time.Since(began))
				}
				close(goOn)
				synctest.Wait()
				select {
				case got := <-agent.stopped:
					if got != tc.want {
						t.Errorf("stopped %q, want %q", got, tc.want)
					}
				default:
					if tc.want != "" {
						t.Error("the late plan was not taken back")
					}
				}
			})
		})
	}
}

// An answer in time is used, and nothing is taken back.
func TestPlanInTimeStays(t *testing.T) {
	agent := &fakeAgent{stopped: make(chan string, 1), do: func(context.Context) (*adjust.Plan, error) { return &adjust.Plan{}, nil }}
	h := newPlugin(t, agent, Options{})
	if a, _, err := h.CreateContainer(context.Background(), &api.PodSandbox{}, &api.Container{Id: "c1"}); a == nil || err != nil {
		t.Errorf("got %v, %v", a, err)
	}
	if len(agent.stopped) != 0 {
		t.Errorf("stopped %s", <-agent.stopped)
	}
}

func TestConfigureSurvivesAPanic(t *testing.T) {
	h := newPlugin(t, nil, Options{Configure: func(context.Context, string) (Agent, error) { panic("nil map") }})
	if _, err := h.Configure(context.Background(), "", "containerd", "2.4.2"); err == nil || !strings.Contains(err.Error(), "internal error: nil map") {
		t.Errorf("got %v", err)
	}
}
