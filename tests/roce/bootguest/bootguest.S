/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A guest in one boot sector: it writes and verifies memory, over and over, and reports on the first
 * serial port. It is for migrations of a stock QEMU where even a small Linux would take too long.
 *
 * The value of each word of its area is (round + 1) * STEP ^ address, with the last round that wrote
 * it. Each round compares all words with the last round's value and writes its own. The area begins
 * at 1 MiB. It prints
 *	B	before the first round
 *	.	after each round in which all words were right
 *	BAD AAAAAAAA FFFFFFFF WWWWWWWW
 *		address, value found and value wanted of a wrong word; then it stops for good
 * Two words at the end of the sector can be patched: the size of the area in bytes, and the number
 * of I/O port accesses (about 1 us each on real hardware) between two pages, to dirty less.
 */
#define BASE 0x100000
#define STEP 0x9e3779b9
#define COM1 0x3f8

	.code16
	.globl _start
_start:
	cli
	cld
	xorw %ax, %ax
	movw %ax, %ds
	inb $0x92, %al /* the A20 gate */
	orb $2, %al
	outb %al, $0x92
	lgdt gdt_pointer
	movl %cr0, %eax
	orb $1, %al
	movl %eax, %cr0
	ljmp $8, $flat

	.code32
flat:
	movw $16, %ax
	movw %ax, %ds
	movw %ax, %es
	movw %ax, %ss
	movl $0x7000, %esp
	movb $'B', %al
	call put
	xorl %ebx, %ebx /* what the last round has added; 0: there was none */

round:
	leal STEP(%ebx), %ebp
	movl $BASE, %edi
	movl area, %ecx
	addl %edi, %ecx
word:
	testl %ebx, %ebx
	jz write
	movl %ebx, %eax
	xorl %edi, %eax
	cmpl %eax, (%edi)
	jne bad
write:
	movl %ebp, %eax
	xorl %edi, %eax
	stosl
	testl $0xfff, %edi
	jnz next
	movl pause, %edx
rest:
	subl $1, %edx
	jc next
	inb $0x80, %al
	jmp rest
next:
	cmpl %ecx, %edi
	jb word
	movl %ebp, %ebx
	movb $'.', %al
	call put
	jmp round

/* %eax: what the word at %edi should be */
bad:
	movl (%edi), %ebp
	movl %eax, %ebx
	movl $text, %esi
say:
	lodsb
	testb %al, %al
	jz said
	call put
	jmp say
said:
	movl %edi, %esi
	call hex
	movl %ebp, %esi
	call hex
	movl %ebx, %esi
	call hex
	movb $'\n', %al
	call put
stop:
	hlt
	jmp stop

/* Prints %esi. */
hex:
	movl $8, %ecx
digit:
	roll $4, %esi
	movl %esi, %eax
	andb $15, %al
	cmpb $10, %al
	sbbb $0x69, %al
	das
	call put
	loop digit
	movb $' ', %al

/* Prints %al when the port has room for it; changes %edx. */
put:
	movb %al, %ah
	movw $(COM1 + 5), %dx
busy:
	inb %dx, %al
	testb $0x20, %al
	jz busy
	movb %ah, %al
	movw $COM1, %dx
	outb %al, %dx
	ret

text:
	.asciz "\nBAD "
	.balign 8
gdt:
	.quad 0
	.quad 0x00cf9b000000ffff /* code, 4 GiB from 0 */
	.quad 0x00cf93000000ffff /* data, the same */
gdt_pointer:
	.word gdt_pointer - gdt - 1
	.long gdt

	.org 502
area:
	.long AREA
pause:
	.long PAUSE
	.word 0xaa55
