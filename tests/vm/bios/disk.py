"""Make boot disks of 512 bytes from `guest.hex`, which `guest.S` was assembled to."""

from pathlib import Path

MARKER = b"BIOS-GUEST-BOOTED\r\n"
SECTOR = bytes.fromhex((Path(__file__).parent / "guest.hex").read_text())
MODE, EXIT, FAR, NAP = 509, 498 + len("exit "), 494, 492
COPIES, NEVER_ENDS, FLOODS, READS_FAR, NAPS = range(5)
TICKS = 18.2
"""A second, in ticks of the PC's timer."""


def bios_disk(
    mode: int = COPIES, exit_status: int = 0, far: int = 1, more: bytes = b"", nap: float = 0.0
) -> bytes:
    """A boot sector that does `mode` and exits with a one-digit status; `more` follows it on the disk.

    With `NAPS` it sleeps `nap` seconds first.
    With `READS_FAR` it prints the zero-terminated text in sector `far` of the boot disk.
    """
    assert 0 <= exit_status <= 9
    sector = bytearray(SECTOR)
    sector[MODE] = mode
    sector[EXIT] = ord("0") + exit_status
    sector[FAR : FAR + 4] = far.to_bytes(4, "little")
    sector[NAP : NAP + 2] = max(1, int(nap * TICKS)).to_bytes(2, "little")
    return bytes(sector) + more
