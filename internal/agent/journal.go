// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/bpf"
)

// journal is a directory of instances: DIR/<id>.json, replaced by rename, and
// DIR/<id>.first-seen, appended to. It lives on /run: what it describes does not
// survive a reboot either, so nothing is fsynced.
//
// An instance's file of first-seen events has a line for each call, phase and ABI,
// some 200 bytes each: 30 KB for a usual program, 700 KB for one that tries every
// number there is.
type journal struct {
	dir string
	// step is called before each change, with its name. Tests fail there. Nil
	// otherwise.
	step func(change string) error
}

const (
	instanceSuffix  = ".json"
	firstSeenSuffix = ".first-seen"
	phaseSuffix     = ".phase"
	frozenSuffix    = ".frozen"
	newSuffix       = ".new"
)

func openJournal(dir string) (*journal, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	return &journal{dir: dir}, nil
}

// tags lists the ids of all instances that are recorded, by tag.
func (j *journal) tags() map[uint64]string {
	out := map[uint64]string{}
	ids, _ := j.ids()
	for _, id := range ids {
		// What can't be read is reported by its end.
		if in, err := j.instance(id); err == nil && in.Tag != 0 {
			out[in.Tag] = id
		}
	}
	return out
}

func (j *journal) next(change string) error {
	if j.step == nil {
		return nil
	}
	return j.step(change)
}

// validID accepts what runtimes use for container ids and nothing that could
// leave the directory.
func validID(id string) error {
	if id == "" || len(id) > 128 || strings.HasPrefix(id, ".") {
		return fmt.Errorf("container id %.140q: want 1 to 128 characters, not starting with a dot", id)
	}
	for _, r := range id {
		if (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune("._-", r) {
			return fmt.Errorf("container id %q: character %q is not allowed", id, r)
		}
	}
	return nil
}

// validKey is validID for what may be of a rootless user, "UID@ID".
func validKey(id string) error {
	if uid, rest, ok := strings.Cut(id, "@"); ok && uid != "" && strings.Trim(uid, "0123456789") == "" {
		id = rest
	}
	return validID(id)
}

func (j *journal) path(id, suffix string) string { return filepath.Join(j.dir, id+suffix) }

// save replaces an instance's file. The caller has taken the instance.
func (j *journal) save(in *instance) error {
	if err := j.next("save"); err != nil {
		return err
	}
	data, err := json.Marshal(in)
	if err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	if err := j.replace(j.path(in.Container.ID, instanceSuffix), data); err != nil {
		return err
	}
	if !in.Record {
		return nil
	}
	f, err := os.OpenFile(j.path(in.Container.ID, firstSeenSuffix), os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	return f.Close()
}

// replace makes or replaces a file.
func (j *journal) replace(path string, data []byte) error {
	err := os.WriteFile(path+newSuffix, data, 0o600)
	if err == nil {
		err = os.Rename(path+newSuffix, path)
	}
	if err != nil {
		_ = os.Remove(path + newSuffix) // there is only one error to tell
		return fmt.Errorf("journal: %w", err)
	}
	return nil
}

// phaseNow is where an instance with phases is.
type phaseNow struct {
	Phase      string       `json:"phase"`
	Generation uint64       `json:"generation"`
	Original   []limitValue `json:"original,omitempty"` // what phases changed
	// Began: the program's execve was to be allowed. It is in the journal before that is
	// answered, so a kill between the two leaves a container that is taken for one that
	// runs, and is allowed no more than its phase has.
	Began bool `json:"began,omitempty"`
	// Tag is by what the BPF programs know the instance, 0 if they don't; Counted what
	// they denied and was told, by phase and program.
	Tag     uint64            `json:"tag,omitempty"`
	Counted map[string]uint64 `json:"counted,omitempty"`
}

// savePhase replaces an instance's phase. Its calls come one after the other.
func (j *journal) savePhase(id string, now phaseNow) error {
	data, err := json.Marshal(now)
	if err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	return j.replace(j.path(id, phaseSuffix), data)
}

// hasPhases says whether any instance has phases.
func (j *journal) hasPhases() bool {
	ids, _ := j.ids()
	return slices.ContainsFunc(ids, func(id string) bool {
		in, err := j.instance(id)
		return err == nil && in.Phases != nil // what can't be read is reported by load
	})
}

// forgetPhase removes what is left of an earlier instance of the same id.
func (j *journal) forgetPhase(id string) error {
	for _, suffix := range []string{phaseSuffix, frozenSuffix} {
		if err := os.Remove(j.path(id, suffix)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("journal: %w", err)
		}
	}
	return nil
}

// sweepPhases removes what is left of phases of instances that are gone: the hook that
// removed one may have given up waiting for the daemon, which wrote on. Only the daemon
// writes these, and it has not begun to.
func (j *journal) sweepPhases() error {
	for _, suffix := range []string{phaseSuffix, frozenSuffix, phaseSuffix + newSuffix} {
		ids, err := j.list(suffix)
		if err != nil {
			return err
		}
		for _, id := range ids {
			if _, err := os.Stat(j.path(id, instanceSuffix)); !errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err := os.Remove(j.path(id, suffix)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("journal: %w", err)
			}
		}
	}
	return nil
}

// phase is what savePhase kept; of an instance that was never switched it is zero.
func (j *journal) phase(id string) (now phaseNow, err error) {
	data, err := os.ReadFile(j.path(id, phaseSuffix))
	if errors.Is(err, fs.ErrNotExist) {
		return now, nil
	}
	if err == nil {
		err = json.Unmarshal(data, &now)
	}
	if err != nil {
		err = fmt.Errorf("journal %s: %w", j.path(id, phaseSuffix), err)
	}
	return now, err
}

func (j *journal) remove(id string) error {
	if err := j.next("remove"); err != nil {
		return err
	}
	for _, suffix := range []string{firstSeenSuffix, phaseSuffix, frozenSuffix, instanceSuffix} { // the instance last: load finds the rest by it
		if err := os.Remove(j.path(id, suffix)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("journal: %w", err)
		}
	}
	return nil
}

// load reads every instance. Files that can't be read are reported in problems
// and left in place, with what belongs to them; what a killed writer left is
// removed.
func (j *journal) load() (instances []*instance, problems []error) {
	entries, err := os.ReadDir(j.dir)
	if err != nil {
		return nil, []error{fmt.Errorf("journal: %w", err)}
	}
	ids := map[string]bool{}
	for _, e := range entries {
		if id, ok := strings.CutSuffix(e.Name(), instanceSuffix); ok {
			ids[id] = true
		}
	}
	for _, e := range entries {
		id, ok := strings.CutSuffix(e.Name(), instanceSuffix)
		if !ok {
			id, belongs := strings.CutSuffix(e.Name(), firstSeenSuffix)
			for _, suffix := range []string{phaseSuffix, frozenSuffix} {
				if !belongs {
					id, belongs = strings.CutSuffix(e.Name(), suffix)
				}
			}
			if strings.HasSuffix(e.Name(), newSuffix) || belongs && !ids[id] {
				if err := os.Remove(filepath.Join(j.dir, e.Name())); err != nil {
					problems = append(problems, fmt.Errorf("journal: %w", err))
				}
			}
			continue
		}
		in, err := j.instance(id)
		if err != nil {
			problems = append(problems, fmt.Errorf("journal %s: %w (remove the file to forget this instance)", j.path(id, instanceSuffix), err))
			continue
		}
		events, err := j.events(id)
		if err != nil {
			problems = append(problems, err) // the instance itself is good
		}
		in.events = len(events)
		instances = append(instances, in)
	}
	return instances, problems
}

func (j *journal) instance(id string) (*instance, error) {
	data, err := os.ReadFile(j.path(id, instanceSuffix))
	if err != nil {
		return nil, err
	}
	in := &instance{}
	if err := json.Unmarshal(data, in); err != nil {
		return nil, err
	}
	switch {
	case in.Container.ID != id:
		return nil, fmt.Errorf("is of container %.140q", in.Container.ID)
	case in.Record && in.Recording == nil:
		return nil, errors.New("has no recording, though there is to be one")
	}
	return in, nil
}

// appendEvent keeps a first-seen event: the ring buffer gives each only once. save
// made the file; if it is gone, so is its instance.
func (j *journal) appendEvent(id string, e bpf.Event) error {
	f, err := os.OpenFile(j.path(id, firstSeenSuffix), os.O_WRONLY|os.O_APPEND, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	defer f.Close()
	line, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	// One write: O_APPEND makes a line whole or, after a kill, absent. On a full
	// disk it may be torn; the newline in front keeps the next one whole.
	if _, err := f.Write(append(append([]byte{'\n'}, line...), '\n')); err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	return nil
}

// events reads the events of an instance. Lines that can't be read are left out
// and reported.
func (j *journal) events(id string) ([]bpf.Event, error) {
	f, err := os.Open(j.path(id, firstSeenSuffix))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	defer f.Close()
	var events []bpf.Event
	var bad error
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if len(lines.Bytes()) == 0 {
			continue
		}
		var e bpf.Event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			bad = fmt.Errorf("journal %s: %w", f.Name(), err)
			continue
		}
		events = append(events, e)
	}
	return events, errors.Join(bad, lines.Err())
}

// lockState takes the state directory for this process: two daemons on one
// directory would publish each other's recordings.
func lockState(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("state directory %s: %w (is another syslatchd running? stop it, or give each its own stateDir and bpffs)", dir, err)
	}
	return f, nil
}
