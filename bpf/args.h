/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* The arguments whose values are kept. Numbers are those of
 * arch/x86/entry/syscalls/syscall_{64,32}.tbl.
 *
 * clone3 and openat2 pass theirs in memory, as does i386's old mmap: not read,
 * for memory can change between this look and the kernel's.
 */
#ifndef SYSLATCH_ARGS_H
#define SYSLATCH_ARGS_H

#define M_INT 0xffffffffULL
#define M_LONG (~0ULL)
/* O_ACCMODE | O_CREAT | O_TRUNC | O_APPEND | __O_TMPFILE */
#define M_OPEN 020003103ULL
#define M_SOCK_TYPE 0xfULL
/* MAP_TYPE | MAP_FIXED | MAP_ANONYMOUS */
#define M_MMAP 0x3fULL
/* The version is in the upper half of ipc's first argument. */
#define M_IPC 0xffffULL

/* ROW: a call of all ABIs (x86_64, i386, x32). ROW32: of i386 alone. NEXT: a
 * further argument of the call in the line above.
 */
#define ARG_TABLE(ROW, ROW32, NEXT)                                            \
	ROW(socket_domain, 41, 359, 41, 0, M_INT, 1)                           \
	NEXT(socket_type, 41, 359, 41, 1, M_SOCK_TYPE)                         \
	ROW(socketpair_domain, 53, 360, 53, 0, M_INT, 1)                       \
	NEXT(socketpair_type, 53, 360, 53, 1, M_SOCK_TYPE)                     \
	ROW(clone_flags, 56, 120, 56, 0, M_LONG, 0)                            \
	ROW(unshare_flags, 272, 310, 272, 0, M_LONG, 0)                        \
	ROW(setns_type, 308, 346, 308, 1, M_INT, 0)                            \
	ROW(ioctl_cmd, 16, 54, 514, 1, M_INT, 0)                               \
	ROW(prctl_option, 157, 172, 157, 0, M_INT, 0)                          \
	ROW(fcntl_cmd, 72, 55, 72, 1, M_INT, 0)                                \
	ROW(personality, 135, 136, 135, 0, M_INT, 0)                           \
	ROW(open_flags, 2, 5, 2, 1, M_OPEN, 0)                                 \
	ROW(openat_flags, 257, 295, 257, 2, M_OPEN, 0)                         \
	ROW(mmap_prot, 9, 192, 9, 2, M_LONG, 1)                                \
	NEXT(mmap_flags, 9, 192, 9, 3, M_MMAP)                                 \
	ROW(mprotect_prot, 10, 125, 10, 2, M_LONG, 0)                          \
	ROW(pkey_mprotect_prot, 329, 380, 329, 2, M_LONG, 0)                   \
	ROW(mount_flags, 165, 21, 165, 3, M_LONG, 0)                           \
	ROW(ptrace_request, 101, 26, 521, 0, M_LONG, 0)                        \
	ROW(keyctl_op, 250, 288, 250, 0, M_INT, 0)                             \
	ROW(bpf_cmd, 321, 357, 321, 0, M_INT, 0)                               \
	ROW(madvise_advice, 28, 219, 28, 2, M_INT, 0)                          \
	ROW(setsockopt_level, 54, 366, 541, 1, M_INT, 1)                       \
	NEXT(setsockopt_optname, 54, 366, 541, 2, M_INT)                       \
	ROW(seccomp_op, 317, 354, 317, 0, M_INT, 0)                            \
	ROW32(socketcall_call, 102, 0, M_INT)                                  \
	ROW32(ipc_call, 117, 0, M_IPC)                                         \
	ROW32(fcntl64_cmd, 221, 1, M_INT)

#define SKIP(...)

#define ROW_NAME(name, ...) ROW_##name,
enum arg_row_index { ROW_NONE, ARG_TABLE(ROW_NAME, ROW_NAME, ROW_NAME) ROWS };
_Static_assert(ROWS <= ARG_ROWS, "more rows than arg_counts holds");

#define ROW_ALL(name, x64, i386, x32, arg_, mask_, more_)                      \
	[ROW_##name] = {{x64, i386, x32, NO_CALL}, arg_, more_, {}, mask_},
#define ROW_I386(name, i386, arg_, mask_)                                      \
	[ROW_##name] = {{NO_CALL, i386, NO_CALL, NO_CALL}, arg_, 0, {}, mask_},
#define ROW_NEXT(name, x64, i386, x32, arg_, mask_)                            \
	ROW_ALL(name, x64, i386, x32, arg_, mask_, 0)

/* A section, and so a map, of its own: it is pinned with the records, whose
 * reader must name rows as the programs did that wrote them.
 */
const struct arg_row arg_rows[ARG_ROWS] SEC(".rodata.args") = {
    ARG_TABLE(ROW_ALL, ROW_I386, ROW_NEXT)};

/* First row of a call, 0 for the many that have none: the flag that every
 * tracked call tests.
 */
#define FIRST_X86_64(name, x64, ...) [x64] = ROW_##name,
#define FIRST_I386(name, x64, i386, ...) [i386] = ROW_##name,
#define FIRST_X32(name, x64, i386, x32, ...) [x32] = ROW_##name,
#define FIRST_ONLY(name, i386, ...) [i386] = ROW_##name,
const __u8 first_rows[ABIS][CALLS] = {
    [ABI_X86_64] = {ARG_TABLE(FIRST_X86_64, SKIP, SKIP)},
    [ABI_I386] = {ARG_TABLE(FIRST_I386, FIRST_ONLY, SKIP)},
    [ABI_X32] = {ARG_TABLE(FIRST_X32, SKIP, SKIP)},
};

#endif
