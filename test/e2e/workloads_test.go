// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/syslatch/syslatch/test/harness"
	"github.com/syslatch/syslatch/test/images"
	"github.com/syslatch/syslatch/test/workloads"
)

// Real programs: what one recorded run has made is enough for the same load
// under the version. The dry run tells whether any call would have been denied;
// the enforced run must give the same answers.
func TestRealWorkloads(t *testing.T) {
	e := newEnv(t, harness.Options{})
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Minute)
	t.Cleanup(cancel)
	e.ctx = ctx
	image, err := images.Workloads(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Import(ctx, image); err != nil {
		t.Fatal(err)
	}
	scripts, err := filepath.Abs("../workloads")
	if err != nil {
		t.Fatal(err)
	}
	d := e.start(`
- name: all
  match: {}
  mode: record
  workload: "{container}"
  annotations: [mode]
  allowedModes: [off, record, audit, enforce]
`)
	engine := engine{e, harness.ContainerOptions{
		Image: images.WorkloadsImage,
		Mounts: []*runtimeapi.Mount{
			{HostPath: scripts, ContainerPath: workloads.Scripts, Readonly: true},
			{HostPath: programs, ContainerPath: workloads.Programs, Readonly: true},
		},
	}}
	for _, w := range workloads.All {
		t.Run(w.Name, func(t *testing.T) {
			answers := func(mode string) string {
				t.Helper()
				got, err := w.Answers(ctx, engine, mode)
				if err != nil {
					t.Fatalf("%s: %v", mode, err)
				}
				return got
			}
			recorded := answers("record")
			v := e.waitVersion(d, w.Name, 1)
			if len(v.Manifest.Losses) != 0 {
				t.Errorf("losses: %v", v.Manifest.Losses)
			}

			dry := answers("audit")
			if diff := cmp.Diff(recorded, dry); diff != "" {
				t.Errorf("answers of the dry run (-recorded +dry run):\n%s", diff)
			}
			if m := d.waitLog("dry run: the version would have denied", fmt.Sprintf("%q", w.Name)); m["would_deny"] != nil {
				t.Errorf("the version lacks %v", m["would_deny"])
			}

			enforced := answers("enforce")
			if diff := cmp.Diff(recorded, enforced); diff != "" {
				t.Errorf("answers under version 1 (-recorded +enforced):\n%s", diff)
			}

			// The version is in force: what the workload never does, it can't do,
			// and without the version it can.
			for mode, denied := range map[string]bool{"enforce": true, "off": false} {
				code, output, err := workloads.Run(ctx, engine, mode, w.Name, "/bin/mknod", "/tmp/fifo", "p")
				if err != nil || (code != 0) != denied {
					t.Errorf("mknod, %s: exit code %d, %v: %s", mode, code, err, output)
				}
			}
		})
	}
}

// engine starts each container in a pod of its own.
type engine struct {
	*env
	options harness.ContainerOptions
}

func (e engine) Start(ctx context.Context, m, name string, command ...string) (_ workloads.Container, err error) {
	p, err := e.NewPod(ctx, mode(m))
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.Remove(e.ctx)) // ctx may have ended
		}
	}()
	o := e.options
	o.Name, o.Command = name, command
	c, err := p.Create(ctx, o)
	if err != nil {
		return nil, err
	}
	return container{p, c}, c.Start(ctx)
}

type container struct {
	pod *harness.Pod
	c   *harness.Container
}

func (c container) Wait(ctx context.Context) (int, string, error) {
	r, err := c.c.Wait(ctx)
	return int(r.Code), r.Log, err
}

func (c container) Stop(ctx context.Context) error { return c.c.Stop(ctx, 30*time.Second) }

func (c container) Remove(ctx context.Context) error { return c.pod.Remove(ctx) }
