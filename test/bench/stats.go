// SPDX-License-Identifier: Apache-2.0

package main

import (
	"math"
	"slices"
	"time"
)

// quantile is the value below which a share q of v lies, by nearest rank: one
// that was measured, never one in between. v must not be empty.
func quantile(v []float64, q float64) float64 {
	v = slices.Sorted(slices.Values(v))
	rank := int(math.Ceil(q * float64(len(v))))
	return v[min(max(rank, 1), len(v))-1]
}

func median(v []float64) float64 { return quantile(v, 0.5) }

// paired applies f to the measurements of each round.
func paired(a, b []float64, f func(a, b float64) float64) []float64 {
	out := make([]float64, len(a))
	for i := range a {
		out[i] = f(a[i], b[i])
	}
	return out
}

func ratio(a, b float64) float64      { return a / b }
func difference(a, b float64) float64 { return a - b }

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
