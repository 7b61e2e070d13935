"""Build a small internet of network namespaces: a bridge as the wire, homes behind NATs on it.

    hub 203.0.113.10 ──┐
                       ├── bridge (namespace "wire")
    home: inside 10.N.0.2 ── NAT 203.0.113.1N, which lets in only what was asked for

Needs root, iproute2 and nftables; everything is gone when the block is left.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest

HUB = "203.0.113.10"

MASQUERADE = """
table ip nat {
    chain post { type nat hook postrouting priority srcnat; oifname "wan" masquerade; }
}
table inet filter {
    chain in {
        type filter hook input priority 0; policy drop;
        ct state established,related accept; iifname { "lan", "lo" } accept;
    }
    chain through {
        type filter hook forward priority 0; policy drop;
        ct state established,related accept; iifname "lan" accept;
    }
}
"""

needs_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("nft"),
    reason="network namespaces need root, iproute2 and nftables",
)


def sh(line: str, stdin: str | None = None) -> None:
    subprocess.run(line.split(), check=True, input=stdin, text=True, timeout=30)


class Lab:
    """Namespaces whose names begin with `prefix`."""

    def __init__(self, prefix: str, undo: contextlib.ExitStack) -> None:
        self._prefix = prefix
        self._undo = undo
        self._homes = 0
        self.wire = self._space("wire")
        self._in(self.wire, "ip link add name wire0 type bridge")
        self._in(self.wire, "ip link set wire0 up")
        self.hub = self._space("hub")
        self._plug(self.hub, "wan", f"{HUB}/24")

    def home(self) -> str:
        """A namespace behind a NAT of its own; nothing from outside gets in unasked."""
        self._homes += 1
        n = self._homes
        nat, inside = self._space(f"nat{n}"), self._space(f"home{n}")
        self._plug(nat, "wan", f"203.0.113.{10 + n}/24")
        sh(f"ip -n {nat} link add lan type veth peer name eth0 netns {inside}")
        self._up(nat, "lan", f"10.{n}.0.1/24")
        self._up(inside, "eth0", f"10.{n}.0.2/24")
        sh(f"ip -n {inside} route add default via 10.{n}.0.1")
        self._in(nat, "sysctl -qw net.ipv4.ip_forward=1")
        self._in(nat, "nft -f -", MASQUERADE)
        return inside

    def _space(self, name: str) -> str:
        space = f"{self._prefix}{name}"
        sh(f"ip netns add {space}")
        self._undo.callback(sh, f"ip netns del {space}")
        sh(f"ip -n {space} link set lo up")
        return space

    def _plug(self, space: str, device: str, address: str) -> None:
        """A cable from `space` to the bridge."""
        port = f"p{len(space)}{address.split('/')[0].split('.')[-1]}"
        sh(f"ip -n {space} link add {device} type veth peer name {port} netns {self.wire}")
        sh(f"ip -n {self.wire} link set {port} master wire0 up")
        self._up(space, device, address)

    def _up(self, space: str, device: str, address: str) -> None:
        sh(f"ip -n {space} addr add {address} dev {device}")
        sh(f"ip -n {space} link set {device} up")

    def _in(self, space: str, line: str, stdin: str | None = None) -> None:
        sh(f"ip netns exec {space} {line}", stdin)


@contextlib.contextmanager
def lab() -> Iterator[Lab]:
    """A lab of this process; an interrupted one of an earlier process is another's business."""
    with contextlib.ExitStack() as undo:
        yield Lab(f"p2pg{os.getpid()}-", undo)
