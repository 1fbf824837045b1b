// SPDX-License-Identifier: Apache-2.0

package readme

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/syslatch/syslatch/internal/api/apitest"
	"github.com/syslatch/syslatch/internal/store"
	"github.com/syslatch/syslatch/profiles"
)

// help is what `syslatch ARGS --help` prints.
func help(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command(filepath.Join(bin, "syslatch"), append(args, "--help")...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v --help: %v\n%s", args, err, out)
	}
	return string(out)
}

// section is the lines below a heading of a help, without their indentation.
func section(text, heading string) (out []string) {
	_, below, _ := strings.Cut(text, "\n"+heading+":\n")
	for line := range strings.Lines(below) {
		line = strings.TrimRight(line, "\n")
		if !strings.HasPrefix(line, "  ") {
			break
		}
		out = append(out, strings.TrimSpace(line))
	}
	return out
}

// examples are those of a command and of all below it.
func examples(t *testing.T, args ...string) (out []string) {
	t.Helper()
	text := help(t, args...)
	out = section(text, "Examples")
	for _, line := range section(text, "Available Commands") {
		if name := strings.Fields(line)[0]; name != "completion" && name != "help" { // cobra's
			out = append(out, examples(t, append(slices.Clone(args), name)...)...)
		}
	}
	return out
}

// What an example supposes to be there: a program, the store of the node, and
// docker, which only has to be given a file that exists.
const (
	app    = "#!/bin/sh\nexec ls / >/dev/null\n"
	docker = "#!/bin/sh\nfor a; do case $a in seccomp=*) exec test -f \"${a#seccomp=}\";; esac; done\nexit 9\n"
)

// node lets an example write where it writes on a node, and finds a policy there.
const node = "for d in /etc /usr/share /srv; do mkdir -p \"$SCRATCH$d\"/{upper,work} && " +
	"mount -t overlay -o \"lowerdir=$d,upperdir=$SCRATCH$d/upper,workdir=$SCRATCH$d/work\" overlay $d || exit; done; " +
	"mkdir -p /etc/syslatch && printf 'apiVersion: syslatch.dev/v1\\npolicies: []\\n' >/etc/syslatch/policy.yaml && "

const nodeStore = "mount -t tmpfs tmpfs /var/lib && mkdir -p /var/lib/syslatch && cp -a \"$STORE\" /var/lib/syslatch/profiles && "

// waiting is a process that reads until the test ends.
func waiting(t *testing.T) (pid int) {
	t.Helper()
	cmd := exec.Command("cat")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("what it was applied to: %v", err)
		}
	})
	// It begins to read when it has loaded its libraries.
	if _, err := in.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	return cmd.Process.Pid
}

func TestExamplesOfHelp(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	dir := t.TempDir()
	for name, text := range map[string]string{"app": app, "docker": docker} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, b := range blocks(t, "docs/phases.md") {
		if b.language == "yaml" {
			if err := os.WriteFile(filepath.Join(dir, "phases.yaml"), []byte(b.text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	storeDir := filepath.Join(dir, "store")
	s, err := store.Open(storeDir, store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for i, calls := range [][]string{{"execve", "read"}, {"execve", "write"}} {
		at := time.Date(2026, 11, 24, 12, i, 0, 0, time.UTC)
		_, err := s.Add(t.Context(), &profiles.Recording{
			SchemaVersion: 1, ID: at.Format("20060102T150405.000000000Z"), Workload: "docker.io/library/nginx/web",
			Started: at, Ended: at, Kernel: "6.12.0", Gate: profiles.GateFilter,
			Phases: map[string]profiles.Calls{profiles.DefaultPhase: {specs.ArchX86_64: calls}},
		}, store.AddOptions{Activate: true, Merge: profiles.MergeOptions{Created: at}})
		if err != nil {
			t.Fatal(err)
		}
	}

	at := time.Date(2026, 11, 24, 13, 0, 0, 0, time.UTC)
	if _, err := s.Add(t.Context(), &profiles.Recording{
		SchemaVersion: 1, ID: at.Format("20060102T150405.000000000Z"), Workload: "docker.io/library/node/agent",
		Started: at, Ended: at, Kernel: "6.12.0", Gate: profiles.GateFilter,
		Phases:  map[string]profiles.Calls{"read_only": {specs.ArchX86_64: {"stat"}}},
		Initial: "read_only",
	}, store.AddOptions{}); err != nil {
		t.Fatal(err)
	}

	supervisor := apitest.New(apitest.Instance(agentID, "agent"))
	phases := servePhases(t, supervisor)
	go func() { // the first that watches sees it end
		supervisor.AwaitWatchers(1)
		supervisor.End(agentID)
	}()

	all := examples(t)
	slices.Sort(all)
	all = slices.Compact(all)
	if len(all) < 15 {
		t.Fatalf("%d examples", len(all))
	}
	// Those that make app.json and app.rec before those that use them.
	makes := regexp.MustCompile(`^syslatch record -o app\.json (-- |--recording )`)
	slices.SortStableFunc(all, func(a, b string) int {
		return map[bool]int{false: 1}[makes.MatchString(a)] - map[bool]int{false: 1}[makes.MatchString(b)]
	})
	// The status of doctor and of hook status is about this host, the directory of
	// --no-new-privs' example is one that the profile doesn't let it make, and the
	// container of record's doesn't run here.
	refused := regexp.MustCompile(`^syslatch (doctor|hook status|run .*mkdir|record .*--container )`)
	for _, line := range all {
		t.Run(line, func(t *testing.T) {
			reader := waiting(t)
			scratch, err := os.MkdirTemp("", "syslatch-help-") // t.TempDir has the name's commas
			if err != nil {
				t.Fatal(err)
			}
			defer os.RemoveAll(scratch)
			cmd := exec.Command("bash", "-o", "pipefail", "-c", "mount -t bpf bpf /sys/fs/bpf && "+node+nodeStore+line)
			cmd.Dir = dir
			cmd.Env = append(os.Environ(), "PATH="+bin+":"+dir+":"+os.Getenv("PATH"), "STORE="+storeDir, "SYSLATCH_SOCKET="+phases, "SCRATCH="+scratch, fmt.Sprint("PID=", reader))
			cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
			out, err := cmd.CombinedOutput()
			if err != nil && !(refused.MatchString(line) && slices.Contains([]int{1, 125}, cmd.ProcessState.ExitCode())) {
				t.Errorf("%v\n%s", err, out)
			}
			if strings.Contains(string(out), "--help'") { // of a usage error
				t.Errorf("%s", out)
			}
		})
	}
}
