/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Layouts shared by the programs that see what filters deny and, through
 * bpf2go, by the Go loader. Nothing of it is pinned.
 */
#ifndef SYSLATCH_DENIALS_H
#define SYSLATCH_DENIALS_H

/* Numbers from here on are one key: a task may try them all. */
#define DENIAL_CALLS 1024
#define DENIAL_DEPTH 32 /* levels at which a watched cgroup is looked for */

struct denial_key {
	__u64 cgroup; /* the watched one */
	__u32 tag;    /* of that cgroup, then */
	__u32 nr;     /* as the kernel has it, or DENIAL_CALLS */
	__u32 arch;   /* AUDIT_ARCH_X86_64, for x32 too, or AUDIT_ARCH_I386 */
	__u32 pad;
};

struct denial_count {
	__u64 n;
	__u32 pid; /* of the last process, in the first pid namespace */
	__u32 nr;  /* that it called */
};

#endif
