// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"os"
	"strings"
	"testing"

	"github.com/syslatch/syslatch/profiles"
	"github.com/syslatch/syslatch/test/harness"
)

// TestRunsAtOnce: a run doesn't take the programs from one that has not begun its
// command, and removes what one has left that was killed.
func TestRunsAtOnce(t *testing.T) {
	g := newGroup(t)
	release, err := harness.MountBPFFS()
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := release(); err != nil {
			t.Error(err)
		}
	}()
	e, err := openEnforcer(&profiles.PhaseHost{}, g)
	if err != nil {
		t.Fatal(err)
	}
	removeStalePins()
	if _, err := os.Stat(e.dir); err != nil {
		t.Error(err)
	}
	// As by a kill.
	if err := e.alive.Close(); err != nil {
		t.Error(err)
	}
	_, stop := occupy(t, g)
	removeStalePins()
	if _, err := os.Stat(e.dir); err != nil {
		t.Errorf("the command runs: %v", err)
	}
	stop()
	removeStalePins()
	if _, err := os.Stat(e.dir); err == nil {
		t.Error("pins are left")
	}
	if err := e.Close(); err != nil {
		t.Error(err)
	}
}

func TestChainsFit(t *testing.T) {
	crowded := map[string]int{"one": maxChains, "few": ownChains - 1, "own": ownChains}
	for id := range 40 {
		crowded[strings.Repeat("x", id+1)] = maxChains
	}
	for _, tc := range []struct {
		chains map[string]int
		id     string
		fits   bool
	}{
		{nil, "new", true},
		{map[string]int{"one": maxChains - 1}, "one", true},
		{map[string]int{"one": maxChains}, "one", false},
		{crowded, "new", true},
		{crowded, "few", true},
		{crowded, "own", false},
	} {
		if err := fits(tc.chains, tc.id); (err == nil) != tc.fits {
			t.Errorf("%s of %d: %v", tc.id, len(tc.chains), err)
		}
	}
}
