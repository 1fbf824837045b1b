// SPDX-License-Identifier: Apache-2.0

package bpf

// Needs clang and libbpf's headers (Debian: clang, llvm, libbpf-dev). The
// results are committed, so that building needs neither.
//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -target amd64 -tags linux -cflags "-O2 -g -Wall -Werror -mcpu=v3 -I/usr/include/x86_64-linux-gnu" -type event -type layout -type abi -type gate -type slot_state -type threshold -type loss -type error_place -type cgroup_name syslatch recorder.bpf.c
//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -target amd64 -tags linux -cflags "-O2 -g -Wall -Werror -mcpu=v3 -I/usr/include/x86_64-linux-gnu" -type phase_layout -type phase_allow -type phase_limit -type phase_hook -type phase_error -type phase_state -type tree_kind -type phase_rules -type phase_entry phases phases.bpf.c
//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -target amd64 -tags linux -cflags "-O2 -g -Wall -Werror -mcpu=v3 -I/usr/include/x86_64-linux-gnu" denials denials.bpf.c
//go:generate go run ./internal/insncount syslatch_x86_bpfel.o phases_x86_bpfel.o denials_x86_bpfel.o
