"""Build the tiny disk: kernel, busybox and the guest kit, all in an initramfs.

Some 20 MB; boots, runs a job and powers off in about 5 s without KVM.  The root lies in
memory, so nothing ever writes to the disk it booted from.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from p2pgrid.errors import Misconfigured
from p2pgrid.vm import distribution, kit
from p2pgrid.vm.boot_disk import EPOCH, MIB, Extents, mke2fs, write_disk
from p2pgrid.vm.initramfs import Entry, cpio, folder, link, load_order, program

MODULES = (
    *("virtio_pci", "virtio_blk", "virtio_scsi", "virtio_rng", "virtio_balloon"),
    *("ata_piix", "ahci", "sd_mod", "sr_mod"),
    *("isofs", "ext4", "crc32c_generic", "nls_utf8"),
    *("virtio_net", "af_packet"),
)
CMDLINE = "console=tty0 console=ttyS0,115200 panic=1 quiet"
"""After a panic the machine restarts, which a node takes for its end."""


def build(work: Path, tell: Callable[[str], None]) -> tuple[int, Extents]:
    """Make `work`/disk.raw, in seconds; tell each step.  Raises `Misconfigured`."""
    distribution.need(("apt-get", "apt"), ("dpkg-deb", "dpkg"), ("mke2fs", "e2fsprogs"))
    tell("download kernel, busybox and GRUB")
    tree = work / "packages"
    names = [*distribution.kernel_packages(), "busybox-static", *distribution.grub_packages()]
    distribution.unpack(names, tree)
    tell("pack kernel and initramfs")
    kernels = sorted(tree.glob("boot/vmlinuz-*"))
    if len(kernels) != 1:
        raise Misconfigured(why=f"the kernel's package holds {len(kernels)} kernels")
    files = {"vmlinuz": kernels[0].read_bytes()}
    files["initrd"] = initramfs(tree, kernels[0].name.removeprefix("vmlinuz-"))
    tell("make the file system")
    root = work / "root"
    root.mkdir()
    for name, data in files.items():
        (root / name).write_bytes(data)
        os.utime(root / name, (int(EPOCH), int(EPOCH)))
    os.utime(root, (int(EPOCH), int(EPOCH)))
    room = sum(len(data) for data in files.values())
    size = -(-(room + room // 20 + MIB) // MIB) * MIB
    clock = {"E2FSPROGS_FAKE_TIME": EPOCH, "SOURCE_DATE_EPOCH": EPOCH}
    distribution.run(mke2fs(work / "partition", root, size, "P2PTINY", "ext2"), env=clock)
    tell("put the boot loader on it")
    config = f"linux /vmlinuz {CMDLINE}\ninitrd /initrd\nboot\n"
    return write_disk(work / "disk.raw", tree, config, work / "partition")


def initramfs(tree: Path, release: str) -> bytes:
    """Busybox, the kit and the drivers, from packages unpacked in `tree`.

    Not compressed: a chunk is compressed as it travels, and a guest without KVM inflates slowly.
    """
    modules = load_order(next(tree.glob(f"**/lib/modules/{release}")), MODULES)
    order = "".join(f"{name}.ko\n" for name in modules)
    busybox = next(path for path in (tree / "bin/busybox", tree / "usr/bin/busybox") if path.exists())
    folders = ("bin", "sbin", "dev", "proc", "sys", "tmp", "run", "root", "etc", "lib", "lib/modules")
    return cpio(
        (
            *(folder(name) for name in (*folders, "mnt", "usr", "var")),
            *(link(f"usr/{name}", f"../{name}") for name in ("bin", "sbin", "lib")),
            link("var/run", "../run"),
            Entry("dev/console", 0o020600, device=(5, 1)),
            program("bin/busybox", busybox.read_bytes()),
            link("bin/sh", "busybox"),
            program("init", kit.read("tiny-init")),
            program("sbin/p2pgrid-context", kit.read("p2pgrid-context")),
            program("sbin/p2pgrid-dhcp", kit.read("p2pgrid-dhcp")),
            Entry("etc/passwd", 0o100644, b"root:x:0:0:root:/root:/bin/sh\n"),
            Entry("etc/group", 0o100644, b"root:x:0:\n"),
            Entry("lib/modules/order", 0o100644, order.encode()),
            *(Entry(f"lib/modules/{name}.ko", 0o100644, data) for name, data in modules.items()),
        )
    )
