// SPDX-License-Identifier: Apache-2.0

/* Command compat is a 32-bit program: it calls through the gate that the kernel
 * offers such programs (sysenter or syscall, behind AT_SYSINFO) and through
 * int $0x80, from a child too, and then executes its arguments, which may be a
 * 64-bit program.
 *
 * Free of any library, so that no 32-bit one need be installed:
 *	gcc -m32 -O1 -ffreestanding -fno-pic -no-pie -nostdlib -static -o compat
 *compat.c
 */

enum { AT_SYSINFO = 32 };

/* arch/x86/entry/syscalls/syscall_32.tbl */
enum {
	NR_exit = 1,
	NR_fork = 2,
	NR_waitpid = 7,
	NR_execve = 11,
	NR_getppid = 64,
	NR_getpgrp = 65,
	NR_getgid32 = 200,
	NR_exit_group = 252,
};

static void *gate;

static long fast(long nr, long a, long b, long c)
{
	long ret;

	__asm__ volatile("call *%5"
			 : "=a"(ret)
			 : "0"(nr), "b"(a), "c"(b), "d"(c), "m"(gate)
			 : "memory");
	return ret;
}

static long int80(long nr, long a, long b, long c)
{
	long ret;

	__asm__ volatile("int $0x80"
			 : "=a"(ret)
			 : "0"(nr), "b"(a), "c"(b), "d"(c)
			 : "memory");
	return ret;
}

__attribute__((used)) void run(long *sp)
{
	long argc = sp[0], pid;
	char **argv = (char **)(sp + 1), **envp = argv + argc + 1;
	long *aux;

	for (aux = (long *)envp; *aux; aux++)
		;
	for (aux++; *aux; aux += 2)
		if (*aux == AT_SYSINFO)
			gate = (void *)aux[1];
	if (!gate)
		int80(NR_exit_group, 3, 0, 0);
	fast(NR_getppid, 0, 0, 0);
	int80(NR_getgid32, 0, 0, 0);
	pid = fast(NR_fork, 0, 0, 0);
	if (!pid) {
		fast(NR_getpgrp, 0, 0, 0);
		int80(NR_exit, 0, 0, 0);
	}
	if (fast(NR_waitpid, pid, 0, 0) != pid)
		fast(NR_exit_group, 1, 0, 0);
	if (argc > 1)
		fast(NR_execve, (long)argv[1], (long)(argv + 1), (long)envp);
	fast(NR_exit_group, argc > 1, 0, 0);
}

__asm__(".globl _start\n"
	"_start:	mov %esp, %eax\n"
	"	push %eax\n"
	"	call run\n");
