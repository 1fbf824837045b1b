// SPDX-License-Identifier: Apache-2.0

package podman

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/syslatch/syslatch/test/images"
	"github.com/syslatch/syslatch/test/workloads"
)

// Real programs, as with the plugin: what one recorded run has made is enough for
// the same load under the version. The dry run tells whether any call would have
// been denied; the enforced run must give the same answers.
func TestRealWorkloads(t *testing.T) {
	scripts, err := filepath.Abs("../workloads")
	if err != nil {
		t.Fatal(err)
	}
	built, err := images.Workloads(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if r, err := podman(t.Context(), scratch+"/load.conf", "load", "-i", built.Archive); err != nil || r.code != 0 {
		t.Fatalf("podman load: %+v, %v", r, err)
	}
	each(t, func(t *testing.T, runtime string) {
		log := listenSyslog(t)
		e := newEnv(t, runtime, "", byAnnotation)
		e.extend(30 * time.Minute)
		engine := engine{e, []string{
			"--network", "host", "--log-driver", "k8s-file",
			"--volume", scripts + ":" + workloads.Scripts + ":ro",
			"--volume", programs + ":" + workloads.Programs + ":ro",
		}}
		for _, w := range workloads.All {
			// What the program calls is the same under any runtime, and what the
			// runtime calls before is what TestRecordThenEnforce is about: two are
			// enough for the other runtime, for the time that they take in a guest.
			if runtime != runtimes[0] && w.Name != "goapp" && w.Name != "nginx" {
				continue
			}
			t.Run(w.Name, func(t *testing.T) {
				answers := func(mode string) string {
					t.Helper()
					got, err := w.Answers(e.ctx, engine, mode)
					if err != nil {
						t.Fatalf("%s: %v", mode, err)
					}
					return got
				}
				recorded := answers("record")
				recs, err := e.store().Recordings(w.Name)
				if err != nil || len(recs) != 1 || len(recs[0].Losses) != 0 {
					t.Errorf("recordings: %+v, %v", recs, err)
				}

				if diff := cmp.Diff(recorded, answers("audit")); diff != "" {
					t.Errorf("answers of the dry run (-recorded +dry run):\n%s", diff)
				}
				if log != nil {
					judged := func() []string { return linesWith(log(), "dry run", "workload="+w.Name) }
					e.wait("word of the dry run", func() bool { return len(judged()) > 0 })
					if got := judged(); len(got) != 1 || !strings.Contains(got[0], "would have denied nothing") {
						t.Errorf("dry run: %q", got)
					}
				}

				if diff := cmp.Diff(recorded, answers("enforce")); diff != "" {
					t.Errorf("answers under version 1 (-recorded +enforced):\n%s", diff)
				}
				// The version is in force: what the workload never does, it can't
				// do, and without the version it can.
				for mode, denied := range map[string]bool{"enforce": true, "off": false} {
					code, output, err := workloads.Run(e.ctx, engine, mode, w.Name, "/bin/mknod", "/tmp/fifo", "p")
					if err != nil || (code != 0) != denied {
						t.Errorf("mknod, %s: exit code %d, %v: %s", mode, code, err, output)
					}
				}
			})
		}
		e.idle()
	})
}

// linesWith are the lines that hold all of the words.
func linesWith(text string, words ...string) (out []string) {
	for line := range strings.Lines(text) {
		if !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(line, w) }) {
			out = append(out, line)
		}
	}
	return out
}

// engine runs the workloads' containers in the background, as a service is run.
type engine struct {
	e       *env
	options []string
}

func (g engine) Start(ctx context.Context, m, name string, command ...string) (workloads.Container, error) {
	args := append([]string{"run", "--detach", "--entrypoint", "[]", "--cgroup-parent", parent, "--name", name}, g.options...)
	args = append(append(append(args, mode(m)...), images.WorkloadsImage), command...)
	c := container{g.e, name}
	if _, err := c.podman(ctx, args...); err != nil {
		_ = c.Remove(context.WithoutCancel(ctx)) // it may not have been created
		return nil, err
	}
	return c, nil
}

type container struct {
	e    *env
	name string
}

func (c container) podman(ctx context.Context, args ...string) (result, error) {
	r, err := podman(ctx, c.e.conf, args...)
	if err == nil && r.code != 0 {
		err = fmt.Errorf("podman %s: exit code %d: %s", args[0], r.code, r.stderr)
	}
	return r, err
}

func (c container) Wait(ctx context.Context) (int, string, error) {
	r, err := c.podman(ctx, "wait", c.name)
	if err != nil {
		return 0, "", err
	}
	code, err := strconv.Atoi(strings.TrimSpace(r.stdout))
	if err != nil {
		return 0, "", err
	}
	r, err = c.podman(ctx, "logs", c.name)
	return code, r.stdout + r.stderr, err
}

func (c container) Stop(ctx context.Context) error {
	_, err := c.podman(ctx, "stop", "--time", "30", c.name)
	return err
}

func (c container) Remove(ctx context.Context) error {
	_, err := c.podman(ctx, "rm", "--force", "--time", "0", c.name)
	return err
}
