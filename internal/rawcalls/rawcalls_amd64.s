// SPDX-License-Identifier: Apache-2.0

#include "textflag.h"

// func run(first *Call, n int)
// NOSPLIT: a stack check could enter the scheduler, which makes calls.
TEXT ·run(SB), NOSPLIT, $0-16
	MOVQ first+0(FP), R12
	MOVQ n+8(FP), R13
next:
	MOVQ 64(R12), R15
again:
	CMPQ 56(R12), $0
	JNE  gate32
	MOVQ 8(R12), DI
	MOVQ 16(R12), SI
	MOVQ 24(R12), DX
	MOVQ 32(R12), R10
	MOVQ 40(R12), R8
	MOVQ 48(R12), R9
	MOVQ 0(R12), AX
	SYSCALL
	JMP  done
gate32:
	MOVQ 8(R12), BX
	MOVQ 16(R12), CX
	MOVQ 24(R12), DX
	MOVQ 32(R12), SI
	MOVQ 40(R12), DI
	MOVQ 0(R12), AX
	INT  $0x80
done:
	MOVQ AX, 72(R12)
	DECQ R15
	JG   again
	ADDQ $80, R12
	DECQ R13
	JNZ  next
	RET
