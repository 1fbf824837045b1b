/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* The kernel types that the programs of phases read, relocated by CO-RE: only
 * the fields named here. kernel.h has those of the recorder.
 */
#ifndef SYSLATCH_PHASEKERNEL_H
#define SYSLATCH_PHASEKERNEL_H

#pragma clang attribute push(__attribute__((preserve_access_index)),           \
			     apply_to = record)

struct kernfs_node {
	__u64 id;
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

struct super_block {
	__u32 s_dev;
	unsigned long s_flags;
	unsigned long s_magic;
};

struct inode {
	unsigned short i_mode;
	struct super_block *i_sb;
	unsigned long i_ino;
};

struct dentry {
	struct inode *d_inode;
};

struct vfsmount {
	struct dentry *mnt_root;
	struct super_block *mnt_sb;
};

struct ns_common {
	unsigned int inum;
};

struct mnt_namespace {
	struct ns_common ns;
};

struct mount {
	struct mount *mnt_parent;
	struct dentry *mnt_mountpoint;
	struct vfsmount mnt;
	struct mnt_namespace *mnt_ns;
};

struct path {
	struct vfsmount *mnt;
	struct dentry *dentry;
};

struct file {
	struct path f_path;
	struct inode *f_inode;
	unsigned int f_flags;
	void *private_data;
};

struct fs_struct {
	struct path root;
};

struct nsproxy {
	struct mnt_namespace *mnt_ns;
};

typedef struct {
	int counter;
} atomic_t;

struct seccomp {
	atomic_t filter_count;
};

struct task_struct {
	int pid;
	int tgid;
	struct task_struct *group_leader;
	__u64 self_exec_id;
	struct seccomp seccomp;
	struct css_set *cgroups;
	struct fs_struct *fs;
	struct nsproxy *nsproxy;
};

struct vm_area_struct {
	unsigned long vm_flags;
	struct file *vm_file;
};

struct in6_addr {
	union {
		__u8 u6_addr8[16];
		__u32 u6_addr32[4];
	} in6_u;
};

struct sock_common {
	__u32 skc_daddr;
	__u16 skc_dport; /* network byte order */
	unsigned short skc_family;
	struct in6_addr skc_v6_daddr;
};

struct sock {
	struct sock_common __sk_common;
	__u16 sk_protocol;
};

struct unix_address;

struct unix_sock {
	struct unix_address *addr;
	struct path path;
	struct sock *peer;
};

struct socket {
	struct sock *sk;
};

struct msghdr {
	void *msg_name;
	int msg_namelen;
};

struct linux_binprm;
struct sockaddr;

#pragma clang attribute pop

/* Numbers of the kernel's that are no part of its interface, or of headers that
 * define the types above.
 */
#define FMODE_EXEC 0x20		/* include/linux/fs.h: an open for execve */
#define SB_NOUSER (1UL << 31)	/* include/linux/fs.h: no path leads there */
#define MQUEUE_MAGIC 0x19800202 /* ipc/mqueue.c */
#define PID_FS_MAGIC 0x50494446 /* include/uapi/linux/magic.h, since 6.9 */
#define MAX_ERRNO 4095		/* include/linux/err.h */
#define VM_SHARED 0x8		/* include/linux/mm.h */
#define MAY_WRITE 0x2
#define MAY_READ 0x4

#define S_IFMT 0170000
#define S_IFSOCK 0140000
#define S_IFREG 0100000

#define O_ACCMODE 03
#define O_WRONLY 01
#define O_CREAT 0100
#define O_TRUNC 01000

#define PROT_READ 0x1
#define PROT_WRITE 0x2
#define PROT_EXEC 0x4
#define MAP_SHARED 0x1
#define MAP_SHARED_VALIDATE 0x3
#define MAP_TYPE 0xf

#define AF_UNSPEC 0
#define AF_UNIX 1
#define AF_INET 2
#define AF_INET6 10

#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define IPPROTO_SCTP 132
#define IPPROTO_UDPLITE 136
#define IPPROTO_MPTCP 262

#define EPERM 1

#endif
