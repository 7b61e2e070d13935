# Does the accelerator work?  Real mode -> long mode with paging -> a million stores and loads -> rc 99.
#
#   as --64 probe.S -o probe.o && ld -m elf_x86_64 -Ttext 0x7c00 --oformat binary probe.o -o probe.bin && xxd -p probe.bin
#
# isa-debug-exit at 0xf4: QEMU ends with (value << 1) | 1.
        .code16
        .globl _start
_start: ljmp $0, $1f
1:      cli
        xor %ax, %ax
        mov %ax, %ds
        mov %ax, %es
        mov %ax, %ss
        mov $0x7c00, %sp
        cld
        in  $0x92, %al                  # A20
        or  $2, %al
        out %al, $0x92
        mov $0x1000, %di                # page tables at 0x1000: PML4, PDPT, PD (2 MiB pages)
        xor %eax, %eax
        mov $0xc00, %cx
        rep stosl
        movl $0x2003, 0x1000
        movl $0x3003, 0x2000
        movl $0x000083, 0x3000
        movl $0x200083, 0x3008
        mov $0x1000, %eax
        mov %eax, %cr3
        mov %cr4, %eax
        or  $0x20, %eax                 # PAE
        mov %eax, %cr4
        mov $0xc0000080, %ecx           # EFER.LME
        rdmsr
        or  $0x100, %eax
        wrmsr
        mov %cr0, %eax
        or  $0x80000001, %eax           # PG | PE
        mov %eax, %cr0
        lgdt gdtr
        ljmp $8, $long
        .code64
long:   mov $16, %ax
        mov %ax, %ds
        mov %ax, %es
        mov %ax, %ss
        mov $4, %ebp
again:  mov $0x200000, %edi
        mov $0x40000, %ecx
        mov %rbp, %rax
        rep stosq
        mov $0x200000, %esi
        mov $0x40000, %ecx
        xor %ebx, %ebx
1:      lodsq
        add %rax, %rbx
        dec %ecx
        jnz 1b
        mov %rbp, %rax
        shl $18, %rax
        cmp %rax, %rbx
        jne 2f
        dec %ebp
        jnz again
        mov $49, %al
        jmp 3f
2:      mov $1, %al
3:      out %al, $0xf4
        hlt
        jmp 3b
        .balign 8
gdt:    .quad 0
        .quad 0x00209a0000000000        # code, 64-bit
        .quad 0x0000920000000000        # data
gdtr:   .word 23
        .long gdt
        .org 510
        .word 0xaa55
