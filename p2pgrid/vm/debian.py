"""Build a realistic disk: the distribution at hand with systemd, python3 and the guest kit.

mmdebstrap makes the tree from the machine's own package sources, as root and in a mount
namespace, and a last hook of it makes the file system, while the tree is there.  Drivers
in the initramfs are listed: it loads faster so.
"""

from __future__ import annotations

import io
import os
import shlex
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

from p2pgrid.errors import Misconfigured
from p2pgrid.vm import distribution, kit
from p2pgrid.vm.boot_disk import Extents, mke2fs, write_disk

PACKAGES = (
    *("systemd-sysv", "udev", "dbus", "kmod", "initramfs-tools", "zstd", "python3", "e2fsprogs"),
    "busybox",  # whose udhcpc asks for an address where the job has a LAN
)
CMDLINE = "root=LABEL=P2PROOT ro console=tty0 console=ttyS0,115200 quiet panic=1 fsck.mode=skip net.ifnames=0"
SIZE = (4 << 30) - (1 << 20)
"""Bytes of the file system, sparse; the disk is 4 GiB with what stands in front of it."""

DRIVERS = (
    *("virtio_pci", "virtio_blk", "virtio_scsi", "virtio_rng", "virtio_net"),
    *("ata_piix", "ahci", "sd_mod", "ext4"),
)

GRUB_CFG = f"""\
# The kernel's packages keep these links at the newest version.
if [ -e /vmlinuz ]; then
    linux /vmlinuz {CMDLINE}
    initrd /initrd.img
else
    linux /boot/vmlinuz {CMDLINE}
    initrd /boot/initrd.img
fi
boot
"""

FILES = {
    "etc/fstab": b"LABEL=P2PROOT / ext4 defaults,noatime 0 1\n",
    "etc/hostname": b"guest\n",
    "etc/hosts": b"127.0.0.1 localhost guest\n",
    "etc/initramfs-tools/conf.d/p2pgrid": b"MODULES=list\nRESUME=none\n",
    "usr/share/initramfs-tools/modules.d/p2pgrid": "".join(f"{name}\n" for name in DRIVERS).encode(),
    "boot/grub/grub.cfg": GRUB_CFG.encode(),
}
UNITS = ("p2pgrid-context.service", "p2pgrid-lan.service")
"""Of the kit, wanted by multi-user.target."""

UNWANTED = (
    *(
        "apt-daily.timer",
        "apt-daily-upgrade.timer",
        "dpkg-db-backup.timer",
        "e2scrub_all.timer",
        "fstrim.timer",
    ),
    *("serial-getty@ttyS0.service", "getty@tty1.service", "e2scrub_reap.service"),
)
"""Units that only cost time in a machine that lives for one job."""


def build(work: Path, packages: Sequence[str], tell: Callable[[str], None]) -> tuple[int, Extents]:
    """Make `work`/disk.raw, in minutes; tell each step.  Raises `Misconfigured`."""
    distribution.need(
        *(("apt-get", "apt"), ("dpkg-deb", "dpkg"), ("mke2fs", "e2fsprogs"), ("mmdebstrap", "mmdebstrap"))
    )
    if os.geteuid():
        raise Misconfigured(why="a debian disk is built by root, for its files have many owners; use sudo")
    tell("download GRUB")
    distribution.unpack(distribution.grub_packages(), work / "packages")
    tell("install the packages (minutes)")
    suite, sources = distribution.sources()
    overlay, partition = work / "overlay.tar", work / "partition"
    overlay.write_bytes(_overlay())
    included = ",".join((*PACKAGES, distribution.kernel_name(), *packages))
    words = ["mmdebstrap", "--variant=minbase", "--format=null", "--skip=cleanup", f"--include={included}"]
    words += ["--aptopt=APT::Install-Recommends false"]
    words += [f"--essential-hook=tar-in {shlex.quote(str(overlay))} /"]
    words += [f"--customize-hook={_last_hook(work / 'tree', partition)}", suite, "/dev/null", *sources]
    distribution.run(words)
    tell("put the boot loader on it")
    return write_disk(
        work / "disk.raw", work / "packages", "configfile /boot/grub/grub.cfg\n", work / "partition"
    )


def _overlay() -> bytes:
    """Our files and the kit as a tar, owned by root."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        files = {
            **{name: (data, 0o644) for name, data in FILES.items()},
            **{
                f"usr/local/sbin/{name}": (kit.read(name), 0o755)
                for name in ("p2pgrid-context", "p2pgrid-dhcp")
            },
            **{f"etc/systemd/system/{unit}": (kit.read(unit), 0o644) for unit in UNITS},
        }
        for name, (data, mode) in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), mode
            tar.addfile(info, io.BytesIO(data))
        wants = "etc/systemd/system/multi-user.target.wants"
        links = {f"{wants}/{unit}": f"/etc/systemd/system/{unit}" for unit in UNITS}
        links |= {f"etc/systemd/system/{unit}": "/dev/null" for unit in UNWANTED}
        for name, target in links.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    return out.getvalue()


def _last_hook(mirror: Path, partition: Path) -> str:
    """Shell: tidy the tree "$1" and make a file system of it.

    /proc, /sys and /dev are mounted in "$1"; a second, plain mount of it shows what lies beneath.
    """
    make = " ".join(shlex.quote(str(w)) for w in mke2fs(partition, mirror, SIZE, "P2PROOT", "ext4"))
    beneath = shlex.quote(str(mirror))
    return f"""set -e
cd "$1"
rm -rf var/lib/apt/lists/* var/cache/apt/*.bin var/cache/apt/archives/*.deb var/log/*.log var/log/apt
rm -f etc/resolv.conf
printf 'guest\\n' > etc/hostname
: > etc/machine-id
mkdir -p context scratch mnt
ln -sfn /context mnt/xwcontext
cd /
mkdir -p {beneath}
mount --bind "$1" {beneath}
trap 'umount {beneath}' EXIT
{make}
"""
