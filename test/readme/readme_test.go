// SPDX-License-Identifier: Apache-2.0

// Package readme holds only tests: what the README shows is so, and the examples
// of every --help run.
//
// Blocks marked `console` are run, line by line, and must print what is shown: "…"
// stands for anything, also for lines, and a number for any number. What they ask of
// the API of phases is answered. `yaml` blocks are policies, and there as policy.yaml
// for what follows, `toml` and `sh` blocks must at least be of that language. The
// commands run in a mount namespace of their own.
package readme

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/pelletier/go-toml/v2"
	"github.com/sirupsen/logrus"

	"github.com/syslatch/syslatch/internal/api"
	"github.com/syslatch/syslatch/internal/api/apitest"
	"github.com/syslatch/syslatch/internal/policy"
	"github.com/syslatch/syslatch/internal/seccomp"
)

const root = "../.."

var bin string // directory of syslatch and syslatchd

func TestMain(m *testing.M) {
	code, err := runTests(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "readme:", err)
		code = 1
	}
	os.Exit(code)
}

func runTests(m *testing.M) (_ int, err error) {
	if bin, err = os.MkdirTemp("", "syslatch-readme-"); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(bin)) }()
	build := exec.Command("go", "build", "-o", bin+"/", "./cmd/...")
	build.Dir = root
	if out, err := build.CombinedOutput(); err != nil {
		return 0, fmt.Errorf("build: %w\n%s", err, out)
	}
	return m.Run(), nil
}

// agentID is the container of what is shown of phases.
const agentID = "4f2a91c0ffee000000000000000000000000000000000000000000000000aaaa"

// servePhases serves the API of phases with a supervisor that only keeps words, until
// the test ends, and gives the socket.
func servePhases(t *testing.T, s *apitest.Supervisor) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "api.sock")
	l, err := api.Listen(socket, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	logger := logrus.New()
	logger.SetOutput(io.Discard)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := (&api.Server{Phases: s, Events: s, Log: logrus.NewEntry(logger)}).Serve(ctx, l); err != nil {
			t.Error(err)
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return socket
}

// block is a fenced block of a Markdown file.
type block struct {
	file     string
	line     int // of its first line
	language string
	text     string
}

func blocks(t *testing.T, file string) (out []block) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(root, file))
	if err != nil {
		t.Fatal(err)
	}
	var b *block
	n := 0
	for line := range strings.Lines(string(data)) {
		n++
		switch fence, ok := strings.CutPrefix(strings.TrimSpace(line), "```"); {
		case ok && b == nil:
			b = &block{file: file, line: n + 1, language: fence}
		case ok:
			out = append(out, *b)
			b = nil
		case b != nil:
			b.text += line
		}
	}
	if b != nil {
		t.Fatalf("%s:%d: block without end", file, b.line)
	}
	return out
}

func TestBlocks(t *testing.T) {
	kinds := map[string]int{}
	phases := servePhases(t, apitest.New(apitest.Instance(agentID, "agent")))
	for _, file := range []string{"README.md", "contrib/README.md", "docs/policy.md", "docs/phases.md"} {
		scratch := t.TempDir() // later blocks use what earlier ones made
		for _, b := range blocks(t, file) {
			kinds[b.language]++
			t.Run(fmt.Sprintf("%s:%d", b.file, b.line), func(t *testing.T) {
				switch b.language {
				case "console":
					console(t, b, scratch, phases)
				case "yaml":
					shown := b.file == "docs/phases.md" // what no program takes yet
					if _, err := policy.Parse(b.file, []byte(b.text), policy.Options{KnownCall: seccomp.Known, Phases: shown}); err != nil {
						t.Error(err)
					}
					if err := os.WriteFile(filepath.Join(scratch, "policy.yaml"), []byte(b.text), 0o600); err != nil {
						t.Fatal(err)
					}
				case "toml":
					if err := toml.Unmarshal([]byte(b.text), new(map[string]any)); err != nil {
						t.Error(err)
					}
				case "sh":
					if out, err := exec.Command("bash", "-n", "-c", b.text).CombinedOutput(); err != nil {
						t.Errorf("%v\n%s", err, out)
					}
					for _, path := range regexp.MustCompile(`\bcontrib/\S+`).FindAllString(b.text, -1) {
						if _, err := os.Stat(filepath.Join(root, path)); err != nil {
							t.Error(err)
						}
					}
				case "text", "":
				default:
					t.Errorf("nothing checks blocks of %q", b.language)
				}
			})
		}
	}
	for _, kind := range []string{"console", "yaml", "sh", "toml"} {
		if kinds[kind] == 0 {
			t.Errorf("no %s block was found in all the files", kind)
		}
	}
}

// console runs a block's "$ " lines and compares what follows them. Lines that
// start with "$ " below `make` are what it prints.
func console(t *testing.T, b block, scratch, phases string) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	lines := strings.Split(strings.TrimSuffix(b.text, "\n"), "\n")
	for i := 0; i < len(lines); {
		command, ok := strings.CutPrefix(lines[i], "$ ")
		if !ok {
			t.Fatalf("line %d is output of no command: %q", b.line+i, lines[i])
		}
		dir, all := scratch, strings.HasPrefix(command, "make ")
		if all {
			dir = root
		}
		at := b.line + i
		var want []string
		for i++; i < len(lines) && (all || !strings.HasPrefix(lines[i], "$ ")); i++ {
			want = append(want, lines[i])
		}
		got := shell(t, dir, strings.ReplaceAll(command, api.DefaultSocket, phases), "SYSLATCH_SOCKET="+phases)
		if problem := compare(want, strings.Split(strings.TrimSuffix(got, "\n"), "\n")); problem != "" {
			t.Errorf("line %d, %s: %s\ngot:\n%s", at, command, problem, got)
		}
	}
}

// shell runs a line as the reader would, and returns what it prints. Its mounts
// are private, with a bpffs where hosts have one.
func shell(t *testing.T, dir, line string, env ...string) string {
	t.Helper()
	cmd := exec.Command("/bin/sh", "-c", "mount -t bpf bpf /sys/fs/bpf && exec /bin/sh -c \"$1\"", "sh", line)
	cmd.Dir = dir
	cmd.Env = append(append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH")), env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return out.String()
}

var (
	numbers = regexp.MustCompile(`[0-9]+`)
	blanks  = regexp.MustCompile(`\s+`)
)

// pattern is what a shown line may be in fact.
func pattern(line string) *regexp.Regexp {
	p := regexp.QuoteMeta(line)
	p = numbers.ReplaceAllString(p, `[0-9]+`)
	p = blanks.ReplaceAllString(p, `\s+`)
	p = strings.ReplaceAll(p, "…", ".*")
	return regexp.MustCompile("^" + p + `\s*$`)
}

// compare says what of want got doesn't have.
func compare(want, got []string) string {
	skip := false
	for _, w := range want {
		if strings.TrimSpace(w) == "…" {
			skip = true
			continue
		}
		n := slices.IndexFunc(got, pattern(w).MatchString)
		switch {
		case n < 0:
			return fmt.Sprintf("no line is %q", w)
		case n > 0 && !skip:
			return fmt.Sprintf("line is %q, want %q", got[0], w)
		}
		got, skip = got[n+1:], false
	}
	if rest := strings.TrimSpace(strings.Join(got, "\n")); rest != "" && !skip {
		return fmt.Sprintf("prints more: %q", rest)
	}
	return ""
}

func TestCompare(t *testing.T) {
	for _, tc := range []struct {
		want, got string
		same      bool
	}{
		{"a 1", "a  27", true},
		{"a", "b", false},
		{"a", "a\nb", false},
		{"a\n…", "a\nb\nc", true},
		{"…\nc", "a\nb\nc", true},
		{"a\n…\nc", "a\nb", false},
		{"a\nc", "a\nb\nc", false},
		{"x…z", "xyz", true},
		{"", "", true},
	} {
		if problem := compare(strings.Split(tc.want, "\n"), strings.Split(tc.got, "\n")); (problem == "") != tc.same {
			t.Errorf("compare(%q, %q) = %q", tc.want, tc.got, problem)
		}
	}
}

// Links to files of the repository lead somewhere.
func TestLinks(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)#:]+)(#[^)]*)?\)`)
	for _, pattern := range []string{"*.md", "docs/*.md", "contrib/*.md", "test/vm/*.md"} {
		files, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil || len(files) == 0 {
			t.Fatalf("%s: %v, %v", pattern, files, err)
		}
		for _, file := range files {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range link.FindAllStringSubmatch(string(data), -1) {
				if _, err := os.Stat(filepath.Join(filepath.Dir(file), m[1])); err != nil {
					t.Errorf("%s: %v", file, err)
				}
			}
		}
	}
}
