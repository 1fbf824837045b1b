// SPDX-License-Identifier: Apache-2.0

package hook

import (
	"context"

	"github.com/syslatch/syslatch/internal/adjust"
	"github.com/syslatch/syslatch/internal/policy"
)

// Unserved is the agent of containers that can't be served, rootless ones: who
// asks for syslatch by an annotation is refused, all others are left alone. That
// fails open, on purpose: a user who starts containers without root chooses the
// hooks that they run with, and a host's containers.conf must not break all of
// them.
type Unserved struct{ Why error }

// Plan implements Planner.
func (u Unserved) Plan(_ context.Context, c policy.Container, _ adjust.Runtime) (*adjust.Plan, error) {
	if _, traced := c.Annotations[policy.AnnotationTrace]; traced || c.Asks() {
		return nil, u.Why
	}
	return nil, nil
}

// Created implements Lifecycle.
func (Unserved) Created(context.Context, string, int, Facts) error { return nil }

// Started implements Lifecycle.
func (Unserved) Started(context.Context, string, int) error { return nil }

// Stopped implements Lifecycle.
func (Unserved) Stopped(context.Context, string) error { return nil }

// Collect implements Collector.
func (Unserved) Collect(context.Context) {}
