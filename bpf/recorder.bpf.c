// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0

//go:build ignore

/* Records which system calls the tasks of tracked cgroups make. */
#include <linux/bpf.h>
#include <linux/types.h>
#include "kernel.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include <bpf/bpf_core_read.h>
#include "syslatch.h"
#include "args.h"

/* max_entries here are defaults: the loader sets them. Not preallocated: that
 * would cost 1.1 MB more and look up no faster (measured on 6.18).
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 16384);
	__type(key, __u64);
	__type(value, struct tracked);
} tracked_cgroups SEC(".maps");

/* Cgroups that are to be tracked as soon as they are made. The value's cgroup
 * is not used.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1024);
	__type(key, struct cgroup_name);
	__type(value, struct tracked);
} awaited_names SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1024);
	__type(key, __u32);
	__type(value, struct slot);
} slots SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1024);
	__type(key, __u32);
	__type(value, struct record);
} records SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 256 << 10);
} events SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, ERROR_PLACES);
	__type(key, __u32);
	__type(value, __u64);
} errors SEC(".maps");

/* Types that only Go names must stand in the object's BTF. */
const struct event *unused_event __attribute__((unused));
const enum layout *unused_layout __attribute__((unused));
const enum abi *unused_abi __attribute__((unused));
const enum gate *unused_gate __attribute__((unused));
const enum slot_state *unused_state __attribute__((unused));
const enum threshold *unused_threshold __attribute__((unused));
const enum loss *unused_loss __attribute__((unused));
const enum error_place *unused_place __attribute__((unused));

static __always_inline void count_error(__u32 place)
{
	__u64 *n = bpf_map_lookup_elem(&errors, &place);

	if (n)
		__sync_fetch_and_add(n, 1);
}

/* The slot of a cgroup that is being recorded, its index in *index. */
static __always_inline struct slot *live_slot(__u64 cgroup, __u32 *index)
{
	struct tracked *t = bpf_map_lookup_elem(&tracked_cgroups, &cgroup);
	struct slot *s;
	__u32 generation;

	if (!t)
		return NULL;
	*index = *(volatile __u32 *)&t->slot;
	generation = *(volatile __u32 *)&t->generation;
	if (*(volatile __u64 *)&t->cgroup != cgroup)
		return NULL;
	s = bpf_map_lookup_elem(&slots, index);
	if (!s || s->live != generation)
		return NULL;
	return s;
}

/* A call was seen for the first time. The bit is set already: what is lost
 * here is the story, not the evidence.
 */
static __noinline int report(struct slot *s, __u32 index, __u64 call)
{
	struct task_struct *task;
	const unsigned char *name;
	struct event *e;
	__u64 id;

	if (!s)
		return 0;
	e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
	if (!e) {
		__sync_fetch_and_add(&s->losses[LOSS_EVENTS], 1);
		count_error(ERROR_RING_RESERVE);
		return 0;
	}
	id = bpf_get_current_pid_tgid();
	task = (void *)bpf_get_current_task();
	e->since_ns = bpf_ktime_get_boot_ns() - s->start_ns;
	e->cgroup = BPF_CORE_READ(task, cgroups, dfl_cgrp, kn, id);
	e->slot = index;
	e->generation = s->generation;
	e->nr = (__s32)call;
	e->pid = (__u32)id;
	e->tgid = id >> 32;
	e->abi = (call >> 32) & 0xff;
	e->phase = (call >> 40) & 0xff;
	e->pad[0] = 0;
	e->pad[1] = 0;
	__builtin_memset(e->comm, 0, sizeof(e->comm));
	__builtin_memset(e->exe, 0, sizeof(e->exe));
	if (bpf_get_current_comm(e->comm, sizeof(e->comm)))
		count_error(ERROR_COMM);
	name = BPF_CORE_READ(task, mm, exe_file, f_path.dentry, d_name.name);
	if (bpf_probe_read_kernel_str(e->exe, sizeof(e->exe), name) < 0)
		count_error(ERROR_EXE);
	bpf_ringbuf_submit(e, 0);
	return 0;
}

/* Keeps a number that the bitmaps can't hold. */
static __noinline int odd_call(struct slot *s, __u32 index, __u64 call)
{
	struct record *r = bpf_map_lookup_elem(&records, &index);
	__u64 old;
	int i;

	if (!r || !s)
		return 0;
	call |= TAKEN;
	for (i = 0; i < ODD_CALLS; i++) {
		old = r->odd_calls[i];
		if (!old) {
			old = __sync_val_compare_and_swap(&r->odd_calls[i], 0,
							  call);
			if (!old)
				return report(s, index, call & ~TAKEN);
		}
		if (old == call)
			return 0;
	}
	__sync_fetch_and_add(&s->losses[LOSS_ODD_CALLS], 1);
	return 0;
}

static __always_inline __u64 argument(struct pt_regs *regs, __u32 abi, __u8 n)
{
	if (abi == ABI_I386) {
		switch (n) {
		case 0:
			return (__u32)regs->bx;
		case 1:
			return (__u32)regs->cx;
		case 2:
			return (__u32)regs->dx;
		default:
			return (__u32)regs->si;
		}
	}
	switch (n) {
	case 0:
		return regs->di;
	case 1:
		return regs->si;
	case 2:
		return regs->dx;
	default:
		return regs->r10;
	}
}

static __always_inline void keep_arg(struct slot *s, struct record *r,
				     __u32 abi, __u32 phase, __u32 row,
				     __u64 value)
{
	__u64 *counts = &r->arg_counts[abi][row];
	__u64 lane = phase * 8, key, old;
	__u32 at;
	int i;

	if (((*counts >> lane) & 0xff) > ARG_VALUES)
		return;
	/* A value that no word can hold, from a register that nothing sane
	 * fills so.
	 */
	if (value >> 32)
		goto any;
	key = TAKEN | (__u64)phase << 40 | (__u64)abi << 37 | (__u64)row << 32 |
	      value;
	at = (key * 0x9e3779b97f4a7c15ULL) >> (64 - ARG_SLOTS_LOG2);
	for (i = 0; i < ARG_PROBES; i++) {
		__u64 *word = &r->args[(at + i) & (ARG_SLOTS - 1)];

		old = *word;
		if (old == key)
			return;
		if (old)
			continue;
		old = __sync_val_compare_and_swap(word, 0, key);
		if (!old) {
			/* Counted after it is kept, so a reader that finds more
			 * than ARG_VALUES words knows too, should a lane wrap.
			 */
			__sync_fetch_and_add(counts, 1ULL << lane);
			return;
		}
		if (old == key)
			return;
	}
	__sync_fetch_and_add(&s->losses[LOSS_ARGS], 1);
any:
	__sync_fetch_and_or(counts, (__u64)ARG_ANY << lane);
}

/* Out of line: most calls don't come here, and needn't save its registers. */
static __noinline int keep_args(struct slot *s, struct record *r,
				struct pt_regs *regs, __u32 packed)
{
	__u32 abi = packed >> 16, phase = (packed >> 8) & 0xff;
	__u32 row = packed & 0xff;
	int i;

	if (!s || !r || !regs || abi >= ABIS || phase >= PHASES)
		return 0;
	for (i = 0; i < 2; i++, row++) {
		if (row >= ARG_ROWS)
			return 0;
		/* Or the verifier loses sight of the bound. */
		barrier_var(row);
		keep_arg(
		    s, r, abi, phase, row & (ARG_ROWS - 1),
		    argument(regs, abi, arg_rows[row & (ARG_ROWS - 1)].arg) &
			arg_rows[row & (ARG_ROWS - 1)].mask);
		if (!arg_rows[row & (ARG_ROWS - 1)].more)
			return 0;
	}
	return 0;
}

/* Whether a task is judged: it has more filters than the threshold. */
static __always_inline int is_open(struct slot *s, struct task_struct *task)
{
	int filters = task->seccomp.filter_count.counter;

	if (filters > s->threshold)
		return 1;
	if (filters < s->base_filters)
		__sync_fetch_and_add(&s->losses[LOSS_FOREIGN], 1);
	return 0;
}

/* The phase in which calls count now. */
static __always_inline __u32 current_phase(struct slot *s)
{
	__u32 start = *(volatile __u32 *)&s->start;

	return (start ? start - 1 : s->phase) & (PHASES - 1);
}

/* Sets the bit of a call, whose number is below CALLS. */
static __always_inline struct record *
keep_call(struct slot *s, __u32 index, __u32 phase, __u32 abi, __u64 nr)
{
	struct record *r = bpf_map_lookup_elem(&records, &index);
	__u64 *word, bit;

	if (!r)
		return NULL;
	word = &r->bits[phase][abi][nr >> 6];
	bit = 1ULL << (nr & 63);
	if (!(*word & bit)) {
		if (!(__sync_fetch_and_or(word, bit) & bit))
			report(s, index,
			       (__u64)phase << 40 | (__u64)abi << 32 | nr);
	}
	return r;
}

SEC("tp_btf/sys_enter")
int BPF_PROG(syslatch_enter, struct pt_regs *regs, long id)
{
	struct task_struct *task = bpf_get_current_task_btf();
	__u32 index, abi, phase, row;
	__u64 nr = (__u32)id;
	struct record *r;
	struct slot *s;

	s = live_slot(task->cgroups->dfl_cgrp->kn->id, &index);
	if (!s || !is_open(s, task))
		return 0;

	if (task->thread_info.status & TS_COMPAT) {
		abi = ABI_I386;
	} else if (nr < X32_SYSCALL_BIT || (nr & 0x80000000)) {
		/* The kernel takes no negative number for x32's. */
		abi = ABI_X86_64;
	} else {
		abi = ABI_X32;
		nr -= X32_SYSCALL_BIT;
	}
	phase = current_phase(s);
	if (nr >= CALLS) {
		odd_call(s, index, (__u64)phase << 40 | (__u64)abi << 32 | nr);
		return 0;
	}

	r = keep_call(s, index, phase, abi, nr);
	if (!r)
		return 0;
	row = first_rows[abi][nr];
	if (row)
		keep_args(s, r, regs, abi << 16 | phase << 8 | row);
	return 0;
}

/* A call through the vsyscall page, as programs from before 2012 make them, is
 * emulated in a page fault: no sys_enter, but seccomp judges it all the same
 * (arch/x86/entry/vsyscall/vsyscall_64.c, emulate_vsyscall).
 */
SEC("tp_btf/emulate_vsyscall")
int BPF_PROG(syslatch_vsys, int entry)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct slot *s;
	__u32 index;
	__u64 nr;

	s = live_slot(task->cgroups->dfl_cgrp->kn->id, &index);
	if (!s || !is_open(s, task))
		return 0;
	switch (entry) {
	case 0:
		nr = 96; /* gettimeofday */
		break;
	case 1:
		nr = 201; /* time */
		break;
	case 2:
		nr = 309; /* getcpu */
		break;
	default:
		return 0;
	}
	keep_call(s, index, current_phase(s), ABI_X86_64, nr);
	return 0;
}

/* Opens the exec gate, and ends the start: by now the calls of the one who set
 * the task up are over. A runtime may execute itself before it loads the
 * filter, which ends nothing.
 */
SEC("tp_btf/sched_process_exec")
int BPF_PROG(syslatch_exec, struct task_struct *task)
{
	__u32 index;
	struct slot *s = live_slot(task->cgroups->dfl_cgrp->kn->id, &index);

	if (!s)
		return 0;
	if (s->gate == GATE_EXEC)
		s->threshold = THRESHOLD_OPEN;
	if (s->start && task->seccomp.filter_count.counter > s->threshold)
		s->start = 0;
	return 0;
}

/* Ids of version 1 hierarchies are from number spaces of their own. */
static __always_inline int is_default(struct cgroup *cgrp)
{
	return cgrp->root->hierarchy_id == 0;
}

/* The slot that waits for a cgroup of this name. It waits once. */
static __always_inline struct slot *awaiting_slot(struct cgroup *cgrp,
						  __u32 *index)
{
	struct cgroup_name key = {};
	struct tracked *t;
	__u32 generation;
	struct slot *s;

	if (bpf_probe_read_kernel_str(key.name, sizeof(key.name),
				      cgrp->kn->name) <= 0)
		return NULL;
	t = bpf_map_lookup_elem(&awaited_names, &key);
	if (!t)
		return NULL;
	*index = t->slot;
	generation = t->generation;
	s = bpf_map_lookup_elem(&slots, index);
	if (!s || s->live != generation)
		return NULL;
	/* Who deletes it has it: two directories of one name, in different
	 * places, may be made at once.
	 */
	if (bpf_map_delete_elem(&awaited_names, &key))
		return NULL;
	s->root_cgroup = cgrp->kn->id;
	return s;
}

/* Runs before the new directory can be seen, so before any task is in it. */
SEC("tp_btf/cgroup_mkdir")
int BPF_PROG(syslatch_mkdir, struct cgroup *cgrp)
{
	struct tracked child;
	struct slot *s;
	__u32 index;

	if (!is_default(cgrp))
		return 0;
	s = live_slot(cgrp->self.parent->cgroup->kn->id, &index);
	if (!s)
		s = awaiting_slot(cgrp, &index);
	if (!s)
		return 0;
	child.cgroup = cgrp->kn->id;
	child.slot = index;
	child.generation = s->live;
	if (bpf_map_update_elem(&tracked_cgroups, &child.cgroup, &child,
				BPF_NOEXIST)) {
		__sync_fetch_and_add(&s->losses[LOSS_CGROUPS], 1);
		count_error(ERROR_CGROUP_INSERT);
		return 0;
	}
	__sync_fetch_and_add(&s->cgroups, 1);
	return 0;
}

SEC("tp_btf/cgroup_release")
int BPF_PROG(syslatch_rmdir, struct cgroup *cgrp)
{
	struct slot *s;
	__u64 id;
	__u32 index;

	if (!is_default(cgrp))
		return 0;
	id = cgrp->kn->id;
	s = live_slot(id, &index);
	if (!s)
		return 0;
	/* Fails only if user space was first: nothing is lost. */
	if (!bpf_map_delete_elem(&tracked_cgroups, &id))
		__sync_fetch_and_sub(&s->cgroups, 1);
	return 0;
}

/* The kernel refuses the helpers used here to any other licence. */
char _license[] SEC("license") = "GPL";
