// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// A command must not run for an hour before it turns out that nothing can be
// written, or appended to.
func TestWhatCantBeWrittenIsToldBeforeTheCommandRuns(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	mark := filepath.Join(dir, "ran")
	good := filepath.Join(dir, "good.json")
	at := func(name string) string { return filepath.Join(dir, name) }
	if err := os.Symlink(at("nothing"), at("dangling")); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"truncated": `{"defaultAction": "SCMP_ACT_ERRNO", "sysc`,
		"unknown":   `{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["frobnicate"],"action":"SCMP_ACT_ALLOW"}]}`,
		"condition": `{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["read"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":1,"op":"SCMP_CMP_EQ"}]}]}`,
		"permitted": `{"defaultAction":"SCMP_ACT_ALLOW"}`,
	} {
		if err := os.WriteFile(at(name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	readOnly := at("ro")
	mount(t, readOnly, "ro")
	tests := map[string]struct {
		args []string
		want string
	}{
		"directory":              {[]string{"-o", dir}, "is a directory (name a file in it)"},
		"no directory":           {[]string{"-o", at("none/x.json")}, "no directory " + at("none") + " (make it first)"},
		"below a file":           {[]string{"-o", at("truncated/x.json")}, "not a directory"},
		"link to nothing":        {[]string{"-o", at("dangling")}, "is a link to nothing"},
		"no file can be there":   {[]string{"-o", "/proc/x.json"}, "write /proc/x.json: "},
		"read-only":              {[]string{"-o", readOnly + "/x.json"}, "read-only file system"},
		"recording: directory":   {[]string{"-o", good, "--recording", dir}, "is a directory"},
		"recording: nowhere":     {[]string{"-o", good, "--recording", at("none/x.json")}, "no directory"},
		"append: standard input": {[]string{"-o", "-", "--append"}, "append needs a file"},
		"append: truncated":      {[]string{"-o", at("truncated"), "--append"}, "profile " + at("truncated") + ": line 1: "},
		"append: unknown call":   {[]string{"-o", at("unknown"), "--append"}, `"frobnicate"`},
		"append: conditions":     {[]string{"-o", at("condition"), "--append"}, "append to " + at("condition") + ": syscalls[0] has argument conditions"},
		"append: allows all":     {[]string{"-o", at("permitted"), "--append"}, "allows everything"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			r := syslatch(t, append(append([]string{"record"}, tc.args...), "--", "/usr/bin/touch", mark)...)
			if r.code != 125 || r.stdout != "" || !strings.HasPrefix(r.stderr, "syslatch: ") || !strings.Contains(r.stderr, tc.want) {
				t.Errorf("got %+v, want exit 125 and %q", r, tc.want)
			}
			if _, err := os.Stat(mark); err == nil {
				t.Fatal("the command ran")
			}
		})
	}
	left, err := filepath.Glob(filepath.Join(dir, ".*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestOutputReplacesFilesOnly(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	record := func(path string, command ...string) {
		t.Helper()
		if command == nil {
			command = []string{"/bin/true"}
		}
		if r := syslatch(t, append([]string{"record", "-o", path, "--"}, command...)...); r.code != 0 {
			t.Fatalf("%+v", r)
		}
	}

	// A device: root must be able to say -o /dev/null. This is one of our own.
	if err := unix.Mknod(at("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))); err != nil {
		t.Fatal(err)
	}
	record(at("null"))
	if st, err := os.Lstat(at("null")); err != nil || st.Mode()&os.ModeCharDevice == 0 {
		t.Errorf("the device has become %v, %v", st, err)
	}

	// A link stays, and so do the owner and the permissions of what it names.
	if err := os.WriteFile(at("target"), nil, 0o640); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(at("target"), 12345, 54321); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("target", at("link")); err != nil {
		t.Fatal(err)
	}
	record(at("link"))
	if to, err := os.Readlink(at("link")); err != nil || to != "target" {
		t.Errorf("the link has become %q, %v", to, err)
	}
	checkProfile(t, at("target"))
	st, err := os.Stat(at("target"))
	if err != nil {
		t.Fatal(err)
	}
	if owner := st.Sys().(*syscall.Stat_t); owner.Uid != 12345 || owner.Gid != 54321 || st.Mode() != 0o640 {
		t.Errorf("owner %d:%d, mode %v; want 12345:54321, 0640", owner.Uid, owner.Gid, st.Mode())
	}

	// What the command puts in the way is replaced, not followed.
	if err := os.WriteFile(at("precious"), []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	record(at("planted"), "/bin/ln", "-s", "precious", at("planted"))
	if data, err := os.ReadFile(at("precious")); err != nil || string(data) != "precious" {
		t.Errorf("a link of the command's was followed: %q, %v", data, err)
	}
	if st, err := os.Lstat(at("planted")); err != nil || !st.Mode().IsRegular() {
		t.Errorf("planted is %v, %v; want the profile", st, err)
	}
	checkProfile(t, at("planted"))
}

// checkProfile wants a whole profile that allows execve in a file.
func checkProfile(t *testing.T, path string) {
	t.Helper()
	if !slices.Contains(allowedIn(t, path), "execve") {
		t.Errorf("%s doesn't allow execve", path)
	}
}

func allowedIn(t *testing.T, path string) []string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var p specs.LinuxSeccomp
	if err := json.Unmarshal(data, &p); err != nil {
		t.Fatalf("%s: %v\n%s", path, err, data)
	}
	var names []string
	for _, rule := range p.Syscalls {
		if rule.Action == specs.ActAllow {
			names = append(names, rule.Names...)
		}
	}
	return names
}

// mount mounts a tmpfs on dir, which it makes, for the time of the test.
func mount(t *testing.T, dir, options string) {
	t.Helper()
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	var flags uintptr
	if options == "ro" {
		flags, options = unix.MS_RDONLY, ""
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", flags, options); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
}

// The disk that was empty when the command began may be full when it ends.
func TestFullDiskKeepsWhatWasRecorded(t *testing.T) {
	needRoot(t)
	dir := filepath.Join(t.TempDir(), "small")
	mount(t, dir, "size=64k")
	rescue := t.TempDir()
	t.Setenv("TMPDIR", rescue)
	out := filepath.Join(dir, "app.json")
	if err := os.WriteFile(out, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	r := syslatch(t, "record", "-o", out, "--", "/bin/sh", "-c", "mkdir "+rescue+"/made; /bin/cat /dev/zero > "+dir+"/filler")
	if r.code != 125 || !strings.Contains(r.stderr, "no space left on device") {
		t.Fatalf("got %+v", r)
	}
	if data, err := os.ReadFile(out); err != nil || string(data) != "old" {
		t.Errorf("the old file is now %q, %v", data, err)
	}
	kept, err := filepath.Glob(filepath.Join(rescue, "syslatch-*-app.json"))
	if err != nil || len(kept) != 1 || !strings.Contains(r.stderr, "what was to be written is in "+kept[0]) {
		t.Fatalf("kept in %v, %v; message %q", kept, err, r.stderr)
	}
	if !slices.Contains(allowedIn(t, kept[0]), "mkdir") {
		t.Error("what is kept lacks a call")
	}
	if left, _ := filepath.Glob(filepath.Join(dir, ".*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestStandardOutputIsTheProfileAlone(t *testing.T) {
	needRoot(t)
	r := syslatch(t, "record", "-q", "-o", "-", "--", "/bin/sh", "-c", "echo out; echo err >&2")
	if r.code != 0 || r.stderr != "out\nerr\n" {
		t.Errorf("got exit %d and %q on standard error, want what the command printed and nothing else", r.code, r.stderr)
	}
	if err := json.Unmarshal([]byte(r.stdout), new(specs.LinuxSeccomp)); err != nil {
		t.Errorf("standard output is no profile: %v\n%s", err, r.stdout)
	}
}

func TestSummary(t *testing.T) {
	needRoot(t)
	out := filepath.Join(t.TempDir(), "app.json")
	for _, tc := range []struct {
		args []string
		want string
	}{
		{[]string{"/bin/true"}, " calls under SCMP_ARCH_X86_64\n"},
		{[]string{"/bin/true"}, " calls under SCMP_ARCH_X86_64; nothing new\n"},
		{[]string{"/bin/sh", "-c", "mkdir /dev/null/x; exit 7"}, " mkdir "},
		{[]string{"/bin/false"}, "; nothing new; the command ended with status 1\n"},
	} {
		r := syslatch(t, append([]string{"record", "--append", "-o", out, "--"}, tc.args...)...)
		line := r.stderr[strings.Index(r.stderr, "syslatch: ")+1:]
		if !strings.Contains(line, tc.want) || strings.Count(r.stderr, "syslatch: ") != 1 {
			t.Errorf("%v: got %q, want %q in one line", tc.args, r.stderr, tc.want)
		}
	}
}

// The evidence names files and arguments: other users may not read it.
func TestEvidenceIsPrivate(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "r.json")
	if r := syslatch(t, "record", "-o", dir+"/p.json", "--recording", path, "--", "/bin/true"); r.code != 0 {
		t.Fatalf("%+v", r)
	}
	if st, err := os.Stat(path); err != nil || st.Mode() != 0o600 {
		t.Errorf("got %v, %v, want mode 0600", st.Mode(), err)
	}
}

func TestRecordWithoutPrivileges(t *testing.T) {
	needRoot(t)
	r := syslatchAs(t, &syscall.Credential{Uid: 65534, Gid: 65534}, "record", "-o", "-", "--", "/bin/true")
	const want = "syslatch: recording needs root: this process lacks CAP_BPF, CAP_PERFMON, CAP_SYS_ADMIN (run it with sudo; in a container, add them)\n"
	if r.code != 125 || r.stderr != want {
		t.Errorf("got %+v, want exit 125, %q", r, want)
	}
}

func TestMessagesOfWhatCantRun(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	script := func(name, text string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	tests := map[string]struct {
		command string
		code    int
		want    string
	}{
		"not in PATH":    {"no-such-command-here", 127, `syslatch: "no-such-command-here": executable file not found in $PATH`},
		"no file":        {dir + "/none", 127, "/none can't be executed: no such file or directory"},
		"directory":      {dir, 126, dir + " can't be executed: is a directory"},
		"not executable": {script("plain", "", 0o644), 126, "/plain can't be executed: permission denied (is it executable, "},
		"no first line":  {script("bare", "echo hello\n", 0o755), 126, "/bare can't be executed: exec format error (no program; a script needs"},
		"no interpreter": {script("lost", "#!/no/such/interpreter\n", 0o755), 127, "/lost can't be executed: no such file or directory (that is said of its interpreter"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			r := syslatch(t, "record", "-o", "-", "--", tc.command)
			if r.code != tc.code || !strings.Contains(r.stderr, tc.want) || strings.Count(r.stderr, "\n") != 1 {
				t.Errorf("got %+v, want exit %d, %q", r, tc.code, tc.want)
			}
		})
	}
}

func TestRunRefusesProfilesThatNothingCanStartUnder(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "p.json")
	tests := map[string]struct{ profile, want string }{
		"no execve":    {`{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["read"],"action":"SCMP_ACT_ALLOW"}]}`, "doesn't allow execve under SCMP_ARCH_X86_64"},
		"kills execve": {`{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["execve"],"action":"SCMP_ACT_KILL"}]}`, "doesn't allow execve"},
		"other ABI":    {`{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86"]}`, "doesn't allow execve under SCMP_ARCH_X86_64"},
		"truncated":    {`{"defaultAction":"SCMP_ACT_ERRNO","sysc`, "line 1: "},
		"empty":        {``, "line 1: "},
		"unknown call": {`{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["frobnicate"],"action":"SCMP_ACT_ERRNO"}]}`, `"frobnicate"`},
		"template":     {`{"defaultAction":"SCMP_ACT_ERRNO","archMap":[]}`, `unknown field "archMap"`},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			if err := os.WriteFile(path, []byte(tc.profile), 0o600); err != nil {
				t.Fatal(err)
			}
			r := syslatch(t, "run", "-p", path, "--", "/bin/true")
			if r.code != 125 || !strings.HasPrefix(r.stderr, "syslatch: profile "+path) || !strings.Contains(r.stderr, tc.want) {
				t.Errorf("got %+v, want exit 125 and %q", r, tc.want)
			}
		})
	}
	for name, path := range map[string]string{"a directory": dir, "without end": "/dev/zero", "nothing": dir + "/none"} {
		t.Run(name, func(t *testing.T) {
			r := syslatch(t, "run", "-p", path, "--", "/bin/true")
			if r.code != 125 || !strings.HasPrefix(r.stderr, "syslatch: profile") {
				t.Errorf("got %+v, want exit 125 and a message", r)
			}
		})
	}
}

// session is a running syslatch whose output is read as it comes.
type session struct {
	t     *testing.T
	cmd   *exec.Cmd
	lines *bufio.Scanner
	seen  []string
}

// await reads until a line has text.
func (s *session) await(text string) string {
	s.t.Helper()
	for s.lines.Scan() {
		s.seen = append(s.seen, s.lines.Text())
		if strings.Contains(s.lines.Text(), text) {
			return s.lines.Text()
		}
	}
	s.t.Fatalf("no line has %q, of\n%s", text, strings.Join(s.seen, "\n"))
	return ""
}

func (s *session) signal(sig syscall.Signal) {
	s.t.Helper()
	if err := s.cmd.Process.Signal(sig); err != nil {
		s.t.Fatal(err)
	}
}

// end reads the rest of the output and returns the exit status.
func (s *session) end() int {
	s.t.Helper()
	for s.lines.Scan() {
		s.seen = append(s.seen, s.lines.Text())
	}
	var exit *exec.ExitError
	if err := s.cmd.Wait(); err != nil && !errors.As(err, &exit) {
		s.t.Fatal(err)
	}
	return s.cmd.ProcessState.ExitCode()
}

// start runs syslatch without a terminal; its output comes through one pipe.
func start(t *testing.T, args ...string) *session {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	stdin, hold, err := os.Pipe() // a read that never ends
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	s := &session{t: t, cmd: exec.Command("/proc/self/exe", args...), lines: bufio.NewScanner(r)}
	s.cmd.Env = append(os.Environ(), beMain+"=1")
	s.cmd.Stdin, s.cmd.Stdout, s.cmd.Stderr = stdin, w, w
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // no terminal
	s.run(r, hold)
	return s
}

func (s *session) run(closers ...io.Closer) {
	s.t.Helper()
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	timeout := time.AfterFunc(time.Minute, func() { _ = s.cmd.Process.Kill() }) // a hang fails
	s.t.Cleanup(func() {
		timeout.Stop()
		if s.cmd.ProcessState == nil {
			_ = s.cmd.Process.Kill()
			_ = s.cmd.Wait()
		}
		for _, c := range closers {
			_ = c.Close()
		}
	})
}

func TestTerminationIsPassedOn(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	out := filepath.Join(dir, "p.json")
	for _, tc := range []struct {
		sig  syscall.Signal
		name string
	}{{syscall.SIGTERM, "TERM"}, {syscall.SIGINT, "INT"}, {syscall.SIGHUP, "HUP"}} {
		t.Run(tc.name, func(t *testing.T) {
			s := start(t, "record", "-o", out, "--", "/bin/sh", "-c",
				fmt.Sprintf("trap 'mkdir %s/%s; exit 5' %[2]s; echo ready; read x", dir, tc.name))
			s.await("ready")
			s.signal(tc.sig)
			if code := s.end(); code != 5 {
				t.Errorf("exit %d, want the command's 5: %q", code, s.seen)
			}
			if !slices.Contains(allowedIn(t, out), "mkdir") {
				t.Error("what the command did at its end is not in the profile")
			}
		})
	}
}

func TestSecondTerminationKills(t *testing.T) {
	needRoot(t)
	out := filepath.Join(t.TempDir(), "p.json")
	s := start(t, "record", "-o", out, "--", "/bin/sh", "-c", "trap 'echo no' TERM; echo ready; while :; do read x; done")
	s.await("ready")
	s.signal(syscall.SIGTERM)
	s.await("no")
	s.signal(syscall.SIGTERM)
	if code := s.end(); code != 137 {
		t.Errorf("exit %d, want 137: %q", code, s.seen)
	}
	checkProfile(t, out)
}

// A recording that goes on after its command says why, and can be ended with
// the profile whole.
func TestWhatIsLeftInTheBackground(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(dir, "p.json")
	leave := func(trap string) *session {
		// The shell has none of the output's descriptors when it is left.
		s := start(t, "record", "-o", out, "--", "/bin/sh", "-c",
			fmt.Sprintf("(trap %q TERM; exec 3<>%s; echo left; while :; do read x <&3; done) & exit 4", trap, fifo))
		s.await("left")
		line := s.await("has ended; recording until")
		if !strings.Contains(line, `"sh" (`) || !strings.Contains(line, "(interrupt to end it)") {
			t.Errorf("got %q, want what is waited for and how to end it", line)
		}
		return s
	}
	t.Run("ends", func(t *testing.T) {
		s := leave("mkdir " + dir + "/late; exit")
		s.signal(syscall.SIGINT)
		if code := s.end(); code != 4 {
			t.Errorf("exit %d, want the command's 4: %q", code, s.seen)
		}
		if !slices.Contains(allowedIn(t, out), "mkdir") {
			t.Error("what the process did at its end is not in the profile")
		}
	})
	t.Run("doesn't", func(t *testing.T) {
		s := leave("echo no")
		s.signal(syscall.SIGINT)
		s.await("no")
		s.signal(syscall.SIGINT)
		if code := s.end(); code != 4 {
			t.Errorf("exit %d, want the command's 4: %q", code, s.seen)
		}
		checkProfile(t, out)
	})
}

// At a terminal, interrupts are the command's: an interactive one gets many.
func TestInterruptsAtATerminal(t *testing.T) {
	needRoot(t)
	out := filepath.Join(t.TempDir(), "p.json")
	pty, tty := openPTY(t)
	s := &session{t: t, lines: bufio.NewScanner(pty)}
	s.cmd = exec.Command("/proc/self/exe", "record", "-o", out, "--", "/bin/sh", "-c",
		"trap 'echo got it' INT; echo ready; while ! read x; do :; done; exit 6")
	s.cmd.Env = append(os.Environ(), beMain+"=1")
	s.cmd.Stdin, s.cmd.Stdout, s.cmd.Stderr = tty, tty, tty
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	s.run()
	if err := tty.Close(); err != nil { // at the end, reading fails
		t.Fatal(err)
	}
	s.await("ready")
	for range 3 {
		if _, err := pty.Write([]byte{3}); err != nil { // ^C
			t.Fatal(err)
		}
		s.await("got it")
	}
	if _, err := pty.WriteString("\n"); err != nil {
		t.Fatal(err)
	}
	if code := s.end(); code != 6 {
		t.Errorf("exit %d, want 6: %q", code, s.seen)
	}
	if got := strings.Count(strings.Join(s.seen, "\n"), "got it"); got != 3 {
		t.Errorf("%d interrupts arrived, want 3: nothing is passed on that the terminal sent: %q", got, s.seen)
	}
	checkProfile(t, out)
}

func openPTY(t *testing.T) (pty, tty *os.File) {
	t.Helper()
	pty, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = pty.Close() })
	if err := unix.IoctlSetPointerInt(int(pty.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(pty.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	tty, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tty.Close() })
	return pty, tty
}

// What was ignored stays so for the command: nohup syslatch record ….
func TestIgnoredSignalsStayIgnored(t *testing.T) {
	needRoot(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/bin/sh", "-c", `trap "" HUP; exec "$@"`, "sh",
		self, "record", "-q", "-o", filepath.Join(t.TempDir(), "p.json"), "--", "/bin/grep", "SigIgn", "/proc/self/status")
	cmd.Env = append(os.Environ(), beMain+"=1")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, stderr.String())
	}
	var ignored uint64
	_, err = fmt.Sscanf(string(out), "SigIgn: %x", &ignored)
	// glibc's posix_spawn, which make uses, leaves its own signals, 32 and 33, ignored.
	if ignored &^= 3 << 31; err != nil || ignored != 1 {
		t.Errorf("got %q, want SIGHUP ignored", out)
	}
}

// A container starts under a profile of --for-container, and not under one without;
// what is appended changes nothing about it.
func TestContainerProfiles(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	rootfs := filepath.Join(dir, "rootfs")
	for _, d := range []string{"bin", "proc", "dev", "sys", "tmp"} {
		if err := os.MkdirAll(filepath.Join(rootfs, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command("cp", "/bin/busybox", rootfs+"/bin/").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if out, err := exec.Command("runc", "spec", "--bundle", dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	data, err := os.ReadFile(filepath.Join(dir, "config.json"))
	if err != nil {
		t.Fatal(err)
	}
	run := func(profile string, noNewPrivs bool, command ...string) (string, error) {
		t.Helper()
		var spec specs.Spec
		if err := json.Unmarshal(data, &spec); err != nil {
			t.Fatal(err)
		}
		spec.Process.Args, spec.Process.Terminal, spec.Process.NoNewPrivileges = command, false, noNewPrivs
		spec.Process.Rlimits = nil // this process may not raise them
		spec.Linux.Seccomp = new(specs.LinuxSeccomp)
		text, err := os.ReadFile(profile)
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(text, spec.Linux.Seccomp); err != nil {
			t.Fatal(err)
		}
		text, err = json.Marshal(spec)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "config.json"), text, 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command("runc", "--root", filepath.Join(dir, "state"), "run", "--bundle", dir, "syslatch-test-"+filepath.Base(dir)).CombinedOutput()
		return string(out), err
	}
	bare, whole := filepath.Join(dir, "bare.json"), filepath.Join(dir, "whole.json")
	echo := []string{"/bin/busybox", "echo", "hello"}
	for _, args := range [][]string{{"-o", bare}, {"-o", whole, "--for-container"}} {
		if r := syslatch(t, append(append([]string{"record"}, args...), append([]string{"--"}, echo...)...)...); r.code != 0 {
			t.Fatalf("%+v", r)
		}
	}
	for _, nnp := range []bool{true, false} {
		if out, err := run(bare, nnp, echo...); err == nil {
			t.Errorf("no_new_privs %t: a container started under the command's own calls: %q", nnp, out)
		}
		if out, err := run(whole, nnp, echo...); err != nil || out != "hello\n" {
			t.Errorf("no_new_privs %t: %v: %q", nnp, err, out)
		}
		if out, err := run(whole, nnp, "/bin/busybox", "mkdir", "/tmp/x"); err == nil || !strings.Contains(out, "Operation not permitted") {
			t.Errorf("no_new_privs %t: mkdir: %v: %q", nnp, err, out)
		}
	}
	before, err := os.ReadFile(whole)
	if err != nil {
		t.Fatal(err)
	}
	if r := syslatch(t, append([]string{"record", "--append", "-o", whole, "--"}, echo...)...); r.code != 0 || !strings.Contains(r.stderr, "; nothing new") {
		t.Errorf("%+v", r)
	}
	if after, err := os.ReadFile(whole); err != nil || !bytes.Equal(before, after) {
		t.Errorf("appending what is known changed the profile: %v\n%s\n%s", err, before, after)
	}
}
