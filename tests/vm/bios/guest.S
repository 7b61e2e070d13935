# A guest of 512 bytes: print a marker, copy the context disk onto the scratch disk, say "exit 0", power off.
#
#   as --32 guest.S -o guest.o && ld -m elf_i386 -Ttext 0x7c00 --oformat binary guest.o -o guest.bin && xxd -p guest.bin > guest.hex
#
# The byte before the signature says what it does (see disk.py):
#   0 the above   1 never ends   2 prints 240,000 bytes first   3 reads sector `far` of the boot disk first
#   4 sleeps `nap` ticks of the timer (18.2 a second) first
        .code16
        .globl _start
_start: ljmp $0, $1f
1:      xor %ax, %ax
        mov %ax, %ds
        mov %ax, %es
        mov %ax, %ss
        mov $0x7c00, %sp
        cld
        sti
        mov $0x3f8, %dx
        mov $marker, %si
        call print

        mov mode, %al
        cmp $1, %al
        je  forever
        cmp $2, %al
        je  flood
        cmp $3, %al
        je  read_far
        cmp $4, %al
        jne copy
        mov nap, %cx
1:      hlt
        loop 1b

copy:   movw $1, count                  # the primary volume descriptor: 2048-byte block 16
        movl $64, lba
        mov $0x4281, %bx
        call disk
        mov $0x1000, %ax
        mov %ax, %es
        mov %es:80, %eax                # volume size in 2048-byte blocks, little endian
        shl $2, %eax
        mov %eax, left
        movl $0, lba

next:   mov left, %eax
        test %eax, %eax
        jz  done
        cmp $64, %eax
        jb  1f
        mov $64, %eax
1:      mov %ax, count
        mov $0x4281, %bx
        call disk
        mov $0x4382, %bx
        call disk
        movzwl count, %eax
        add %eax, lba
        sub %eax, left
        jmp next

done:   mov $0x2f8, %dx
        mov $exit, %si
        call print
off:    mov $0x604, %dx                 # PIIX4 PM1a control: S5, sleep enable
        mov $0x2000, %ax
        out %ax, %dx
forever:
        hlt
        jmp forever

flood:  mov $0x3f8, %dx
        mov $4000, %bx
1:      mov $line, %si
        call print
        dec %bx
        jnz 1b
        jmp copy

read_far:
        movw $1, count
        mov far, %eax
        mov %eax, lba
        mov $0x4280, %bx
        call disk
        mov $0x1000, %ax
        mov %ax, %ds
        xor %si, %si
        mov $0x3f8, %dx
        call print
        xor %ax, %ax
        mov %ax, %ds
        jmp copy

# int 13h extensions: function in %bh, drive in %bl, `count` sectors at `lba`, at 0x1000:0
disk:   mov %bh, %ah
        xor %al, %al
        mov %bl, %dl
        mov $packet, %si
        int $0x13
        jnc 1f
        mov $0x3f8, %dx
        mov $failed, %si
        call print
        jmp off
1:      ret

# the zero-terminated text at %ds:%si, to the port at %dx
print:  add $5, %dx
2:      in  %dx, %al
        test $0x20, %al
        jz  2b
        sub $5, %dx
        lodsb
        test %al, %al
        jz  3f
        out %al, %dx
        jmp print
3:      ret

marker: .asciz "BIOS-GUEST-BOOTED\r\n"
line:   .asciz "all work and no play makes jack a dull boy, said the guest\r\n"
failed: .asciz "disk error\r\n"
        .balign 4
packet: .byte 16, 0
count:  .word 0
        .word 0, 0x1000
lba:    .long 0, 0
left:   .long 0
        .org 492
nap:    .word 1
far:    .long 1
exit:   .asciz "exit 0\n"
        .org 509
mode:   .byte 0
        .word 0xaa55
