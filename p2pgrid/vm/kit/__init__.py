"""Hold the guest kit: the files that make a Linux disk keep the guest's contract.

Spec: `docs/reference/guest-kit.md`.
"""

from importlib import resources

NAMES = ("p2pgrid-context", "p2pgrid-context.service", "p2pgrid-dhcp", "p2pgrid-lan.service", "tiny-init")


def read(name: str) -> bytes:
    """A file of the kit."""
    assert name in NAMES
    return (resources.files(__name__) / name).read_bytes()
