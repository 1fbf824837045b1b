/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Layouts shared by the programs of phases and, through bpf2go, by the Go
 * loader. A change of any of them needs a new PHASE_LAYOUT: pins outlive the
 * program that made them.
 */
#ifndef SYSLATCH_PHASES_H
#define SYSLATCH_PHASES_H

enum phase_layout { PHASE_LAYOUT = 2 };

#define PHASE_SETS 8
#define PHASE_HOOKS 24
#define PHASE_PORTS 16 /* of one prefix */
#define PHASE_DEPTH                                                            \
	32 /* levels of cgroups at which an instance is looked for */
#define PHASE_TREE 246	/* bytes of a tree, with the '/' behind it */
#define PHASE_BUFFERS 4 /* of each processor */
#define PHASE_PATH 4096 /* bytes of an opened file's path, with its NUL */
#define PHASE_ANY_PORT (~0U)

/* What a phase may do; bits of phase_rules.allow. */
enum phase_allow {
	ALLOW_OPEN_READ = 1 << 0,
	ALLOW_OPEN_WRITE = 1 << 1,
	ALLOW_FILE_READ = 1 << 2, /* of files that are open */
	ALLOW_FILE_WRITE = 1 << 3,
	ALLOW_EXEC = 1 << 4,
	ALLOW_CONNECT = 1 << 5,
	ALLOW_BIND = 1 << 6,
	ALLOW_LISTEN = 1 << 7,
	ALLOW_ACCEPT = 1 << 8,
	ALLOW_UNIX = 1 << 9, /* as a destination */
};

/* What is looked at beside; bits of phase_rules.limit. */
enum phase_limit {
	LIMIT_READ_TREES = 1 << 0,
	LIMIT_WRITE_TREES = 1 << 1,
	LIMIT_DESTINATIONS = 1 << 2,
};

/* Where something is denied. */
enum phase_hook {
	HOOK_FILE_OPEN,
	HOOK_INODE_CREATE,
	HOOK_FILE_PERMISSION,
	HOOK_MMAP_FILE,
	HOOK_FILE_MPROTECT,
	HOOK_PATH_TRUNCATE,
	HOOK_FILE_TRUNCATE,
	HOOK_BPRM_CHECK,
	HOOK_SOCKET_CREATE,
	HOOK_SOCKET_CONNECT,
	HOOK_SOCKET_BIND,
	HOOK_SOCKET_LISTEN,
	HOOK_SOCKET_ACCEPT,
	HOOK_SOCKET_SENDMSG,
	HOOK_SOCKET_RECVMSG,
	HOOK_CONNECT4,
	HOOK_CONNECT6,
	HOOK_SENDMSG4,
	HOOK_SENDMSG6,
	HOOKS
};

/* Helpers and lookups that can fail, over all instances and for good. All but
 * the last two deny what was asked.
 */
enum phase_error {
	PHASE_ERROR_SLOT,    /* a tracked cgroup's slot is not there */
	PHASE_ERROR_PHASE,   /* a slot's phase is none */
	PHASE_ERROR_BUFFER,  /* no buffer for a path */
	PHASE_ERROR_PATH,    /* a path could not be told, or is too long */
	PHASE_ERROR_ADDRESS, /* an address could not be read */
	PHASE_ERROR_CGROUP,  /* no room for a child: ancestors are looked at */
	PHASE_ERROR_COUNT,   /* a denial could not be counted */
	PHASE_ERRORS
};

enum phase_state { PHASE_FREE, PHASE_SETUP, PHASE_ACTIVE };

enum tree_kind { TREE_READ, TREE_WRITE };

/* Value of phase_cgroups. The id stands first, and is checked last: see struct
 * tracked in syslatch.h.
 */
struct phase_cgroup {
	__u64 cgroup;
	__u32 slot;
	__u32 generation;
};

struct phase_rules {
	__u32 allow;
	__u32 limit;
	__u64 families; /* of sockets that may be made, a bit for each */
	__u64 send;	/* of sockets that may send */
	__u64 receive;
};

/* Value of phase_slots, mapped by user space, which alone writes it, but for
 * mount_ns when the program starts.
 */
struct phase_slot {
	__u64 now; /* phase << 32 | generation while in force, else 0 */
	__u64 cgroup;
	__u64 tag; /* its owner's */
	__u32 state;
	__u32 generation;
	__u32 needs;	/* hooks whose programs it needs, a bit for each */
	__u32 mount_ns; /* in which trees mean something; 0: the task's own */
	__u32 known;	/* phases that have rules, a bit for each */
	__u32 entered;	/* by others' processes: see phase_entry */
	__u32 own_dev;	/* of the socket that every phase may speak to, */
	__u64 own_ino;	/* and its inode; 0: there is none */
	struct phase_rules rules[PHASE_SETS];
};

/* Value of phase_entries, a process's: a runtime's that is in an instance until
 * it executes the program, to which nothing is denied. It holds while the
 * leader has that exec_id, so that it ends with an execve whatever else fails.
 */
struct phase_entry {
	__u64 exec_id; /* 0: that of the first look */
	__u32 filters; /* an execve under no more of them goes on with it */
	__u32
	    starts; /* becomes the instance's program, in its mount namespace */
};

/* Value of phase_denials. */
struct phase_counts {
	__u64 denied[PHASE_SETS][PHASE_HOOKS];
};

/* Key of phase_trees: a path with a '/' behind it. */
struct tree_key {
	__u32 bits;
	__u32 slot;
	__u32 generation;
	__u8 phase;
	__u8 kind;
	char path[PHASE_TREE];
};

/* Key of phase_destinations. A version 4 address has the first four bytes. */
struct destination_key {
	__u32 bits;
	__u32 slot;
	__u32 generation;
	__u8 phase;
	__u8 family; /* 4 or 6 */
	__u8 pad[2];
	__u32 addr[4]; /* network byte order */
};

struct destination_ports {
	__u32 n;		  /* or PHASE_ANY_PORT */
	__u16 ports[PHASE_PORTS]; /* network byte order */
};

/* Value of phase_buffers: a path, behind what makes it a tree_key. */
struct path_buffer {
	__u32 busy;
	__u32 bits;
	__u32 slot;
	__u32 generation;
	__u8 phase;
	__u8 kind;
	char path[PHASE_PATH];
	__u8 pad[2];
};

#endif
