// SPDX-License-Identifier: Apache-2.0

package adjust

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
)

// Stage is the moment from which on an expectation holds.
type Stage string

const (
	// StageCreated: the cgroup exists and the runtime's init waits in it (NRI
	// StartContainer, hook createRuntime).
	StageCreated Stage = "created"
	// StageRunning: the container's program was executed.
	StageRunning Stage = "running"
)

// Source says where an expectation's file is.
type Source string

const (
	SourceCgroup Source = "cgroup" // in the container's cgroup
	SourceProc   Source = "proc"   // in /proc/PID of the container's init
)

// Rule says how what is read is compared with what is wanted.
type Rule string

const (
	RuleEqual   Rule = "equal"    // the same words
	RuleBytes   Rule = "bytes"    // the same number, rounded down to a page; "max" is unlimited
	RuleAtLeast Rule = "at-least" // a number not below
	RuleWords   Rule = "words"    // each wanted line's words are found on the line with the same first word
	RuleList    Rule = "list"     // the same numbers, as ranges: "0-2,5"
)

// Expectation is one value to read back. It survives JSON.
type Expectation struct {
	Stage  Stage  `json:"stage"`
	Source Source `json:"source"`
	// Controller is the v1 controller whose hierarchy holds the file, and
	// empty on cgroup v2.
	Controller string `json:"controller,omitempty"`
	File       string `json:"file"` // "memory.max", "status"
	// Field selects the line of a proc file: "Seccomp", "Max open files".
	Field string `json:"field,omitempty"`
	Want  string `json:"want"`
	Rule  Rule   `json:"rule"`
	// Optional: the kernel may lack the file, and then the value holds.
	Optional bool `json:"optional,omitempty"`
	PageSize int  `json:"pageSize,omitempty"` // for RuleBytes; 0 is 4096
}

// Mismatch is an expectation that what was read does not meet.
type Mismatch struct {
	Expectation Expectation
	Got         string // what was read, "" if nothing could be
	Err         error  // why nothing was read or understood
}

// Error is one line for a log.
func (m Mismatch) Error() string {
	e := m.Expectation
	what := e.File
	if e.Source == SourceProc {
		what = "/proc/PID/" + e.File
	}
	if e.Field != "" {
		what += " " + e.Field
	}
	if m.Err != nil {
		return fmt.Sprintf("%s: want %q: %v", what, e.Want, m.Err)
	}
	return fmt.Sprintf("%s: got %q, want %q (%s)", what, m.Got, e.Want, e.Rule)
}

// Unwrap gives the reader's error.
func (m Mismatch) Unwrap() error { return m.Err }

// At selects the expectations of one stage.
func At(stage Stage, expectations []Expectation) []Expectation {
	var out []Expectation
	for _, e := range expectations {
		if e.Stage == stage {
			out = append(out, e)
		}
	}
	return out
}

// Verify reads every expectation's file through read, which returns the file's
// whole content, and compares. A file that can't be read is a mismatch, except
// that fs.ErrNotExist is none for an Optional one.
func Verify(expectations []Expectation, read func(Expectation) (string, error)) []Mismatch {
	var out []Mismatch
	for _, e := range expectations {
		content, err := read(e)
		if err != nil {
			if !e.Optional || !errors.Is(err, fs.ErrNotExist) {
				out = append(out, Mismatch{e, "", err})
			}
			continue
		}
		got, ok := e.selectField(content)
		if !ok {
			out = append(out, Mismatch{e, "", errors.New("no such line")})
		} else if !e.met(got) {
			out = append(out, Mismatch{Expectation: e, Got: bounded(got)})
		}
	}
	return out
}

// selectField cuts a proc file to what follows its Field, "Seccomp:\t2" or
// "Max open files  1024  4096  files", and to as many words as are wanted.
func (e *Expectation) selectField(content string) (string, bool) {
	if e.Field == "" {
		return strings.TrimSpace(content), true
	}
	for line := range strings.SplitSeq(content, "\n") {
		rest, ok := strings.CutPrefix(line, e.Field)
		if !ok || rest == "" || !strings.ContainsRune(": \t", rune(rest[0])) {
			continue // also Seccomp_filters when Seccomp is looked for
		}
		words := strings.Fields(rest[1:])
		return strings.Join(words[:min(len(words), len(strings.Fields(e.Want)))], " "), true
	}
	return "", false
}

func (e *Expectation) met(got string) bool {
	switch e.Rule {
	case RuleEqual:
		return slices.Equal(strings.Fields(got), strings.Fields(e.Want))
	case RuleAtLeast:
		g, err1 := strconv.ParseInt(got, 10, 64)
		w, err2 := strconv.ParseInt(e.Want, 10, 64)
		return err1 == nil && err2 == nil && g >= w
	case RuleBytes:
		return e.bytesMet(got)
	case RuleWords:
		return wordsMet(e.Want, got)
	case RuleList:
		g, ok1 := parseList(got)
		w, ok2 := parseList(e.Want)
		return ok1 && ok2 && maps.Equal(g, w)
	}
	return false
}

// bytesMet compares as the kernel stores it: whole pages, rounded down
// (mm/page_counter.c, page_counter_memparse). Unlimited reads "max" on v2, and
// on v1 as the counter's largest number of pages in bytes.
func (e *Expectation) bytesMet(got string) bool {
	page := uint64(4096)
	if e.PageSize > 0 {
		page = uint64(e.PageSize)
	}
	parse := func(s string) (uint64, bool) {
		if s == "max" || s == "-1" {
			return math.MaxInt64 / page * page, true
		}
		n, ok := memparse(s)
		return min(n, math.MaxInt64) / page * page, ok
	}
	g, ok1 := parse(got)
	w, ok2 := parse(e.Want)
	return ok1 && ok2 && g == w
}

// memparse reads a number as the kernel's memparse does, in decimal only:
// 64M, 1g, 4096.
func memparse(s string) (uint64, bool) {
	shift := 0
	if s != "" {
		if i := strings.IndexByte("kmgtpe", s[len(s)-1]|0x20); i >= 0 {
			shift = 10 * (i + 1)
			s = s[:len(s)-1]
		}
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil || n<<shift>>shift != n {
		return 0, false
	}
	return n << shift, true
}

// parseList reads a list of CPUs or memory nodes, cpuset(7).
func parseList(s string) (map[uint64]bool, bool) {
	const most = 1 << 16
	list := map[uint64]bool{}
	for part := range strings.SplitSeq(strings.TrimSpace(s), ",") {
		if part == "" {
			continue
		}
		first, last, ranged := strings.Cut(part, "-")
		from, err := strconv.ParseUint(first, 10, 32)
		to := from
		if err == nil && ranged {
			to, err = strconv.ParseUint(last, 10, 32)
		}
		if err != nil || from > to || to > most {
			return nil, false
		}
		for n := from; n <= to; n++ {
			list[n] = true
		}
	}
	return list, true
}

// wordsMet finds each wanted line by its first word, the device in io.max and
// "default" in io.weight, and wants all of its words there, in any order. A
// device that the kernel doesn't list has no limit.
func wordsMet(want, got string) bool {
	lines := map[string][]string{}
	for line := range strings.SplitSeq(got, "\n") {
		if words := strings.Fields(line); len(words) > 0 {
			lines[words[0]] = words[1:]
		}
	}
	for line := range strings.SplitSeq(want, "\n") {
		words := strings.Fields(line)
		if len(words) == 0 {
			continue
		}
		have, listed := lines[words[0]]
		for _, w := range words[1:] {
			if !slices.Contains(have, w) && (listed || !strings.HasSuffix(w, "=max")) {
				return false
			}
		}
		if !listed && len(words) == 1 {
			return false
		}
	}
	return true
}

// bounded keeps what a mismatch carries small.
func bounded(s string) string {
	const most = 256
	if len(s) > most {
		return s[:most] + "..."
	}
	return s
}
