// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0

//go:build ignore

/* Says no by phase: what the tasks of an instance may open, write, run and
 * reach, by a number that user space stores. Each program is loaded by itself,
 * where the kernel takes it.
 */
#include <linux/bpf.h>
#include <linux/types.h>
#include "phasekernel.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_tracing.h>
#include <bpf/bpf_core_read.h>
#include "phases.h"

/* max_entries here are defaults: the loader sets them. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 16384);
	__type(key, __u64);
	__type(value, struct phase_cgroup);
} phase_cgroups SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1024);
	__type(key, __u32);
	__type(value, struct phase_slot);
} phase_slots SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1024);
	__type(key, __u32);
	__type(value, struct phase_counts);
} phase_denials SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct tree_key);
	__type(value, __u32);
} phase_trees SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct destination_key);
	__type(value, struct destination_ports);
} phase_dests SEC(".maps");

/* PHASE_BUFFERS for each processor. Not a per-CPU map: programs may be
 * preempted, and another task's then runs on the same processor.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 4);
	__type(key, __u32);
	__type(value, struct path_buffer);
} phase_buffers SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct phase_entry);
} phase_entries SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, PHASE_ERRORS);
	__type(key, __u32);
	__type(value, __u64);
} phase_errors SEC(".maps");

/* Types that only Go names must stand in the object's BTF. */
const enum phase_layout *unused_layout __attribute__((unused));
const enum phase_allow *unused_allow __attribute__((unused));
const enum phase_limit *unused_limit __attribute__((unused));
const enum phase_hook *unused_hook __attribute__((unused));
const enum phase_error *unused_error __attribute__((unused));
const enum phase_state *unused_state __attribute__((unused));
const enum tree_kind *unused_kind __attribute__((unused));

static __always_inline void count_error(__u32 place)
{
	__u64 *n = bpf_map_lookup_elem(&phase_errors, &place);

	if (n)
		__sync_fetch_and_add(n, 1);
}

/* What is in force for the current task. */
struct found {
	struct phase_rules *rules; /* NULL: unknown, so nothing is allowed */
	__u32 slot;
	__u32 generation;
	__u32 phase;
};

/* An instance above a cgroup that phase_cgroups had no room for. */
static __noinline __u64 tracked_ancestor(void)
{
	__u64 id, found = 0;
	int i;

	for (i = 1; i <= PHASE_DEPTH; i++) {
		id = bpf_get_current_ancestor_cgroup_id(i);
		if (!id)
			break;
		if (bpf_map_lookup_elem(&phase_cgroups, &id))
			found = id;
	}
	return found;
}

/* Whether phases are in force for the tasks of a cgroup. */
static __always_inline int governed(struct found *f, __u64 cgroup)
{
	__u32 place = PHASE_ERROR_CGROUP;
	struct phase_cgroup *c;
	struct phase_slot *s;
	__u64 *lacking, now;

	c = bpf_map_lookup_elem(&phase_cgroups, &cgroup);
	if (!c) {
		lacking = bpf_map_lookup_elem(&phase_errors, &place);
		if (!lacking || !*lacking)
			return 0;
		cgroup = tracked_ancestor();
		c = bpf_map_lookup_elem(&phase_cgroups, &cgroup);
		if (!c)
			return 0;
	}
	f->rules = NULL;
	f->slot = *(volatile __u32 *)&c->slot;
	f->generation = *(volatile __u32 *)&c->generation;
	f->phase = PHASE_SETS;
	/* Deleted meanwhile: the instance is being removed. */
	if (*(volatile __u64 *)&c->cgroup != cgroup)
		return 0;
	s = bpf_map_lookup_elem(&phase_slots, &f->slot);
	if (!s) {
		count_error(PHASE_ERROR_SLOT);
		return 1;
	}
	now = *(volatile __u64 *)&s->now;
	if ((__u32)now != f->generation)
		return 0; /* not in force yet, or no longer */
	f->phase = now >> 32;
	if (f->phase >= PHASE_SETS) {
		count_error(PHASE_ERROR_PHASE);
		return 1;
	}
	f->rules = &s->rules[f->phase];
	return 1;
}

/* For programs that may read the task's fields: cheaper than the helper. */
static __always_inline int governed_task(struct found *f)
{
	struct task_struct *task = (void *)bpf_get_current_task_btf();

	return governed(f, task->cgroups->dfl_cgrp->kn->id);
}

static __always_inline int allows(struct found *f, __u32 what)
{
	return f->rules && f->rules->allow & what;
}

/* Arguments, not memory: 6.1's verifier doesn't see that a branch depends on a
 * number in another frame, and cuts off what is behind it.
 */
static __noinline int count_denial(__u32 slot, __u32 phase, __u32 hook)
{
	struct phase_counts *c = bpf_map_lookup_elem(&phase_denials, &slot);

	if (c && phase < PHASE_SETS && hook < PHASE_HOOKS)
		__sync_fetch_and_add(&c->denied[phase][hook], 1);
	else
		count_error(PHASE_ERROR_COUNT);
	return 0;
}

/* Whether a process is a runtime's that has not executed the program yet. */
static __always_inline int is_entering(struct task_struct *leader)
{
	struct phase_entry *e;
	__u64 id = leader->self_exec_id;

	e = bpf_task_storage_get(&phase_entries, leader, NULL, 0);
	if (!e)
		return 0;
	if (!e->exec_id)
		e->exec_id = id;
	return e->exec_id == id;
}

/* What a hook answers that would deny: the current task may be a runtime's. */
static __noinline int denied(__u32 slot, __u32 phase, __u32 hook)
{
	struct task_struct *task = (void *)bpf_get_current_task_btf();

	if (is_entering(task->group_leader))
		return 0;
	count_denial(slot, phase, hook);
	return -EPERM;
}

static __always_inline int deny(struct found *f, __u32 hook)
{
	return denied(f->slot, f->phase, hook);
}

/* A hook that takes yes or no. */
static __always_inline int by_allow(__u32 what, __u32 hook)
{
	struct found f;

	if (!governed_task(&f) || allows(&f, what))
		return 0;
	return deny(&f, hook);
}

/* Files */

static __always_inline struct mount *mount_of(struct vfsmount *mnt)
{
	return (void *)mnt - bpf_core_field_offset(struct mount, mnt);
}

/* The kernel's own: behind a file that has been judged itself, the layers of an
 * overlay; message queues, where mq_open is the call; and pidfds, which clone
 * and pidfd_open make, and the kernel opens for that. No path leads a task
 * there. Mounts of which that is also said, and that tasks have files of, are
 * memory, pipes and the like (SB_NOUSER).
 */
static __always_inline int is_internal(struct file *file)
{
	struct vfsmount *mnt = BPF_CORE_READ(file, f_path.mnt);
	__u64 ns = (__u64)BPF_CORE_READ(mount_of(mnt), mnt_ns);
	unsigned long magic = BPF_CORE_READ(mnt, mnt_sb, s_magic);

	if (!ns || magic == PID_FS_MAGIC)
		return magic == MQUEUE_MAGIC || magic == PID_FS_MAGIC;
	return ns >= (__u64)-MAX_ERRNO &&
	       !(BPF_CORE_READ(mnt, mnt_sb, s_flags) & SB_NOUSER);
}

/* Whether the file system's names are what they were when the instance began:
 * the task has its mount namespace's root, and the file is in that namespace.
 * bpf_d_path tells a path from the task's root, and of a file that isn't below
 * it, from the top of where it is, in the same form.
 */
static __always_inline int in_own_names(struct found *f, struct file *file)
{
	struct task_struct *task = (void *)bpf_get_current_task_btf();
	struct mnt_namespace *ns = BPF_CORE_READ(task, nsproxy, mnt_ns);
	struct vfsmount *mnt = BPF_CORE_READ(task, fs, root.mnt);
	struct phase_slot *s = bpf_map_lookup_elem(&phase_slots, &f->slot);
	struct vfsmount *of = BPF_CORE_READ(file, f_path.mnt);
	struct mount *m = mount_of(mnt), *parent;
	int i;

	if (!s || (s->mount_ns && s->mount_ns != BPF_CORE_READ(ns, ns.inum)))
		return 0;
	if (BPF_CORE_READ(mount_of(of), mnt_ns) != ns)
		return 0;
	if (BPF_CORE_READ(task, fs, root.dentry) !=
		BPF_CORE_READ(mnt, mnt_root) ||
	    BPF_CORE_READ(m, mnt_ns) != ns)
		return 0;
	/* What is mounted on a root is one, too: so do kernels and
	 * pivot_root(2) leave it.
	 */
	for (i = 0; i < 4; i++) {
		parent = BPF_CORE_READ(m, mnt_parent);
		if (parent == m)
			return 1;
		if (BPF_CORE_READ(m, mnt_mountpoint) !=
		    BPF_CORE_READ(parent, mnt.mnt_root))
			return 0;
		m = parent;
	}
	return 0;
}

static __always_inline struct path_buffer *take_buffer(void)
{
	__u32 at = bpf_get_smp_processor_id() * PHASE_BUFFERS;
	struct path_buffer *b;
	int i;

	for (i = 0; i < PHASE_BUFFERS; i++, at++) {
		b = bpf_map_lookup_elem(&phase_buffers, &at);
		if (b && !__sync_val_compare_and_swap(&b->busy, 0, 1))
			return b;
	}
	count_error(PHASE_ERROR_BUFFER);
	return NULL;
}

/* Whether an opened file is in the trees of all kinds in a set of them. */
static __noinline int in_trees(struct found *f, struct file *file, __u32 kinds)
{
	struct path_buffer *b;
	int ok = 0, i;
	long n;

	if (!f || !file || !in_own_names(f, file))
		return 0;
	b = take_buffer();
	if (!b)
		return 0;
	n = bpf_d_path(&file->f_path, b->path, sizeof(b->path));
	if (n < 2 || n > PHASE_PATH || b->path[0] != '/') {
		count_error(PHASE_ERROR_PATH);
		goto out;
	}
	b->path[(n - 1) & (PHASE_PATH - 1)] = '/';
	if (n > PHASE_TREE)
		n = PHASE_TREE;
	b->bits = 8 * (offsetof(struct tree_key, path) -
		       offsetof(struct tree_key, slot) + n);
	b->slot = f->slot;
	b->generation = f->generation;
	b->phase = f->phase;
	ok = 1;
	for (i = TREE_READ; i <= TREE_WRITE; i++) {
		b->kind = i;
		if (kinds & (1 << i) &&
		    !bpf_map_lookup_elem(&phase_trees, &b->bits))
			ok = 0;
	}
out:
	__sync_val_compare_and_swap(&b->busy, 1, 0);
	return ok;
}

/* Passed by every open, whoever asks for it: open, openat2, creat,
 * open_by_handle_at, io_uring. Not by O_PATH, which opens nothing.
 */
SEC("lsm/file_open")
int BPF_PROG(syslatch_open, struct file *file)
{
	__u32 flags, kinds = 0;
	struct found f;
	int writes;

	if (!governed_task(&f))
		return 0;
	flags = file->f_flags;
	/* execve's own: bprm_check_security decides. No open(2) can have it. */
	if (flags & FMODE_EXEC || is_internal(file))
		return 0;
	writes = flags & (O_ACCMODE | O_CREAT | O_TRUNC);
	if (!allows(&f, writes ? ALLOW_OPEN_WRITE : ALLOW_OPEN_READ))
		goto denied;
	if ((flags & O_ACCMODE) != O_WRONLY)
		kinds = 1 << TREE_READ;
	if (writes)
		kinds |= 1 << TREE_WRITE;
	/* LIMIT_READ_TREES and its neighbour are the bits of the kinds. */
	kinds &= f.rules->limit;
	if (!kinds || in_trees(&f, file, kinds))
		return 0;
denied:
	return deny(&f, HOOK_FILE_OPEN);
}

/* O_CREAT makes the file before file_open sees it. mq_open comes here, too,
 * which is another call's business.
 */
SEC("lsm/inode_create")
int BPF_PROG(syslatch_create, struct inode *dir)
{
	struct found f;

	if (!governed_task(&f) || allows(&f, ALLOW_OPEN_WRITE) ||
	    BPF_CORE_READ(dir, i_sb, s_magic) == MQUEUE_MAGIC)
		return 0;
	return deny(&f, HOOK_INODE_CREATE);
}

/* A regular file that a path leads to: not memory (memfd, System V's), nor
 * what newer kernels call regular within their own mounts.
 */
static __always_inline int is_regular(struct inode *inode)
{
	return (BPF_CORE_READ(inode, i_mode) & S_IFMT) == S_IFREG &&
	       !(BPF_CORE_READ(inode, i_sb, s_flags) & SB_NOUSER);
}

/* Sockets */

/* What stands in front of the address. */
#define DESTINATION_BITS                                                       \
	(8 * (offsetof(struct destination_key, addr) -                         \
	      offsetof(struct destination_key, slot)))

static __noinline int reaches(struct found *f, struct destination_key *k,
			      __u32 port)
{
	struct destination_ports *p;
	int i;

	if (!f || !k)
		return 0;
	k->slot = f->slot;
	k->generation = f->generation;
	k->phase = f->phase;
	p = bpf_map_lookup_elem(&phase_dests, k);
	if (!p)
		return 0;
	if (p->n == PHASE_ANY_PORT)
		return 1;
	for (i = 0; i < PHASE_PORTS; i++) {
		if (i < p->n && port && p->ports[i] == (__u16)port)
			return 1;
	}
	return 0;
}

static __always_inline void set_address4(struct destination_key *k, __u32 addr)
{
	__builtin_memset(k, 0, sizeof(*k));
	k->bits = DESTINATION_BITS + 32;
	k->family = 4;
	k->addr[0] = addr;
}

/* ::ffff:192.0.2.1 is 192.0.2.1. */
static __always_inline void set_address6(struct destination_key *k, __u32 a,
					 __u32 b, __u32 c, __u32 d)
{
	if (!a && !b && c == bpf_htonl(0xffff)) {
		set_address4(k, d);
		return;
	}
	__builtin_memset(k, 0, sizeof(*k));
	k->bits = DESTINATION_BITS + 128;
	k->family = 6;
	k->addr[0] = a;
	k->addr[1] = b;
	k->addr[2] = c;
	k->addr[3] = d;
}

/* A raw socket's port is none, and only a prefix without ports has it. */
static __always_inline __u32 port_of(__u32 protocol, __u32 port)
{
	switch (protocol) {
	case IPPROTO_TCP:
	case IPPROTO_UDP:
	case IPPROTO_UDPLITE:
	case IPPROTO_MPTCP:
		return port;
	}
	return 0;
}

/* What sockaddr_in and sockaddr_in6 begin with. */
struct sockaddr_any {
	__u16 family;
	__u16 port;
	__u32 addr4; /* flow information in the other */
	__u32 addr6[4];
};

/* Whether an address, in the kernel's memory, may be reached by a socket. */
static __noinline int may_reach(struct found *f, struct sock *sk, void *address)
{
	struct destination_key k;
	struct sockaddr_any a;
	__u32 family;

	if (!f || !f->rules)
		return 0;
	family = BPF_CORE_READ(sk, __sk_common.skc_family);
	if (family == AF_UNIX)
		return !!(f->rules->allow & ALLOW_UNIX);
	/* Shorter ones are in the room of the longest, or refused later. */
	if (bpf_probe_read_kernel(&a, sizeof(a), address)) {
		count_error(PHASE_ERROR_ADDRESS);
		return 0;
	}
	/* The kernel takes AF_UNSPEC for what the socket has. */
	if (family == AF_INET || (family == AF_INET6 && a.family == AF_INET))
		set_address4(&k, a.addr4);
	else if (family == AF_INET6)
		set_address6(&k, a.addr6[0], a.addr6[1], a.addr6[2],
			     a.addr6[3]);
	else
		return 0;
	return reaches(f, &k, port_of(BPF_CORE_READ(sk, sk_protocol), a.port));
}

/* Whether what a socket is connected to may be reached. */
static __noinline int may_reach_peer(struct found *f, struct sock *sk)
{
	__u32 port = BPF_CORE_READ(sk, __sk_common.skc_dport);
	struct destination_key k;
	struct in6_addr a6;
	__u32 a4;

	if (BPF_CORE_READ(sk, __sk_common.skc_family) == AF_INET) {
		a4 = BPF_CORE_READ(sk, __sk_common.skc_daddr);
		if (!a4 && !port)
			return 1; /* connected to nothing */
		set_address4(&k, a4);
	} else {
		a6 = BPF_CORE_READ(sk, __sk_common.skc_v6_daddr);
		if (!a6.in6_u.u6_addr32[0] && !a6.in6_u.u6_addr32[1] &&
		    !a6.in6_u.u6_addr32[2] && !a6.in6_u.u6_addr32[3] && !port)
			return 1;
		set_address6(&k, a6.in6_u.u6_addr32[0], a6.in6_u.u6_addr32[1],
			     a6.in6_u.u6_addr32[2], a6.in6_u.u6_addr32[3]);
	}
	return reaches(f, &k, port_of(BPF_CORE_READ(sk, sk_protocol), port));
}

/* SCTP has destinations beside the one it is given. */
static __always_inline int has_hidden_peers(__u32 protocol)
{
	return protocol == IPPROTO_SCTP;
}

/* A socket that was made with its peer, by socketpair(2): a pipe both ways. */
static __always_inline int is_pair(struct sock *sk)
{
	struct unix_sock *u = (void *)sk, *peer;

	if (BPF_CORE_READ(u, addr))
		return 0;
	peer = (void *)BPF_CORE_READ(u, peer);
	return peer && !BPF_CORE_READ(peer, addr);
}

/* A socket that is connected to the instance's own, whose listener is bound
 * there: who may not connect may go on to speak.
 */
static __always_inline int is_own(struct found *f, struct sock *sk)
{
	struct phase_slot *s = bpf_map_lookup_elem(&phase_slots, &f->slot);
	struct unix_sock *u = (void *)sk, *peer;
	struct inode *inode;

	if (!s || !s->own_ino)
		return 0;
	peer = (void *)BPF_CORE_READ(u, peer);
	if (!peer)
		return 0;
	inode = BPF_CORE_READ(peer, path.dentry, d_inode);
	return inode && BPF_CORE_READ(inode, i_ino) == s->own_ino &&
	       BPF_CORE_READ(inode, i_sb, s_dev) == s->own_dev;
}

/* Whether a socket that is there may send, or receive: to the address that is
 * given, and where it is connected.
 */
static __noinline int may_use(struct found *f, struct sock *sk, int sends,
			      void *address)
{
	__u32 family;
	__u64 may;

	if (!f || !f->rules)
		return 0;
	family = BPF_CORE_READ(sk, __sk_common.skc_family);
	if (family == AF_UNIX && !address && (is_pair(sk) || is_own(f, sk)))
		return 1;
	may = sends ? f->rules->send : f->rules->receive;
	if (family > 63 || !(may & (1ULL << family)))
		return 0;
	if (!(f->rules->limit & LIMIT_DESTINATIONS))
		return 1;
	if (family == AF_UNIX)
		return !!(f->rules->allow & ALLOW_UNIX);
	if ((family != AF_INET && family != AF_INET6) ||
	    has_hidden_peers(BPF_CORE_READ(sk, sk_protocol)))
		return 0;
	if (address && !may_reach(f, sk, address))
		return 0;
	return may_reach_peer(f, sk);
}

SEC("lsm/socket_create")
int BPF_PROG(syslatch_socket, int family, int type, int protocol, int kern)
{
	struct found f;

	if (!governed_task(&f) || kern)
		return 0;
	/* The kernel knows none above 63, nor below 0. */
	if (f.rules && (__u32)family < 64 &&
	    f.rules->families & (1ULL << (family & 63)) &&
	    !(f.rules->limit & LIMIT_DESTINATIONS &&
	      (family == AF_INET || family == AF_INET6) &&
	      has_hidden_peers(protocol)))
		return 0;
	return deny(&f, HOOK_SOCKET_CREATE);
}

SEC("lsm/socket_connect")
int BPF_PROG(syslatch_conn, struct socket *sock, struct sockaddr *address)
{
	struct found f;
	__u16 family;

	if (!governed_task(&f))
		return 0;
	if (!allows(&f, ALLOW_CONNECT))
		goto denied;
	if (!(f.rules->limit & LIMIT_DESTINATIONS))
		return 0;
	if (bpf_probe_read_kernel(&family, sizeof(family), address)) {
		count_error(PHASE_ERROR_ADDRESS);
		goto denied;
	}
	/* AF_UNSPEC takes a connection back. */
	if (family == AF_UNSPEC ||
	    (!has_hidden_peers(BPF_CORE_READ(sock, sk, sk_protocol)) &&
	     may_reach(&f, BPF_CORE_READ(sock, sk), address)))
		return 0;
denied:
	return deny(&f, HOOK_SOCKET_CONNECT);
}

/* Passed by send(2) and its kin, by write(2), and by a connect that
 * MSG_FASTOPEN hides in one.
 */
SEC("lsm/socket_sendmsg")
int BPF_PROG(syslatch_send, struct socket *sock, struct msghdr *msg)
{
	struct found f;
	void *address;

	if (!governed_task(&f))
		return 0;
	address = msg->msg_namelen > 0 ? msg->msg_name : NULL;
	if (may_use(&f, BPF_CORE_READ(sock, sk), 1, address))
		return 0;
	return deny(&f, HOOK_SOCKET_SENDMSG);
}

SEC("lsm/socket_recvmsg")
int BPF_PROG(syslatch_recv, struct socket *sock)
{
	struct found f;

	if (!governed_task(&f) || may_use(&f, BPF_CORE_READ(sock, sk), 0, NULL))
		return 0;
	return deny(&f, HOOK_SOCKET_RECVMSG);
}

/* Passed by every read and write, so the next to last thing that is looked at
 * is what kind of file it is. Sockets come here by splice(2) and sendfile(2),
 * which don't pass socket_sendmsg (before 6.5) and socket_recvmsg. Pipes,
 * terminals and other devices are not looked at: the floor is made of them.
 */
SEC("lsm/file_permission")
int BPF_PROG(syslatch_fperm, struct file *file, int mask)
{
	struct inode *inode;
	struct socket *sock;
	struct sock *sk;
	struct found f;

	if (!governed_task(&f))
		return 0;
	inode = file->f_inode;
	switch (inode->i_mode & S_IFMT) {
	case S_IFSOCK:
		sock = BPF_CORE_READ(file, private_data);
		sk = BPF_CORE_READ(sock, sk);
		if ((mask & MAY_WRITE && !may_use(&f, sk, 1, NULL)) ||
		    (mask & MAY_READ && !may_use(&f, sk, 0, NULL)))
			break;
		return 0;
	case S_IFREG:
		if ((!(mask & MAY_WRITE) || allows(&f, ALLOW_FILE_WRITE)) &&
		    (!(mask & MAY_READ) || allows(&f, ALLOW_FILE_READ) ||
		     file->f_flags & FMODE_EXEC))
			return 0;
		if (!is_regular(inode) || is_internal(file))
			return 0;
		break;
	default:
		return 0;
	}
	return deny(&f, HOOK_FILE_PERMISSION);
}

/* A mapping is read and written past every hook. There is no file if the memory
 * is nobody's: then what is read here is 0.
 */
SEC("lsm/mmap_file")
int BPF_PROG(syslatch_mmap, struct file *file, unsigned long reqprot,
	     unsigned long prot, unsigned long flags)
{
	struct found f;
	int shared;

	if (!governed_task(&f))
		return 0;
	if (!is_regular(BPF_CORE_READ(file, f_inode)) || is_internal(file))
		return 0;
	shared = (flags & MAP_TYPE) == MAP_SHARED ||
		 (flags & MAP_TYPE) == MAP_SHARED_VALIDATE;
	if (shared && prot & PROT_WRITE && !allows(&f, ALLOW_FILE_WRITE))
		goto denied;
	if (prot & (PROT_READ | PROT_EXEC) && !allows(&f, ALLOW_FILE_READ) &&
	    !(BPF_CORE_READ(file, f_flags) & FMODE_EXEC))
		goto denied;
	return 0;
denied:
	return deny(&f, HOOK_MMAP_FILE);
}

SEC("lsm/file_mprotect")
int BPF_PROG(syslatch_mprot, struct vm_area_struct *vma, unsigned long reqprot,
	     unsigned long prot)
{
	struct found f;

	if (!governed_task(&f) || allows(&f, ALLOW_FILE_WRITE) ||
	    !(prot & PROT_WRITE) ||
	    !(BPF_CORE_READ(vma, vm_flags) & VM_SHARED) ||
	    !is_regular(BPF_CORE_READ(vma, vm_file, f_inode)))
		return 0;
	return deny(&f, HOOK_FILE_MPROTECT);
}

/* truncate(2), and ftruncate(2) before 6.2. */
SEC("lsm/path_truncate")
int BPF_PROG(syslatch_ptrunc, struct path *path)
{
	struct found f;

	if (!governed_task(&f) || allows(&f, ALLOW_FILE_WRITE) ||
	    !is_regular(BPF_CORE_READ(path, dentry, d_inode)))
		return 0;
	return deny(&f, HOOK_PATH_TRUNCATE);
}

SEC("lsm/file_truncate")
int BPF_PROG(syslatch_ftrunc, struct file *file)
{
	struct found f;

	if (!governed_task(&f) || allows(&f, ALLOW_FILE_WRITE) ||
	    !is_regular(BPF_CORE_READ(file, f_inode)))
		return 0;
	return deny(&f, HOOK_FILE_TRUNCATE);
}

SEC("lsm/bprm_check_security")
int BPF_PROG(syslatch_bprm)
{
	return by_allow(ALLOW_EXEC, HOOK_BPRM_CHECK);
}

SEC("lsm/socket_bind")
int BPF_PROG(syslatch_bind)
{
	return by_allow(ALLOW_BIND, HOOK_SOCKET_BIND);
}

SEC("lsm/socket_listen")
int BPF_PROG(syslatch_listen)
{
	return by_allow(ALLOW_LISTEN, HOOK_SOCKET_LISTEN);
}

SEC("lsm/socket_accept")
int BPF_PROG(syslatch_accept)
{
	return by_allow(ALLOW_ACCEPT, HOOK_SOCKET_ACCEPT);
}

/* Programs of an instance's cgroup: they run for its sockets, and judge by the
 * task that uses one. 1 is yes.
 */
static __always_inline int address_allowed(struct bpf_sock_addr *ctx, int v6,
					   __u32 hook)
{
	struct destination_key k;
	struct found f;

	if (!governed(&f, bpf_get_current_cgroup_id()))
		return 1;
	if (f.rules) {
		if (!(f.rules->limit & LIMIT_DESTINATIONS))
			return 1;
		if (v6)
			set_address6(&k, ctx->user_ip6[0], ctx->user_ip6[1],
				     ctx->user_ip6[2], ctx->user_ip6[3]);
		else
			set_address4(&k, ctx->user_ip4);
		if (reaches(&f, &k, port_of(ctx->protocol, ctx->user_port)))
			return 1;
	}
	count_denial(f.slot, f.phase, hook);
	return 0;
}

SEC("cgroup/connect4")
int syslatch_conn4(struct bpf_sock_addr *ctx)
{
	return address_allowed(ctx, 0, HOOK_CONNECT4);
}

SEC("cgroup/connect6")
int syslatch_conn6(struct bpf_sock_addr *ctx)
{
	return address_allowed(ctx, 1, HOOK_CONNECT6);
}

SEC("cgroup/sendmsg4")
int syslatch_send4(struct bpf_sock_addr *ctx)
{
	return address_allowed(ctx, 0, HOOK_SENDMSG4);
}

SEC("cgroup/sendmsg6")
int syslatch_send6(struct bpf_sock_addr *ctx)
{
	return address_allowed(ctx, 1, HOOK_SENDMSG6);
}

/* Ids of version 1 hierarchies are from number spaces of their own. */
static __always_inline int is_default(struct cgroup *cgrp)
{
	return cgrp->root->hierarchy_id == 0;
}

/* Runs before the new directory can be seen, so before any task is in it. */
SEC("tp_btf/cgroup_mkdir")
int BPF_PROG(syslatch_pmkdir, struct cgroup *cgrp)
{
	struct phase_cgroup child = {}, *parent;
	__u64 id;

	if (!is_default(cgrp))
		return 0;
	id = cgrp->self.parent->cgroup->kn->id;
	parent = bpf_map_lookup_elem(&phase_cgroups, &id);
	if (!parent)
		return 0;
	child.slot = *(volatile __u32 *)&parent->slot;
	child.generation = *(volatile __u32 *)&parent->generation;
	if (*(volatile __u64 *)&parent->cgroup != id)
		return 0;
	child.cgroup = cgrp->kn->id;
	if (bpf_map_update_elem(&phase_cgroups, &child.cgroup, &child, BPF_ANY))
		count_error(PHASE_ERROR_CGROUP);
	return 0;
}

/* An entry that stays is room lost, and no more. */
SEC("tp_btf/cgroup_release")
int BPF_PROG(syslatch_prmdir, struct cgroup *cgrp)
{
	__u64 id;

	if (!is_default(cgrp))
		return 0;
	id = cgrp->kn->id;
	bpf_map_delete_elem(&phase_cgroups, &id);
	return 0;
}

/* Processes that a runtime puts into an instance, of an exec: they open files
 * and use sockets until they execute the program, behind the filter's load. So
 * nothing is denied to a process from when somebody who is in no instance puts
 * it there, nor to what it forks, until an execve under more filters than it
 * came with.
 */

/* Whether a cgroup is of an instance that others' processes enter. */
static __always_inline int is_entered(__u64 id)
{
	struct phase_cgroup *c;
	struct phase_slot *s;
	__u32 slot;

	c = bpf_map_lookup_elem(&phase_cgroups, &id);
	if (!c)
		return 0;
	slot = *(volatile __u32 *)&c->slot;
	s = bpf_map_lookup_elem(&phase_slots, &slot);
	return s && s->entered;
}

/* Whether the current task is in an instance, whether that is in force or not.
 */
static __always_inline int is_member(void)
{
	struct task_struct *task = (void *)bpf_get_current_task_btf();
	__u64 id = task->cgroups->dfl_cgrp->kn->id;

	return bpf_map_lookup_elem(&phase_cgroups, &id) || tracked_ancestor();
}

/* One that there is no room for is denied what the phase denies. */
static __always_inline void enter(struct task_struct *leader)
{
	struct phase_entry e = {};

	e.exec_id = leader->self_exec_id;
	e.filters = leader->seccomp.filter_count.counter;
	bpf_task_storage_get(&phase_entries, leader, &e,
			     BPF_LOCAL_STORAGE_GET_F_CREATE);
}

/* Runs when the task is there already: who enters by itself is a member. */
SEC("tp_btf/cgroup_attach_task")
int BPF_PROG(syslatch_pattach, struct cgroup *cgrp, const char *path,
	     struct task_struct *task)
{
	if (is_default(cgrp) && is_entered(cgrp->kn->id) && !is_member())
		enter(task);
	return 0;
}

/* Runs before the child does. */
SEC("tp_btf/sched_process_fork")
int BPF_PROG(syslatch_pfork, struct task_struct *parent,
	     struct task_struct *child)
{
	struct phase_entry *of, e = {};

	if (child->pid != child->tgid ||
	    !bpf_map_lookup_elem(&phase_cgroups,
				 &(__u64){child->cgroups->dfl_cgrp->kn->id}))
		return 0;
	of =
	    bpf_task_storage_get(&phase_entries, parent->group_leader, NULL, 0);
	if (of && (!of->exec_id || of->exec_id == parent->self_exec_id)) {
		e.exec_id = child->self_exec_id;
		e.filters = of->filters;
		bpf_task_storage_get(&phase_entries, child, &e,
				     BPF_LOCAL_STORAGE_GET_F_CREATE);
	} else if (is_entered(child->cgroups->dfl_cgrp->kn->id) &&
		   !is_member()) {
		enter(child); /* CLONE_INTO_CGROUP */
	}
	return 0;
}

/* Trees are names in the mount namespace of the program. */
static __always_inline void note_names(struct task_struct *task)
{
	__u64 id = task->cgroups->dfl_cgrp->kn->id;
	struct phase_cgroup *c;
	struct phase_slot *s;
	__u32 slot;

	c = bpf_map_lookup_elem(&phase_cgroups, &id);
	if (!c)
		return;
	slot = *(volatile __u32 *)&c->slot;
	s = bpf_map_lookup_elem(&phase_slots, &slot);
	if (s && !s->mount_ns)
		s->mount_ns = BPF_CORE_READ(task, nsproxy, mnt_ns, ns.inum);
}

/* Runs when the execve can't fail any more, before the new program does. */
SEC("tp_btf/sched_process_exec")
int BPF_PROG(syslatch_pexec, struct task_struct *task)
{
	struct phase_entry *e;

	e = bpf_task_storage_get(&phase_entries, task, NULL, 0);
	if (!e)
		return 0;
	if ((__u32)task->seccomp.filter_count.counter <= e->filters &&
	    (!e->exec_id || e->exec_id + 1 == task->self_exec_id)) {
		e->exec_id = task->self_exec_id;
		return 0;
	}
	if (e->starts)
		note_names(task);
	e->exec_id = ~0ULL;
	bpf_task_storage_delete(&phase_entries, task);
	return 0;
}

/* The kernel gives the helpers used here to no other licence. */
char _license[] SEC("license") = "GPL";
