// SPDX-License-Identifier: Apache-2.0

package hook

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Tell writes why a container can't start so that whoever started it sees it.
//
// runc puts a hook's standard error into its own error, which podman shows. crun
// (1.8.1) sends a hook's standard error to /dev/null and reports the hook's path
// and exit status, as JSON in the file that podman names with --log. podman
// shows crun's own standard error, to which the message is written here, if that
// file isn't one JSON value: the line that is put there sees to it.
func Tell(stderr io.Writer, message string) {
	message = "syslatch: " + oneLine(message)
	fmt.Fprintln(stderr, message)
	if err := tellCrun(os.Getppid(), message); err != nil {
		fmt.Fprintln(stderr, "syslatch: tell crun's caller:", err)
	}
}

// tellCrun does nothing if pid isn't crun's.
func tellCrun(pid int, message string) error {
	proc := filepath.Join("/proc", strconv.Itoa(pid))
	// Its exe is a sealed copy without a name.
	cmdline, err := os.ReadFile(filepath.Join(proc, "cmdline"))
	if err != nil {
		return nil // gone
	}
	args := strings.Split(string(cmdline), "\x00")
	if filepath.Base(args[0]) != "crun" {
		return nil
	}
	err = appendLine(filepath.Join(proc, "fd", "2"), message, 0)
	if path := logFile(args); path != "" && err == nil {
		err = appendLine(path, message, unix.O_NOFOLLOW)
	}
	return err
}

func appendLine(path, line string, flags int) error {
	// What was a pipe may have no reader any more.
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|unix.O_NONBLOCK|flags, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteString(line + "\n")
	return err
}

// logFile finds the file of --log, "" without one.
func logFile(args []string) string {
	for i, a := range args {
		if path, ok := strings.CutPrefix(a, "--log="); ok {
			return strings.TrimPrefix(path, "file:")
		}
		if a == "--log" && i+1 < len(args) {
			return strings.TrimPrefix(args[i+1], "file:")
		}
	}
	return ""
}
