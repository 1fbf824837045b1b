// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// PodOptions of NewPod; zero values are usable.
type PodOptions struct {
	Name        string // default "pod-N"
	Namespace   string // default "default"
	Labels      map[string]string
	Annotations map[string]string
	Runtime     string // Runc11 (default) or Runc15
	Privileged  bool   // privileged containers need a privileged pod
	// SharedPID: containers could share the sandbox's pid namespace. Without it,
	// CRI-O makes no sandbox container.
	SharedPID bool
}

// Pod is a CRI sandbox on the host's network.
type Pod struct {
	host   *Host
	id     string
	config *runtimeapi.PodSandboxConfig
}

// NewPod starts a pod. It is removed by Host.Close at the latest.
func (h *Host) NewPod(ctx context.Context, o PodOptions) (*Pod, error) {
	n := h.counter.Add(1)
	if o.Name == "" {
		o.Name = fmt.Sprintf("pod-%d", n)
	}
	if o.Namespace == "" {
		o.Namespace = "default"
	}
	logs := filepath.Join(h.Dir, "logs", fmt.Sprint(n))
	if err := os.MkdirAll(logs, 0o755); err != nil {
		return nil, err
	}
	pid := runtimeapi.NamespaceMode_CONTAINER
	if o.SharedPID {
		pid = runtimeapi.NamespaceMode_POD
	}
	config := &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: o.Name, Namespace: o.Namespace, Uid: fmt.Sprintf("uid-%d", n)},
		Labels:       o.Labels,
		Annotations:  o.Annotations,
		LogDirectory: logs,
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			CgroupParent: h.cgroup,
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
				NamespaceOptions: &runtimeapi.NamespaceOption{Network: runtimeapi.NamespaceMode_NODE, Pid: pid},
				Privileged:       o.Privileged,
			},
		},
	}
	r, err := h.Runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: config, RuntimeHandler: o.Runtime})
	if err != nil {
		return nil, fmt.Errorf("run pod %s: %w", o.Name, err)
	}
	p := &Pod{h, r.GetPodSandboxId(), config}
	h.pods = append(h.pods, p)
	return p, nil
}

// Remove stops and removes the pod and its containers. If that fails, for one
// because ctx has ended, Host.Close tries again.
func (p *Pod) Remove(ctx context.Context) error {
	// CRI-O gives a container that minds no SIGTERM minutes.
	if r, err := p.host.Runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{PodSandboxId: p.id}}); err == nil {
		for _, c := range r.GetContainers() {
			_, _ = p.host.Runtime.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: c.GetId()}) // the pod's stop tells
		}
	}
	_, err1 := p.host.Runtime.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.id})
	_, err2 := p.host.Runtime.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.id})
	if err2 == nil {
		p.host.pods = slices.DeleteFunc(p.host.pods, func(q *Pod) bool { return q == p })
	}
	return errors.Join(err1, err2)
}

// ContainerOptions of Create and Run.
type ContainerOptions struct {
	Name       string // default "app"
	Image      string // default BusyboxImage
	Command    []string
	Args       []string
	Env        map[string]string
	Seccomp    runtimeapi.SecurityProfile_ProfileType
	SeccompRef string // for Localhost
	// Confined asks for Seccomp; without it the container is unconfined.
	Confined   bool
	NoNewPrivs bool
	Privileged bool
	User       int64 // root, if 0
	Mounts     []*runtimeapi.Mount
	SharedPID  bool // in the sandbox's pid namespace; the pod has to be SharedPID, too
}

// Container is a CRI container.
type Container struct {
	pod *Pod
	ID  string
	log string
}

// Create creates a container; the error is the runtime's. Several may be created at once.
func (p *Pod) Create(ctx context.Context, o ContainerOptions) (*Container, error) {
	if o.Name == "" {
		o.Name = "app"
	}
	if o.Image == "" {
		o.Image = BusyboxImage
	}
	n := p.host.counter.Add(1)
	seccomp := &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined}
	if o.Confined {
		seccomp = &runtimeapi.SecurityProfile{ProfileType: o.Seccomp, LocalhostRef: o.SeccompRef}
	}
	log := fmt.Sprintf("%s-%d.log", o.Name, n)
	pid := runtimeapi.NamespaceMode_CONTAINER
	if o.SharedPID {
		pid = runtimeapi.NamespaceMode_POD
	}
	config := &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: o.Name, Attempt: uint32(n)},
		Image:    &runtimeapi.ImageSpec{Image: o.Image, UserSpecifiedImage: o.Image}, // CRI-O insists on both
		Command:  o.Command, Args: o.Args, LogPath: log, Mounts: o.Mounts,
		// A kubelet's: CRI-O knows the container's name from them only.
		Labels: map[string]string{
			"io.kubernetes.container.name": o.Name, "io.kubernetes.pod.name": p.config.GetMetadata().GetName(),
			"io.kubernetes.pod.namespace": p.config.GetMetadata().GetNamespace(), "io.kubernetes.pod.uid": p.config.GetMetadata().GetUid(),
		},
		Linux: &runtimeapi.LinuxContainerConfig{
			SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
				NamespaceOptions: &runtimeapi.NamespaceOption{Network: runtimeapi.NamespaceMode_NODE, Pid: pid},
				Seccomp:          seccomp, NoNewPrivs: o.NoNewPrivs, Privileged: o.Privileged,
				RunAsUser: &runtimeapi.Int64Value{Value: o.User},
			},
		},
	}
	for k, v := range o.Env {
		config.Envs = append(config.Envs, &runtimeapi.KeyValue{Key: k, Value: []byte(v)})
	}
	r, err := p.host.Runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{
		PodSandboxId: p.id, Config: config, SandboxConfig: p.config,
	})
	if err != nil {
		return nil, err
	}
	return &Container{p, r.GetContainerId(), filepath.Join(p.config.GetLogDirectory(), log)}, nil
}

// Start starts the container.
func (c *Container) Start(ctx context.Context) error {
	_, err := c.pod.host.Runtime.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: c.ID})
	return err
}

// Result is how a container ended.
type Result struct {
	Code int32
	Log  string // standard output and error
}

// Wait waits for the container's end.
func (c *Container) Wait(ctx context.Context) (Result, error) {
	var code int32
	err := until(ctx, func() error {
		r, err := c.pod.host.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: c.ID})
		if err != nil {
			return err
		}
		if s := r.GetStatus().GetState(); s != runtimeapi.ContainerState_CONTAINER_EXITED {
			return fmt.Errorf("container is %s", s)
		}
		code = r.GetStatus().GetExitCode()
		return nil
	})
	return Result{code, c.Log()}, err
}

// Log is what the container has written so far.
func (c *Container) Log() string {
	data, err := os.ReadFile(c.log)
	if err != nil {
		return ""
	}
	return parseLog(data)
}

// WaitLog waits until the container has written what want accepts.
func (c *Container) WaitLog(ctx context.Context, want func(log string) bool) error {
	return until(ctx, func() error {
		if log := c.Log(); !want(log) {
			return fmt.Errorf("log so far: %q", log)
		}
		return nil
	})
}

// Exec runs a command in the container.
func (c *Container) Exec(ctx context.Context, command ...string) (Result, error) {
	r, err := c.pod.host.Runtime.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: c.ID, Cmd: command, Timeout: 30})
	if err != nil {
		return Result{}, err
	}
	return Result{r.GetExitCode(), string(r.GetStdout()) + string(r.GetStderr())}, nil
}

// Stop stops the container: SIGTERM, then after the grace period SIGKILL.
func (c *Container) Stop(ctx context.Context, grace time.Duration) error {
	_, err := c.pod.host.Runtime.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: c.ID, Timeout: int64(grace / time.Second)})
	return err
}

// Remove removes the container.
func (c *Container) Remove(ctx context.Context) error {
	_, err := c.pod.host.Runtime.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: c.ID})
	return err
}

// Run creates, starts and waits for a container in a pod of its own, and removes
// both.
func (h *Host) Run(ctx context.Context, po PodOptions, co ContainerOptions) (Result, error) {
	p, err := h.NewPod(ctx, po)
	if err != nil {
		return Result{}, err
	}
	r, err := p.Run(ctx, co)
	return r, errors.Join(err, p.Remove(ctx))
}

// Run creates, starts, waits for and removes a container.
func (p *Pod) Run(ctx context.Context, o ContainerOptions) (Result, error) {
	c, err := p.Create(ctx, o)
	if err != nil {
		return Result{}, err
	}
	if err := c.Start(ctx); err != nil {
		return Result{}, errors.Join(err, c.Remove(ctx))
	}
	r, err := c.Wait(ctx)
	return r, errors.Join(err, c.Remove(ctx))
}
