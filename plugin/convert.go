// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"github.com/containerd/nri/pkg/api"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/syslatch/syslatch/internal/adjust"
	"github.com/syslatch/syslatch/internal/policy"
)

// What CRI-O 1.36.1 tells by a container's annotations only. It writes them over
// those of the pod that have the same names, except for the digests of an image
// that has none.
const (
	crioImageName   = "io.kubernetes.cri-o.ImageName" // empty for an image without a name
	crioRepoDigests = "io.kubernetes.cri-o.ImageRepoDigests"
	crioSeccomp     = "io.kubernetes.cri-o.SeccompProfilePath" // "RuntimeDefault", "Unconfined", a path, or empty
)

// engineCRIO is how CRI-O names itself.
const engineCRIO = "cri-o"

// fromNRI takes from NRI's pod and container of an engine what policies decide on.
// pod may be nil: a container whose pod the runtime did not tell.
func fromNRI(engine string, pod *api.PodSandbox, c *api.Container) policy.Container {
	out := policy.Container{
		ID:          c.GetId(),
		Name:        c.GetName(),
		Namespace:   pod.GetNamespace(),
		Pod:         pod.GetName(),
		PodUID:      pod.GetUid(),
		PodLabels:   pod.GetLabels(),
		Labels:      c.GetLabels(),
		Annotations: pod.GetAnnotations(),
		CgroupsPath: c.GetLinux().GetCgroupsPath(),
		PID:         int(c.GetPid()),
		Seccomp:     existingSeccomp(c),
	}
	if image := c.GetImage(); image != nil {
		out.Image, out.ImageDigest = image.GetName(), image.GetDigest()
	} else if engine == engineCRIO {
		a := c.GetAnnotations()
		out.Image = a[crioImageName]
		if out.Image != "" { // has a digest, too
			out.ImageDigest = policy.RepoDigest(out.Image, a[crioRepoDigests])
		}
		// It doesn't pass the profile, but whether there is none. One that the pod
		// claims, too, may be from a CRI-O that doesn't say so.
		_, claimed := pod.GetAnnotations()[crioSeccomp]
		out.SeccompUnknown = c.GetLinux().GetSeccompProfile() == nil && out.Seccomp == nil && (a[crioSeccomp] != "Unconfined" || claimed)
	}
	return out
}

// existingSeccomp is the profile that the runtime would apply without us;
// nil for unconfined, and on CRI-O, which doesn't tell.
func existingSeccomp(c *api.Container) *specs.LinuxSeccomp {
	p := c.GetLinux().GetSeccompPolicy()
	if p == nil {
		return nil
	}
	out := &specs.LinuxSeccomp{
		DefaultAction:    specs.LinuxSeccompAction(p.GetDefaultAction()),
		ListenerPath:     p.GetListenerPath(),
		ListenerMetadata: p.GetListenerMetadata(),
		Syscalls:         api.ToOCILinuxSyscalls(p.GetSyscalls()),
	}
	if e := p.GetDefaultErrno(); e != nil {
		v := uint(e.GetValue())
		out.DefaultErrnoRet = &v
	}
	for _, a := range p.GetArchitectures() {
		out.Architectures = append(out.Architectures, specs.Arch(a))
	}
	for _, f := range p.GetFlags() {
		out.Flags = append(out.Flags, specs.LinuxSeccompFlag(f))
	}
	return out
}

// toNRI translates a plan. It sets nothing that the plan leaves alone: NRI
// refuses a creation in which two plugins set the same field.
func toNRI(plan *adjust.Plan) *api.ContainerAdjustment {
	a := &api.ContainerAdjustment{}
	if plan.Seccomp != nil {
		a.SetLinuxSeccompPolicy(api.FromOCILinuxSeccomp(plan.Seccomp))
	}
	if r := plan.Resources; r != nil {
		resourcesToNRI(a, r)
	}
	if plan.OOMScoreAdj != nil {
		a.SetLinuxOomScoreAdj(plan.OOMScoreAdj)
	}
	for _, m := range plan.Mounts {
		a.AddMount(&api.Mount{Destination: m.Destination, Type: m.Type, Source: m.Source, Options: m.Options})
	}
	for _, l := range plan.Rlimits {
		a.AddRlimit(l.Type, l.Hard, l.Soft)
	}
	return a
}

// resourcesToNRI translates what adjust.Build makes for NRI. Memory carries the
// limit only: containerd sets swap equal to it, and the rest goes by unified.
func resourcesToNRI(a *api.ContainerAdjustment, r *specs.LinuxResources) {
	if m := r.Memory; m != nil && m.Limit != nil {
		a.SetLinuxMemoryLimit(*m.Limit)
	}
	if c := r.CPU; c != nil {
		if c.Quota != nil {
			a.SetLinuxCPUQuota(*c.Quota)
		}
		if c.Period != nil {
			a.SetLinuxCPUPeriod(int64(*c.Period))
		}
		if c.Shares != nil {
			a.SetLinuxCPUShares(*c.Shares)
		}
	}
	if p := r.Pids; p != nil && p.Limit != nil {
		a.SetLinuxPidLimits(*p.Limit)
	}
	for key, value := range r.Unified {
		a.AddLinuxUnified(key, value)
	}
}
