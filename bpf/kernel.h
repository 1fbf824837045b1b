/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* The few kernel types the programs read, relocated by CO-RE: only the fields
 * named here, in no particular order.
 */
#ifndef SYSLATCH_KERNEL_H
#define SYSLATCH_KERNEL_H

#pragma clang attribute push(__attribute__((preserve_access_index)),           \
			     apply_to = record)

struct pt_regs {
	unsigned long r10, r9, r8, bx, cx, dx, si, di, bp;
};

typedef struct {
	int counter;
} atomic_t;

struct kernfs_node {
	__u64 id;
	const char *name;
};

struct cgroup;

struct cgroup_subsys_state {
	struct cgroup *cgroup;
	struct cgroup_subsys_state *parent;
};

struct cgroup_root {
	int hierarchy_id;
};

struct cgroup {
	struct cgroup_subsys_state self;
	struct kernfs_node *kn;
	struct cgroup_root *root;
};

struct css_set {
	struct cgroup *dfl_cgrp;
};

struct qstr {
	const unsigned char *name;
};

struct dentry {
	struct qstr d_name;
};

struct path {
	struct dentry *dentry;
};

struct file {
	struct path f_path;
};

struct mm_struct {
	struct file *exe_file;
};

struct thread_info {
	__u32 status;
};

struct seccomp {
	atomic_t filter_count;
};

struct task_struct {
	struct thread_info thread_info;
	struct css_set *cgroups;
	struct mm_struct *mm;
	struct seccomp seccomp;
};

#pragma clang attribute pop

/* arch/x86/include/asm/thread_info.h: set on entry through a 32-bit gate. */
#define TS_COMPAT 0x0002

#define X32_SYSCALL_BIT 0x40000000

#endif
