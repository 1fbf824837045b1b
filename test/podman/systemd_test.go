// SPDX-License-Identifier: Apache-2.0

package podman

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/internal/cgroup"
)

// With podman's other cgroup manager a container's cgroup is a scope that systemd
// makes, in machine.slice. The rest is as with cgroupfs.
func TestSystemdCgroups(t *testing.T) {
	each(t, func(t *testing.T, runtime string) {
		e := newEnv(t, runtime, "", limits+strings.TrimPrefix(byAnnotation, "\n"))
		s := startSystemd(t, e)
		if r := s.run("web", mode("record"), "ls", "/"); r.code != 0 || !strings.Contains(r.stdout, "bin\n") {
			t.Fatalf("record: %+v", r)
		}
		if v := e.version("web", 1); !has(v, "getdents64") || has(v, "mkdir") {
			t.Errorf("calls: %v", v.Manifest.Calls)
		}
		if r := s.run("web", mode("enforce"), "ls", "/"); r.code != 0 || !strings.Contains(r.stdout, "bin\n") {
			t.Errorf("enforce: %+v", r)
		}
		if r := s.run("web", mode("enforce"), "mkdir", "/x"); r.code == 0 || !strings.Contains(r.stderr, "Operation not permitted") {
			t.Errorf("enforce mkdir: %+v", r)
		}

		// In the background, with a program brought in.
		r := s.run("sleeper", append(mode("record"), "--detach"), "sleep", "1000")
		if r.code != 0 {
			t.Fatalf("record: %+v", r)
		}
		scope := s.scope(r)
		if events, err := os.ReadFile(scope + "/cgroup.events"); err != nil || !strings.Contains(string(events), "populated 1") {
			t.Errorf("the container's scope: %q, %v", events, err)
		}
		if st := e.stats(); st.Instances != 1 {
			t.Errorf("in the kernel: %+v", st)
		}
		if r := s.podman("exec", "sleeper", "mkdir", "/x"); r.code != 0 {
			t.Errorf("exec: %+v", r)
		}
		if r := s.podman("rm", "--force", "--time", "0", "sleeper"); r.code != 0 {
			t.Errorf("rm: %+v", r)
		}
		if v := e.version("sleeper", 1); !has(v, "mkdir") || has(v, "setns") {
			t.Errorf("calls: %v", v.Manifest.Calls)
		}

		if hierarchy.Mode != cgroup.V2 {
			t.Log("not tried: limits need cgroup v2 controllers")
		} else {
			// That they are read back as they should be is a condition of the start.
			r := s.run("limited", []string{"--detach"}, "sleep", "1000")
			if r.code != 0 {
				t.Fatalf("limited: %+v", r)
			}
			scope := s.scope(r)
			if filepath.Base(runtime) == "crun" {
				scope += "/container" // where crun has the process, and the limits
			}
			for file, want := range map[string]string{"memory.max": "67108864\n", "pids.max": "77\n", "cpu.max": "50000 100000\n"} {
				if got, err := os.ReadFile(filepath.Join(scope, file)); err != nil || string(got) != want {
					t.Errorf("%s: %q, %v, want %q", file, got, err, want)
				}
			}
			s.podman("rm", "--force", "--time", "0", "limited")
			e.version("limited", 1)
		}
		e.idle()
	})
}

// manager is a systemd and what is in its namespaces.
type manager struct {
	e    *env
	pid  int    // systemd's, here
	root string // the cgroup that it takes for the root, here
	conf string
}

// boot makes systemd pid 1 of namespaces that don't show it the machine's own, and
// of a tree of cgroups that is pure v2 wherever it runs. It must not change what
// namespaces don't have.
const boot = `
mount --make-rprivate /
mount -t proc proc /proc
mount --bind /proc/sys /proc/sys
mount -o remount,bind,ro /proc/sys
mount -t tmpfs tmpfs /run
umount --lazy /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
exec env -i container=test SYSTEMD_UNIT_PATH="$1" /lib/systemd/systemd --system --unit=test.target --log-target=null --show-status=no
`

// units are all that this systemd has: the bus, on which crun speaks to it.
var units = map[string]string{
	"test.target": "[Unit]\nDefaultDependencies=no\nRequires=dbus.socket\nAfter=dbus.socket\n",
	"dbus.socket": "[Unit]\nDefaultDependencies=no\n[Socket]\nListenStream=/run/dbus/system_bus_socket\n",
	"dbus.service": "[Unit]\nDefaultDependencies=no\nRequires=dbus.socket\n[Service]\nType=notify\nNotifyAccess=main\n" +
		"ExecStart=/usr/bin/dbus-daemon --system --address=systemd: --nofork --nopidfile --systemd-activation --nosyslog\n",
}

// startSystemd starts systemd as a cgroup manager beside whatever is pid 1.
func startSystemd(t *testing.T, e *env) *manager {
	t.Helper()
	s := &manager{e: e, root: filepath.Join(hierarchy.Unified, parent, "systemd-"+filepath.Base(e.runtime)), conf: e.dir + "/systemd.conf"}
	conf, err := os.ReadFile(e.conf)
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Replace(string(conf), `"cgroupfs"`, `"systemd"`, 1)
	if hierarchy.Mode != cgroup.V2 {
		// Controllers are v1's, so not in the tree that this systemd has.
		text = strings.Replace(text, "[containers]\n", "[containers]\npids_limit = 0\n", 1)
	}
	if err := os.WriteFile(s.conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	path := e.dir + "/units"
	if err := errors.Join(os.Mkdir(path, 0o755), os.MkdirAll(s.root, 0o755)); err != nil {
		t.Fatal(err)
	}
	for name, text := range units {
		if err := os.WriteFile(filepath.Join(path, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	above := filepath.Dir(s.root)
	controllers, err := os.ReadFile(above + "/cgroup.controllers")
	if err != nil {
		t.Fatal(err)
	}
	for c := range strings.FieldsSeq(string(controllers)) {
		if err := os.WriteFile(above+"/cgroup.subtree_control", []byte("+"+c), 0); err != nil {
			t.Fatal(err)
		}
	}
	dir, err := os.Open(s.root)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	// The cgroup namespace's root is the cgroup that the process is in when it
	// makes the namespace: so that one comes last.
	cmd := exec.Command("unshare", "--cgroup", "sh", "-ec", boot, "sh", path)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWNET,
		UseCgroupFD: true, CgroupFD: int(dir.Fd()), Pdeathsig: unix.SIGKILL,
	}
	var says strings.Builder
	cmd.Stdout, cmd.Stderr = &says, &says
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	s.pid = cmd.Process.Pid
	ended := make(chan struct{})
	go func() { _ = cmd.Wait(); close(ended) }()
	t.Cleanup(func() {
		select {
		case <-ended:
			t.Errorf("systemd ended: %s, %s", cmd.ProcessState, &says)
			return
		default:
		}
		if r := s.podman("rm", "--all", "--force", "--time", "0"); r.code != 0 {
			t.Errorf("rm: %+v", r)
		}
		_ = cmd.Process.Kill() // and with it all in its pid namespace
		<-ended
	})
	e.wait("systemd", func() bool {
		select {
		case <-ended:
			t.FailNow() // the cleanup says why
		default:
		}
		for _, socket := range []string{"systemd/private", "dbus/system_bus_socket"} {
			if _, err := os.Stat(fmt.Sprintf("/proc/%d/root/run/%s", s.pid, socket)); err != nil {
				return false
			}
		}
		return true
	})
	return s
}

// podman runs podman as a service of that systemd.
func (s *manager) podman(args ...string) result {
	args = append([]string{
		"--target", strconv.Itoa(s.pid), "--pid", "--mount", "--uts", "--ipc", "--net", "--cgroup",
		"systemd-run", "--quiet", "--wait", "--pipe", "--collect", "--service-type=exec", "--property=DefaultDependencies=no",
		"--setenv=CONTAINERS_CONF=" + s.conf, "--setenv=PATH=" + os.Getenv("PATH"),
		// Without it podman takes itself for a user's: for a service's it leaves
		// conmon in the service, which ends with podman.
		"env", "--unset=INVOCATION_ID",
	}, command(s.e.ctx, "", args...).Args...)
	cmd := exec.CommandContext(s.e.ctx, "nsenter", args...)
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return result{-1, stdout.String(), err.Error() + ": " + stderr.String()}
	}
	return result{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

func (s *manager) run(name string, options []string, argv ...string) result {
	args := append([]string{"run", "--entrypoint", "[]", "--name", name, "--replace"}, options...)
	return s.podman(append(append(args, image), argv...)...)
}

// scope is the cgroup of a container, of which podman has printed the id.
func (s *manager) scope(r result) string {
	return filepath.Join(s.root, "machine.slice", "libpod-"+strings.TrimSpace(r.stdout)+".scope")
}
