// SPDX-License-Identifier: Apache-2.0

// Package hook is the OCI adapter: a container's spec and state in, a changed
// spec out. It decides nothing itself; an [Agent], which the node's agent
// implements, does.
//
// # Stages
//
//   - precreate (podman): the spec on stdin, the spec that the runtime is to get
//     on stdout. What is not changed stays byte for byte what it was.
//   - createRuntime: the state on stdin; the runtime's init is in its cgroup and
//     has not loaded its filter yet, in runc (1.1.5) and crun (1.8.1) alike. So a
//     recording that begins here lacks nothing.
//   - poststart: asked for in the spec, where the container is recorded or there
//     are settings to read back that a process only has once its program runs.
//   - poststop: the container is gone. podman waits for it before `podman run`,
//     wait, stop and rm return.
//
// # Rootless
//
// A hook that isn't the host's root has [Remote] for its agent, which lets syslatchd
// answer; there a [Server] has an agent for each user.
//
// # Failing
//
// podman drops what a precreate hook writes to its standard error, and says
// "exit status 1". So [Hook.Precreate] answers with a spec that can't start: its
// first prestart and createRuntime hook is this program again, with the message,
// which the runtime reports. It fails itself only where there is no spec to change.
package hook
