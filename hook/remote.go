// SPDX-License-Identifier: Apache-2.0

package hook

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/internal/adjust"
	"github.com/syslatch/syslatch/internal/policy"
)

// A rootless hook and syslatchd exchange one JSON object each, over one connection
// for each stage. Both ends come from one build as a rule: a field that the other
// doesn't know is an error.
const (
	maxRequest  = 256 << 10 // podman's own seccomp profile has 11 KB
	maxResponse = 1 << 20
)

// request is a stage, and what the hook knows.
type request struct {
	Stage string `json:"stage"`
	PID   int    `json:"pid"` // the hook's: the server knows it under the same number
	// Container is what its spec says.
	Container told `json:"container"`
	// Init is the pid of the container's init, from its state.
	Init int `json:"init,omitempty"`
	// Unread is why there is no Container at createRuntime.
	Unread string `json:"unread,omitempty"`
}

// told is a container as its user tells it. Of the annotations only those are sent
// that ask something of us.
type told struct {
	ID          string              `json:"id"`
	Name        string              `json:"name,omitempty"`
	Image       string              `json:"image,omitempty"`
	ImageDigest string              `json:"imageDigest,omitempty"`
	CgroupsPath string              `json:"cgroupsPath,omitempty"`
	Annotations map[string]string   `json:"annotations,omitempty"`
	Seccomp     *specs.LinuxSeccomp `json:"seccomp,omitempty"`
}

// response is what comes of it: a plan or nothing, or why not.
type response struct {
	Plan *adjust.Plan `json:"plan,omitempty"`
	// Error fails the stage.
	Error string `json:"error,omitempty"`
	// Unserved: this user isn't served. Only who asks for it is told.
	Unserved string `json:"unserved,omitempty"`
}

// plannedAnnotation marks a spec that syslatchd had a hand in, for createRuntime to
// know should that be gone by then.
const plannedAnnotation = "syslatch.planned"

// errUnserved is wrapped where syslatchd doesn't serve, or isn't there.
var errUnserved = errors.New("not served")

// Remote is the agent of rootless containers: it lets syslatchd do what takes root.
// Where that isn't there, or doesn't serve this user, it is [Unserved].
type Remote struct {
	Socket string
	// Why is why this process can't do it by itself.
	Why error
	// Check compiles what a container with a profile of its own is to get. It is done
	// here: what a user's profile does to libseccomp is not to happen to syslatchd.
	Check func(profile, own *specs.LinuxSeccomp) error
}

func (r Remote) unserved(err error) Unserved {
	return Unserved{fmt.Errorf("%w (the host's admin can have syslatchd serve them: start it with hook: {rootless: {users: [NAME]}} in its policy file): %w", r.Why, err)}
}

// Plan implements Planner.
func (r Remote) Plan(ctx context.Context, c policy.Container, runtime adjust.Runtime) (*adjust.Plan, error) {
	plan, err := r.ask(ctx, request{Stage: StagePrecreate, Container: tell(c)})
	if errors.Is(err, errUnserved) {
		return r.unserved(err).Plan(ctx, c, runtime)
	}
	if plan != nil && plan.Seccomp != nil {
		if err := r.Check(plan.Seccomp, c.Seccomp); err != nil {
			return nil, fmt.Errorf("profile of workload %s: %w", plan.Workload, err)
		}
	}
	return plan, err
}

// Created implements Lifecycle.
func (r Remote) Created(ctx context.Context, id string, pid int, facts Facts) error {
	req := request{Stage: StageCreateRuntime, Init: pid}
	c, _, err := facts()
	if err != nil {
		req.Unread = oneLine(err.Error())
	}
	req.Container = tell(c)
	req.Container.ID = id
	_, err = r.ask(ctx, req)
	if !errors.Is(err, errUnserved) {
		return err
	}
	if _, planned := c.Annotations[plannedAnnotation]; planned {
		return fmt.Errorf("syslatchd had a hand in this container's creation, and now it is %w (start the container again)", err)
	}
	return nil // left alone at precreate, too
}

// Started implements Lifecycle.
func (r Remote) Started(ctx context.Context, id string, pid int) error {
	return r.tell(ctx, request{Stage: StagePoststart, Container: told{ID: id}, Init: pid})
}

// Stopped implements Lifecycle.
func (r Remote) Stopped(ctx context.Context, id string) error {
	return r.tell(ctx, request{Stage: StagePoststop, Container: told{ID: id}})
}

// Collect implements Collector: the daemon does it by itself.
func (Remote) Collect(context.Context) {}

// tell tells of a container that runs, or has: where nobody listens, the next
// syslatchd finds out by itself.
func (r Remote) tell(ctx context.Context, req request) error {
	_, err := r.ask(ctx, req)
	if errors.Is(err, errUnserved) {
		return nil
	}
	return err
}

func (r Remote) ask(ctx context.Context, req request) (*adjust.Plan, error) {
	req.PID = os.Getpid()
	data, err := json.Marshal(req)
	if err != nil {
		return nil, err
	}
	if len(data) > maxRequest {
		return nil, fmt.Errorf("%w: the container's annotations and seccomp profile have %d bytes, syslatchd takes %d", errUnserved, len(data), maxRequest)
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", r.Socket)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.ECONNREFUSED) {
		return nil, fmt.Errorf("%w: %w", errUnserved, err) // nobody is there
	}
	if err != nil {
		return nil, fmt.Errorf("syslatchd: %w", err)
	}
	defer conn.Close()
	fail := func(err error) (*adjust.Plan, error) { return nil, fmt.Errorf("syslatchd at %s: %w", r.Socket, err) }
	if deadline, ok := ctx.Deadline(); ok {
		if err := conn.SetDeadline(deadline); err != nil {
			return fail(err)
		}
	}
	// A server that refuses doesn't read all: its answer counts.
	_, writeErr := conn.Write(data)
	if writeErr == nil {
		writeErr = conn.(*net.UnixConn).CloseWrite()
	}
	var res response
	if err := readJSON(toReset{conn}, maxResponse, &res); err != nil {
		return fail(errors.Join(writeErr, err))
	}
	switch {
	case res.Unserved != "":
		return nil, fmt.Errorf("%w: %s", errUnserved, res.Unserved)
	case res.Error != "":
		return nil, errors.New(res.Error)
	}
	return res.Plan, nil
}

// toReset reads what was sent by a server that closed without reading all: that is
// ECONNRESET behind it, not the end.
type toReset struct{ io.Reader }

func (r toReset) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	if errors.Is(err, unix.ECONNRESET) {
		err = io.EOF
	}
	return n, err
}

func tell(c policy.Container) told {
	t := told{ID: c.ID, Name: c.Name, Image: c.Image, ImageDigest: c.ImageDigest, CgroupsPath: c.CgroupsPath, Seccomp: c.Seccomp, Annotations: map[string]string{}}
	for key, value := range c.Annotations {
		if (&policy.Container{Annotations: map[string]string{key: ""}}).Asks() || key == policy.AnnotationTrace {
			t.Annotations[key] = value
		}
	}
	return t
}

// readJSON reads one object and nothing else, up to most bytes.
func readJSON(r io.Reader, most int64, into any) error {
	data, err := io.ReadAll(io.LimitReader(r, most+1))
	switch {
	case err != nil:
		return err
	case int64(len(data)) > most:
		return fmt.Errorf("more than %d bytes", most)
	case len(data) == 0:
		return io.ErrUnexpectedEOF
	}
	if err := checkJSON(data); err != nil {
		return err
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return fmt.Errorf("%w (are syslatch-hook and syslatchd of one version?)", err)
	}
	return nil
}
