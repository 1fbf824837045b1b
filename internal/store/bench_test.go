// SPDX-License-Identifier: Apache-2.0

package store

import (
	"fmt"
	"testing"
)

func calls(n int) (out []string) {
	for i := range n {
		out = append(out, fmt.Sprintf("call%03d", i))
	}
	return out
}

// BenchmarkActive is what a container's create waits for.
func BenchmarkActive(b *testing.B) {
	s := open(b, b.TempDir(), Options{})
	add(b, s, recording("w", "r1", calls(150)...), activate)
	for b.Loop() {
		if _, err := s.Active("w"); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkAdd(b *testing.B) {
	for name, changes := range map[string]bool{"version": true, "nothing new": false} {
		b.Run(name, func(b *testing.B) {
			s := open(b, b.TempDir(), Options{})
			add(b, s, recording("w", "r", calls(150)...), activate)
			i := 0
			for b.Loop() {
				call := "call000"
				if changes {
					call = fmt.Sprintf("new%d", i)
				}
				add(b, s, recording("w", fmt.Sprintf("r%08d", i), call), activate)
				i++
			}
		})
	}
}
