// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/syslatch/syslatch/internal/adjust"
	"github.com/syslatch/syslatch/internal/policy"
)

// maxOfUser bounds the containers that one user has here at once: a part of what the
// kernel can record, and of the journal.
const maxOfUser = 128

// UserHooks serves a rootless user's hook, which can't record by itself. What it
// tells is believed of the user's own containers only. They are kept under ids that
// no other's have, "UID@ID".
type UserHooks struct {
	h    *Hooks
	user policy.User
	hook int // pid of the hook
}

// Hooks is the side of the agent that serves the hook with a pid, of a user.
func (a *Agent) Hooks(user policy.User, hook int) *UserHooks {
	return &UserHooks{h: a.hooks, user: user, hook: hook}
}

func (u *UserHooks) key(id string) string {
	return strconv.FormatUint(uint64(u.user.UID), 10) + "@" + id
}

// own checks an id that the hook tells.
func (u *UserHooks) own(id string) (key string, err error) {
	if err := validID(id); err != nil {
		return "", err
	}
	key = u.key(id)
	in, err := u.h.load(key)
	if err == nil && in != nil && (in.Container.User == nil || in.Container.User.UID != u.user.UID) {
		err = fmt.Errorf("container %s is not %s's", id, u.user)
	}
	return key, err
}

// mine makes what the hook tells of a container the user's, who may have no more of
// them than that. Requests that are served at the same time can exceed it by their
// number.
func (u *UserHooks) mine(key string, c policy.Container, r adjust.Runtime) (policy.Container, adjust.Runtime, error) {
	c.ID, c.User = key, &u.user
	// Whatever it has in its user namespace, it can't lift what the host's root set.
	r.PID, r.NoSysResource = u.hook, true
	others, err := u.others(key)
	if err == nil && others >= maxOfUser {
		if d, decideErr := u.h.a.policy.Decide(c); decideErr != nil || d.Mode != policy.ModeOff {
			err = fmt.Errorf("%s has %d containers that syslatchd looks after, the most that one user may have (end one)", u.user, others)
		}
	}
	return c, r, err
}

// Plan is [Hooks.Plan].
func (u *UserHooks) Plan(ctx context.Context, c policy.Container, r adjust.Runtime) (*adjust.Plan, error) {
	key, err := u.own(c.ID)
	if err != nil {
		return nil, err
	}
	c, r, err = u.mine(key, c, r)
	if err != nil {
		return nil, u.h.settleUndecided(c, err)
	}
	return u.h.planned(ctx, c, r)
}

// others counts the user's instances beside one.
func (u *UserHooks) others(key string) (n int, err error) {
	ids, err := u.h.a.journal.ids()
	for _, id := range ids {
		if strings.HasPrefix(id, u.key("")) && id != key {
			n++
		}
	}
	return n, err
}

// Created is [Hooks.Created].
func (u *UserHooks) Created(ctx context.Context, id string, pid int, facts func() (policy.Container, adjust.Runtime, error)) error {
	key, err := u.own(id)
	if err != nil {
		return err
	}
	return u.h.createdBy(ctx, key, pid, u.hook, func() (policy.Container, adjust.Runtime, error) {
		c, r, err := facts()
		if err != nil {
			return c, r, err
		}
		return u.mine(key, c, r)
	})
}

// Started is [Hooks.Started], for the process that Created was told.
func (u *UserHooks) Started(ctx context.Context, id string, _ int) error {
	key, err := u.own(id)
	if err != nil {
		return err
	}
	in, err := u.h.ran(ctx, key)
	if err != nil || in == nil || in.Container.PID == 0 {
		return err
	}
	return u.h.a.verifyRunning(ctx, in, in.Container.PID)
}

// Stopped is [Hooks.Stopped].
func (u *UserHooks) Stopped(ctx context.Context, id string) error {
	key, err := u.own(id)
	if err != nil {
		return err
	}
	return u.h.stopped(ctx, key)
}

// Collect does nothing: the daemon does, by itself.
func (u *UserHooks) Collect(context.Context) {}
