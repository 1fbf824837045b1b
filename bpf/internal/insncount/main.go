// SPDX-License-Identifier: Apache-2.0

// Insncount prints the number of instructions of each program in BPF objects,
// so that a rebuild shows what a change costs.
package main

import (
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/cilium/ebpf"
)

func main() {
	if err := run(os.Stdout, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "insncount:", err)
		os.Exit(1)
	}
}

func run(w io.Writer, objects []string) error {
	for _, object := range objects {
		spec, err := ebpf.LoadCollectionSpec(object)
		if err != nil {
			return err
		}
		names := make([]string, 0, len(spec.Programs))
		for name := range spec.Programs {
			names = append(names, name)
		}
		slices.Sort(names)
		for _, name := range names {
			fmt.Fprintf(w, "%s %s: %d instructions\n", object, name, len(spec.Programs[name].Instructions))
		}
	}
	return nil
}
