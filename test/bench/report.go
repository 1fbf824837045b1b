// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
)

// report is what a run found, in the order in which it is printed.
type report struct {
	Machine  machine  `json:"machine"`
	Metrics  []metric `json:"metrics"`
	Goals    []goal   `json:"goals"`
	sections []section
}

// metric is one number for programs: its name is a path, as
// "calls/getppid/tracked/ratio".
type metric struct {
	Name  string  `json:"name"`
	Value float64 `json:"value"`
	Unit  string  `json:"unit"`
}

// goal is one that issue or documentation promises. Missing it fails nothing.
type goal struct {
	What     string  `json:"what"`
	Limit    float64 `json:"limit"`
	Measured float64 `json:"measured"`
	Met      bool    `json:"met"`
	text     [2]string
}

// section is a title, tables, and how to read them.
type section struct {
	title  string
	tables []table
	notes  []string
}

// table is printed as Markdown; the first column is text, the others numbers.
type table struct {
	head []string
	rows [][]string
}

func (r *report) metric(value float64, unit string, name ...string) {
	r.Metrics = append(r.Metrics, metric{strings.Join(name, "/"), value, unit})
}

// goal takes part of its text, as "at most 40 MiB", from format and limit.
func (r *report) goal(what, format string, measured, limit float64) {
	r.Goals = append(r.Goals, goal{
		What: what, Limit: limit, Measured: measured, Met: measured <= limit,
		text: [2]string{"at most " + fmt.Sprintf(format, limit), fmt.Sprintf(format, measured)},
	})
}

func (r *report) add(s section) { r.sections = append(r.sections, s) }

// markdown is the whole report, the goals first.
func (r *report) markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, "Measured on %s.\n", r.Machine)
	goals := section{title: "Goals", tables: []table{{head: []string{"", "goal", "measured", ""}}}}
	for _, g := range r.Goals {
		verdict := "met"
		if !g.Met {
			verdict = "**missed**"
		}
		goals.tables[0].rows = append(goals.tables[0].rows, []string{g.What, g.text[0], g.text[1], verdict})
	}
	all := r.sections
	if len(r.Goals) > 0 {
		all = append([]section{goals}, all...)
	}
	for _, s := range all {
		fmt.Fprintf(&b, "\n### %s\n", s.title)
		for _, t := range s.tables {
			b.WriteString("\n" + t.markdown())
		}
		for _, n := range s.notes {
			b.WriteString("\n" + n + "\n")
		}
	}
	return b.String()
}

// markdown pads cells, so that the source reads as a table too.
func (t table) markdown() string {
	width := make([]int, len(t.head))
	for _, row := range append([][]string{t.head}, t.rows...) {
		for i, c := range row {
			width[i] = max(width[i], len([]rune(c)), 3)
		}
	}
	var b strings.Builder
	line := func(cells []string) {
		for i, c := range cells {
			pad := strings.Repeat(" ", width[i]-len([]rune(c)))
			if i == 0 {
				c += pad
			} else {
				c = pad + c
			}
			b.WriteString("| " + c + " ")
		}
		b.WriteString("|\n")
	}
	line(t.head)
	for i, w := range width {
		if i == 0 {
			b.WriteString("|" + strings.Repeat("-", w+2))
		} else {
			b.WriteString("|" + strings.Repeat("-", w+1) + ":")
		}
	}
	b.WriteString("|\n")
	for _, row := range t.rows {
		line(row)
	}
	return b.String()
}

func (r *report) writeJSON(path string) error {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(data, '\n'), 0o644)
}

// Marks around what replace replaces.
const (
	beginMark = "<!-- bench: begin; replaced by `make bench BENCH_DOC=docs/benchmarks.md` -->\n"
	endMark   = "<!-- bench: end -->\n"
)

// replaceIn puts text between the marks of a document.
func replaceIn(path, text string) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	before, rest, ok1 := strings.Cut(string(data), beginMark)
	_, after, ok2 := strings.Cut(rest, endMark)
	if !ok1 || !ok2 {
		return fmt.Errorf("%s: the lines %q and %q must stand around what is to be replaced", path, strings.TrimSpace(beginMark), strings.TrimSpace(endMark))
	}
	return os.WriteFile(path, []byte(before+beginMark+text+endMark+after), 0o644)
}
