/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Layouts shared by the programs and, through bpf2go, by the Go loader.
 * A change of any of them needs a new LAYOUT: pins outlive the program that
 * made them, and a later build must not read them by a different layout. So
 * does one more program, which would not be among the pinned ones.
 */
#ifndef SYSLATCH_H
#define SYSLATCH_H

enum layout { LAYOUT = 5 };

#define PHASES 8
#define WORDS 16 /* of 64 calls each: numbers 0..1023 */
#define CALLS (WORDS * 64)

#define ARG_ROWS 32   /* checked arguments per ABI, row 0 is unused */
#define ARG_SLOTS 512 /* argument values of one instance, a power of two */
#define ARG_SLOTS_LOG2 9
#define ARG_PROBES 16
#define ARG_VALUES 32 /* of one argument in one phase; more is "any value" */
#define ARG_ANY 0x80  /* lane value: any, whatever has been counted */

#define ODD_CALLS 32 /* numbers outside the bitmap, of one instance */

#define TAKEN (1ULL << 63) /* marks a used word in args and odd_calls */

#define NAME_LEN 128 /* of an awaited cgroup's directory, with its NUL */

#define COMM_LEN 16
#define EXE_LEN 64

/* A task is judged when its filter count is above this. */
enum threshold { THRESHOLD_OPEN = -1, THRESHOLD_SHUT = 0x7fffffff };

enum abi { ABI_X86_64, ABI_I386, ABI_X32, ABIS };

enum gate { GATE_FILTER, GATE_EXEC, GATE_OPEN };

enum slot_state { SLOT_FREE, SLOT_SETUP, SLOT_ACTIVE, SLOT_FINISHED };

enum loss {
	LOSS_EVENTS,	/* ring full: first-seen events, the bits are set */
	LOSS_FOREIGN,	/* calls of tasks with fewer filters than the base */
	LOSS_CGROUPS,	/* children that tracked_cgroups had no room for */
	LOSS_ODD_CALLS, /* calls outside the bitmap, odd_calls full */
	LOSS_ARGS,	/* arguments turned "any" for want of a free word */
	LOSSES = 8
};

/* Helpers that can fail, over all instances and for good. */
enum error_place {
	ERROR_RING_RESERVE,
	ERROR_CGROUP_INSERT,
	ERROR_COMM,
	ERROR_EXE,
	ERROR_PLACES
};

/* Value of tracked_cgroups. The cgroup id stands first, and is checked last:
 * a deleted element may be reused for another cgroup while a program still
 * holds the pointer, and the kernel writes values in ascending order.
 */
struct tracked {
	__u64 cgroup;
	__u32 slot;
	__u32 generation;
};

/* Key of awaited_names: the last part of a path, padded with NULs. */
struct cgroup_name {
	char name[NAME_LEN];
};

/* Value of slots, mapped by user space. The first line is read on every call
 * of a tracked task; user space owns it, but for what an execve changes:
 * threshold, which the exec gate opens, and start. The second line is counters.
 */
struct slot {
	__u32 live; /* generation while recording, else 0 */
	__s32 threshold;
	__s32 base_filters; /* 0 unless the gate is GATE_FILTER */
	__u32 phase;
	__u64 start_ns;	   /* boottime */
	__u64 root_cgroup; /* 0 while it is awaited */
	__u32 state;
	__u32 gate;
	__u32 generation;
	__u32 cgroups; /* entries in tracked_cgroups now */
	__u64 tag;     /* its owner's, who finds the slot by it */
	/* 1 + the phase in which calls count until a judged task's execve, and 0
	 * behind it: then they count in phase.
	 */
	__u32 start;
	__u32 reserved;
	__u64 losses[LOSSES];
};

/* Value of records: what an instance did. */
struct record {
	__u64 bits[PHASES][ABIS][WORDS];
	/* Open-addressed set, never deleted from:
	 * TAKEN | phase << 40 | abi << 37 | row << 32 | value
	 */
	__u64 args[ARG_SLOTS];
	/* Values seen of an argument, a lane of eight bits for each phase. */
	__u64 arg_counts[ABIS][ARG_ROWS];
	/* TAKEN | phase << 40 | abi << 32 | number */
	__u64 odd_calls[ODD_CALLS];
};

/* One checked argument; a call's rows are adjacent. */
struct arg_row {
	__u16 nr[4]; /* by ABI; NO_CALL where it has none */
	__u8 arg;
	__u8 more; /* the next row is of the same call */
	__u8 pad[6];
	__u64 mask; /* applied before the value is kept */
};
#define NO_CALL 0xffff

struct event {
	__u64 since_ns; /* since the instance was tracked */
	__u64 cgroup;
	__u32 slot;
	__u32 generation;
	__s32 nr;
	__u32 pid; /* of the thread, initial pid namespace */
	__u32 tgid;
	__u8 abi;
	__u8 phase;
	__u8 pad[2];
	char comm[COMM_LEN];
	char exe[EXE_LEN];
};

#endif
