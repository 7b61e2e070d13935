"""Give up every right that a hypervisor, or a reader of hostile bytes, does not need.

Two uses.  As a program it locks itself down and becomes another one:

    python -I -S jail.py PARENT UID FILES DISK MEMORY SECONDS -- PROGRAM ARGUMENT…

and a Python child calls `lock_down` itself once it has imported all it needs.  Standard
library only, and little of that: it runs before every virtual machine.

What goes: root (an unprivileged uid without groups, but /dev/kvm's), new privileges, core dumps,
the network (where the kernel lets us), the right to outlive the parent; what stays is little disk,
memory and time.  QEMU adds its own seccomp filter.  Files come as descriptors, so that the child
needs no right to any folder.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import stat
import sys

PR_SET_PDEATHSIG = 1
PR_SET_NO_NEW_PRIVS = 38
CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000
NOBODY = 65534


def lock_down(parent: int, uid: int, files: int, disk: int, memory: int, seconds: int) -> None:
    """Lock this process down for good.

    Args:
        parent: the process that this one must not outlive.
        uid: who to become when root; without root the uid stays as it is.
        files: how many open files.
        disk: bytes that any file may grow to.
        memory: bytes of address space.
        seconds: of CPU; 0 for no limit.

    Raises `OSError` where a right cannot be given up that must be.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    root = os.geteuid() == 0
    # Not every kernel lets an unprivileged user have namespaces: this wall is a second one.
    libc.unshare(CLONE_NEWNET if root else CLONE_NEWUSER | CLONE_NEWNET)
    os.setpriority(os.PRIO_PROCESS, 0, 19)
    _die_first_when_memory_is_short()
    for what, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, files),
        (resource.RLIMIT_FSIZE, disk),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
    ):
        if what != resource.RLIMIT_CPU or seconds:
            hard = resource.getrlimit(what)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(what, (most, most))
    if root:
        groups = _kvm_group()
        os.setgroups(groups)
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(uid, uid, uid)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a full file is an I/O error to the guest, not our end
    os.umask(0o077)
    _prctl(libc, PR_SET_NO_NEW_PRIVS, 1)
    _prctl(libc, PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of uid would clear it: last
    if os.getppid() != parent:
        raise OSError("the parent is gone already")


def _prctl(libc: ctypes.CDLL, option: int, value: int) -> None:
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option}")


def _die_first_when_memory_is_short() -> None:
    try:
        with open("/proc/self/oom_score_adj", "w") as score:
            score.write("1000")
    except OSError:  # no /proc: the kernel chooses by itself
        pass


def _kvm_group() -> list[int]:
    """The group that may use /dev/kvm, if it is one of its own."""
    try:
        device = os.stat("/dev/kvm")
    except OSError:
        return []
    group_may = stat.S_IMODE(device.st_mode) & 0o060 == 0o060
    return [device.st_gid] if group_may and device.st_gid != 0 else []


def main() -> None:
    """Lock down, then become the program after `--`."""
    split = sys.argv.index("--")
    numbers = [int(word) for word in sys.argv[1:split]]
    lock_down(*numbers)
    program = sys.argv[split + 1 :]
    os.execv(program[0], program)


if __name__ == "__main__":
    main()
