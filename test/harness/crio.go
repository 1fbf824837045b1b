// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// HooksDir is where the CRI-O of a host finds OCI hooks. It reads it as it starts.
func (h *Host) HooksDir() string { return filepath.Join(h.Dir, "hooks.d") }

const crioTemplate = `[crio]
root = "%[1]s/root"
runroot = "%[1]s/run"
storage_driver = %[9]q
log_dir = "%[1]s/logs"
version_file = "%[1]s/version"
clean_shutdown_file = "%[1]s/clean.shutdown"
internal_wipe = false
[crio.api]
listen = %[2]q
stream_port = "0"
[crio.runtime]
default_runtime = "runc"
cgroup_manager = "cgroupfs"
disable_hostport_mapping = true
pinns_path = "%[3]s/pinns"
container_exits_dir = "%[1]s/exits"
container_attach_socket_dir = "%[1]s/attach"
namespaces_dir = "%[1]s/ns"
hooks_dir = ["%[1]s/hooks.d"]
%[4]s
[crio.image]
pause_image = "syslatch.test/pause:1"
pause_command = ""
signature_policy = "%[1]s/signatures.json"
signature_policy_dir = "%[1]s/signatures"
[crio.network]
network_dir = "%[1]s/cni"
plugin_dirs = ["%[1]s/cni"]
[crio.nri]
enable_nri = true
nri_listen = %[5]q
nri_plugin_dir = "%[1]s/plugins"
nri_plugin_config_dir = "%[1]s/conf.d"
nri_plugin_request_timeout = %[6]q
[crio.nri.default_validator]
nri_enable_default_validator = %[7]t
nri_validator_required_plugins = [%[8]s]
`

const crioRuntime = `[crio.runtime.runtimes.%[2]s]
runtime_path = %[3]q
runtime_root = "%[1]s/%[2]s"
monitor_path = "/usr/bin/conmon"
monitor_cgroup = "pod"
allowed_annotations = ["io.containers.trace-syscall"]
`

// crio writes its configuration.
func (h *Host) crio(o Options) (*exec.Cmd, error) {
	for _, d := range []string{"hooks.d", "cni", "signatures"} {
		if err := os.Mkdir(filepath.Join(h.Dir, d), 0o755); err != nil {
			return nil, err
		}
	}
	// One overlay cannot be on another.
	driver := "overlay"
	var st unix.Statfs_t
	if err := unix.Statfs(h.Dir, &st); err != nil {
		return nil, err
	}
	if st.Type == unix.OVERLAYFS_SUPER_MAGIC {
		driver = "vfs"
	}
	var runtimes string
	for _, r := range [][2]string{{Runc11, "/usr/sbin/runc"}, {Runc15, filepath.Join(o.Tools, "runc")}} {
		runtimes += fmt.Sprintf(crioRuntime, h.Dir, r[0], r[1])
	}
	config, podmanConf := filepath.Join(h.Dir, "crio.conf"), filepath.Join(h.Dir, "podman.conf")
	for path, data := range map[string]string{
		config:                                  fmt.Sprintf(crioTemplate, h.Dir, h.Socket, o.CRIO, runtimes, h.NRISocket, o.RequestTimeout, len(o.RequiredPlugins) > 0, quoted(o.RequiredPlugins), driver),
		podmanConf:                              "[engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"none\"\n",
		filepath.Join(h.Dir, "signatures.json"): `{"default": [{"type": "insecureAcceptAnything"}]}`,
	} {
		if err := os.WriteFile(path, []byte(data), 0o600); err != nil {
			return nil, err
		}
	}
	h.load = func(ctx context.Context, i *Image) *exec.Cmd {
		cmd := exec.CommandContext(ctx, "podman", "--root", filepath.Join(h.Dir, "root"), "--runroot", filepath.Join(h.Dir, "run"),
			"--tmpdir", filepath.Join(h.Dir, "podman"), "--storage-driver", driver, "load", "-i", i.Archive)
		cmd.Env = append(os.Environ(), "CONTAINERS_CONF="+podmanConf)
		return cmd
	}
	return exec.Command(filepath.Join(o.CRIO, "crio"), "--config", config, "--config-dir", "", "--log-level", "debug"), nil
}
