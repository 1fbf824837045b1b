// SPDX-License-Identifier: Apache-2.0

package phase

import (
	"errors"
	"fmt"
	"strings"
	"time"
)

// Status is what is known of one instance, at one moment.
type Status struct {
	ID       string `json:"id"`                 // the container's, or that of a run
	Name     string `json:"name,omitempty"`     // for people
	Workload string `json:"workload,omitempty"` // what profiles belong to
	Policy   string `json:"policy"`             // its name in the policy file
	Phase    string `json:"phase"`              // in force
	// Generation counts switches that were begun, those to the same phase aside; the phase
	// in which an instance starts has 1.
	Generation uint64    `json:"generation"`
	Since      time.Time `json:"since"` // of the phase
	State      State     `json:"state"`
	// Next are the phases that may follow.
	Next []string `json:"next"`
	// Uncovered is what the phase asks for and this host doesn't enforce, a sentence
	// each; and after a switch that could not be finished, what may not hold yet.
	Uncovered []string `json:"uncovered"`
	// Denied counts the calls that the supervisor, and the kernel's programs, have denied.
	Denied uint64 `json:"denied"`
	// Recorded: nothing is enforced, and the phase is where the instance's calls count.
	Recorded bool `json:"recorded,omitempty"`
}

// State is how far a phase holds.
type State string

const (
	// Holds: for every task, calls that were blocked in the kernel at the switch
	// included; but for what Uncovered says. Of an instance that is recorded: all that
	// is called from now on counts in it.
	Holds State = "holds"
	// Switching: begun and not finished. So is an instance that an earlier process
	// supervised until its phase has been made to hold once more.
	Switching State = "switching"
	// Degraded: a switch could not be finished, or the supervisor lost a part of what
	// it enforces with. New calls are judged by Phase where they are judged at all.
	Degraded State = "degraded"
	// Ended: no task is left.
	Ended State = "ended"
)

// Origin is where a wish to switch came from.
type Origin string

const (
	// Outside may make every transition that the policy has.
	Outside Origin = "outside"
	// Inside is the workload itself: it may only tighten, but while it is recorded.
	Inside Origin = "inside"
)

// Kind of an [Event].
type Kind string

const (
	Begun    Kind = "begun"    // an instance is supervised; To is its first phase
	Resumed  Kind = "resumed"  // one that an earlier process supervised is again, in To
	Switched Kind = "switched" // the phase To holds
	Refused  Kind = "refused"  // a switch to To; nothing has changed
	Failed   Kind = "failed"   // a switch to To was begun and could not be finished
	Denied   Kind = "denied"   // Count calls of Call, the first of them by PID
	Lost     Kind = "lost"     // a part of what enforces: see Message
	Over     Kind = "ended"    // an instance
)

// Event is what the audit log is to keep.
type Event struct {
	Time       time.Time `json:"time"`
	Kind       Kind      `json:"kind"`
	Instance   string    `json:"instance"`
	Workload   string    `json:"workload,omitempty"`
	Policy     string    `json:"policy"`
	Generation uint64    `json:"generation"`
	From       string    `json:"from,omitempty"`
	To         string    `json:"to,omitempty"`
	Origin     Origin    `json:"origin,omitempty"`
	// By is who asked, "uid 0 pid 123", as the kernel says it.
	By string `json:"by,omitempty"`
	// Call is "SCMP_ARCH_X86_64 mkdir", or the kernel's hook whose program denied it,
	// "lsm/file_open", and then there is no PID; "others" are what filters denied beside
	// the calls that are told one by one.
	Call    string `json:"call,omitempty"`
	PID     int    `json:"pid,omitempty"`
	Count   uint64 `json:"count,omitempty"`
	Message string `json:"message,omitempty"`
}

// Errors that callers decide on.
var (
	// ErrUnknown: there is no such instance.
	ErrUnknown = errors.New("no such instance")
	// ErrEnded: the instance has no task any more.
	ErrEnded = errors.New("the instance has ended")
)

// TransitionError refuses a switch; nothing has changed.
type TransitionError struct {
	From, To string
	Why      string // "unknown phase", "the policy doesn't lead there", …
	Allowed  []string
}

func (e *TransitionError) Error() string {
	allowed := "none"
	if len(e.Allowed) > 0 {
		allowed = strings.Join(e.Allowed, ", ")
	}
	return fmt.Sprintf("switch from %s to %s: %s (possible from here: %s)", e.From, e.To, e.Why, allowed)
}

// GenerationError refuses a switch that was asked for with the generation of an earlier
// phase: somebody else has switched meanwhile.
type GenerationError struct{ Want, Is uint64 }

func (e *GenerationError) Error() string {
	return fmt.Sprintf("generation is %d, not %d: the phase was switched meanwhile; look at it again", e.Is, e.Want)
}

// IncompleteError is a switch that could not be finished within its deadline: the new
// phase is in force for new calls, and Uncovered says what may not be judged by it yet.
type IncompleteError struct {
	Status Status
	Err    error
}

func (e *IncompleteError) Error() string {
	return fmt.Sprintf("phase %s does not hold for every task: %v (%s)", e.Status.Phase, e.Err, strings.Join(e.Status.Uncovered, "; "))
}

// Unwrap gives what stopped it.
func (e *IncompleteError) Unwrap() error { return e.Err }

// SetOptions of a switch.
type SetOptions struct {
	Origin Origin // empty is Outside
	By     string // for the event
	// Generation, if not 0, has to be the instance's.
	Generation uint64
}
