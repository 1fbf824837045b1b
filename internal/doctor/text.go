// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"bufio"
	"fmt"
	"io"
	"strings"
)

var colours = map[Status]string{OK: "\x1b[32m", Warn: "\x1b[33m", Missing: "\x1b[31m", Error: "\x1b[1;31m"}

// WriteText writes the report for people, in aligned columns; colour says
// whether w takes ECMA-48 colours.
func (r *Report) WriteText(w io.Writer, colour bool) error {
	out := bufio.NewWriter(w)
	var rows []row
	for _, c := range r.Checks {
		rows = append(rows, row{c.Status, c.Name, c.Found, c.Uses, c.Remedy})
	}
	writeRows(out, "CHECK", "FOUND", rows, colour)
	rows = rows[:0]
	for _, m := range r.Mechanisms {
		rows = append(rows, row{m.Status, m.Job, m.Uses, "", m.Remedy})
	}
	fmt.Fprintln(out)
	writeRows(out, "JOB", "SYSLATCH USES", rows, colour)
	fmt.Fprintln(out)
	if r.Works {
		fmt.Fprintln(out, "Recording and enforcing work on this host.")
	} else {
		var not []string
		for _, m := range r.Mechanisms {
			if m.Status == Missing {
				not = append(not, m.Job)
			}
		}
		fmt.Fprintf(out, "Recording and enforcing do not both work on this host. Not possible: %s.\n", strings.Join(not, ", "))
	}
	return out.Flush()
}

type row struct {
	status       Status
	name, found  string
	uses, remedy string
}

func writeRows(w io.Writer, title, found string, rows []row, colour bool) {
	width := len(title)
	for _, r := range rows {
		width = max(width, len(r.name))
	}
	const statusWidth = len("missing")
	fmt.Fprintf(w, "%-*s  %-*s  %s\n", statusWidth, "STATUS", width, title, found)
	indent := strings.Repeat(" ", statusWidth+2+width+2)
	for _, r := range rows {
		status := fmt.Sprintf("%-*s", statusWidth, r.status)
		if colour {
			status = colours[r.status] + status + "\x1b[0m"
		}
		found := r.found
		if r.uses != "" && r.status == OK {
			found += " (" + r.uses + ")"
		}
		fmt.Fprintf(w, "%s  %-*s  %s\n", status, width, r.name, found)
		if r.uses != "" && r.status != OK {
			fmt.Fprintf(w, "%sfor: %s\n", indent, r.uses)
		}
		if r.remedy != "" {
			fmt.Fprintf(w, "%sfix: %s\n", indent, r.remedy)
		}
	}
}
