// SPDX-License-Identifier: Apache-2.0

package bpf

import "testing"

// The programs' tables agree: from a call's first row, every row is reached,
// once, and is of that call. Needs no privileges.
func TestArgTables(t *testing.T) {
	spec, err := loadSyslatch()
	if err != nil {
		t.Fatal(err)
	}
	var rows [32]syslatchArgRow
	if err := spec.Variables[syslatchVarArgRows].Get(&rows); err != nil {
		t.Fatal(err)
	}
	var first [3][1024]uint8
	if err := spec.Variables[syslatchVarFirstRows].Get(&first); err != nil {
		t.Fatal(err)
	}
	const noCall = 0xffff
	for abi := range first {
		reached := make(map[int]int)
		for nr, row := range first[abi] {
			for at := int(row); at != 0; at++ {
				if at >= len(rows) {
					t.Fatalf("%s %d: row %d", ABI(abi), nr, at)
				}
				if int(rows[at].Nr[abi]) != nr {
					t.Errorf("%s %d: row %d is of call %d", ABI(abi), nr, at, rows[at].Nr[abi])
				}
				reached[at]++
				if rows[at].More == 0 {
					break
				}
			}
		}
		for at, row := range rows {
			want := 1
			if row.Mask == 0 || row.Nr[abi] == noCall {
				want = 0
			}
			if reached[at] != want {
				t.Errorf("%s: row %d (call %d, argument %d) is reached %d times, want %d", ABI(abi), at, row.Nr[abi], row.Arg, reached[at], want)
			}
			if row.Arg > 3 {
				t.Errorf("row %d: argument %d, the programs read the first four", at, row.Arg)
			}
		}
	}
}

// Lanes decide over words, and sets come in order.
func TestDecodeArgs(t *testing.T) {
	rows := make([]syslatchArgRow, 32)
	rows[3] = syslatchArgRow{Nr: [4]uint16{16, 54, 514}, Arg: 1, Mask: 0xffffffff}
	word := func(phase, abi, row, value uint64) uint64 {
		return 1<<63 | phase<<40 | abi<<37 | row<<32 | value
	}
	var rec syslatchRecord
	rec.Args[7], rec.Args[300] = word(7, 1, 3, 9), word(7, 1, 3, 0xffffffff)
	rec.ArgCounts[1][3] = 2 << 56
	rec.Args[1] = word(0, 0, 3, 5)
	rec.ArgCounts[0][3] = 0x80 | 1
	// A lane that has wrapped leaves its words.
	for i := range uint64(33) {
		rec.Args[100+i] = word(0, 2, 3, i)
	}
	got := rec.args(rows)
	if len(got) != 3 || !got[0].Any || got[0].Values != nil || !got[1].Any || got[1].ABI != ABIX32 || got[1].Number != 514 {
		t.Fatalf("sets: %+v", got)
	}
	if s := got[2]; s.Any || s.Phase != 7 || s.Number != 54 || len(s.Values) != 2 || s.Values[0] != 9 || s.Values[1] != 0xffffffff {
		t.Errorf("set: %+v", s)
	}
}
