// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0

//go:build ignore

/* Counts what seccomp filters deny, where the kernel tells its audit log of it:
 * of filters that were loaded with SECCOMP_FILTER_FLAG_LOG, and of what kills.
 * Nothing is in the way of calls that are allowed. Each program is loaded by
 * itself.
 */
#include <linux/audit.h>
#include <linux/bpf.h>
#include <linux/types.h>
#include "kernel.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include "denials.h"

/* linux/seccomp.h, which defines a struct of kernel.h's name. */
#define SECCOMP_RET_USER_NOTIF 0x7fc00000U
#define SECCOMP_RET_LOG 0x7ffc0000U

/* Cgroups whose tasks' denials are wanted, and those of tasks below. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, __u64);
	__type(value, __u32);
} watched SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct denial_key);
	__type(value, struct denial_count);
} denied_calls SEC(".maps");

/* Denials that denied_calls had no room for. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} denied_lost SEC(".maps");

/* The watched cgroup that the current task is in, or below. */
static __noinline __u64 watched_cgroup(void)
{
	__u64 id;
	int i;

	for (i = 0; i < DENIAL_DEPTH; i++) {
		id = bpf_get_current_ancestor_cgroup_id(i);
		if (!id)
			break;
		if (bpf_map_lookup_elem(&watched, &id))
			return id;
	}
	return 0;
}

SEC("fentry/audit_seccomp")
int BPF_PROG(syslatch_audit, unsigned long syscall, long signr, int code)
{
	struct task_struct *task = bpf_get_current_task_btf();
	__u32 nr = syscall, zero = 0, *tag;
	struct denial_count first = {}, *c;
	struct denial_key key = {};
	__u64 *lost;

	/* What is only logged; and what a supervisor denied, which tells of it
	 * itself.
	 */
	if ((__u32)code == SECCOMP_RET_LOG ||
	    (__u32)code == SECCOMP_RET_USER_NOTIF)
		return 0;
	key.cgroup = watched_cgroup();
	tag = bpf_map_lookup_elem(&watched, &key.cgroup);
	if (!tag)
		return 0;
	key.tag = *tag;
	key.arch = task->thread_info.status & TS_COMPAT ? AUDIT_ARCH_I386
							: AUDIT_ARCH_X86_64;
	key.nr = (nr & ~X32_SYSCALL_BIT) < DENIAL_CALLS ? nr : DENIAL_CALLS;
	first.n = 1;
	first.pid = bpf_get_current_pid_tgid() >> 32;
	first.nr = nr;

	c = bpf_map_lookup_elem(&denied_calls, &key);
	if (!c) {
		if (!bpf_map_update_elem(&denied_calls, &key, &first,
					 BPF_NOEXIST))
			return 0;
		c = bpf_map_lookup_elem(&denied_calls, &key);
	}
	if (c) {
		c->pid = first.pid;
		c->nr = nr;
		__sync_fetch_and_add(&c->n, 1);
		return 0;
	}
	lost = bpf_map_lookup_elem(&denied_lost, &zero);
	if (lost)
		__sync_fetch_and_add(lost, 1);
	return 0;
}

/* For who reads audit's records, which name a process alone: the watched cgroup
 * of each that could be denied something and has ended.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, __u32);
	__type(value, __u64);
} ended SEC(".maps");

SEC("tp_btf/sched_process_exit")
int BPF_PROG(syslatch_end, struct task_struct *task)
{
	__u64 both = bpf_get_current_pid_tgid(), cgroup;
	__u32 pid = both >> 32;

	if (pid != (__u32)both || !task->seccomp.filter_count.counter)
		return 0;
	cgroup = watched_cgroup();
	if (cgroup)
		bpf_map_update_elem(&ended, &pid, &cgroup, BPF_ANY);
	else
		bpf_map_delete_elem(&ended, &pid); /* of who had it before */
	return 0;
}

/* The kernel gives the helpers used here to no other licence. */
char _license[] SEC("license") = "GPL";
