"""Have the router of a home open ports for hosts behind it: miniupnpd, which speaks PCP, NAT-PMP and UPnP.

It refuses to work at an address that is not the whole internet's, and takes documentation networks for
such; so hub and router get one more address each, 11.3.0.N.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.netns.lab import Host, Lab, run

PROGRAM = shutil.which("miniupnpd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
HUB = "11.3.0.250"

needs_miniupnpd = pytest.mark.skipif(PROGRAM is None, reason="miniupnpd is not installed")

CONFIG = """
ext_ifname=wan
ext_ip={external}
listening_ip={device}
http_port=5000
enable_natpmp=yes
enable_upnp=yes
upnp_table_name=upnp
upnp_nat_table_name=upnp
secure_mode=yes
ipv6_disable=yes
min_lifetime=1
system_uptime={old}
uuid=00000000-0000-0000-0000-000000000001
allow 1024-65535 0.0.0.0/0 1024-65535
deny 0-65535 0.0.0.0/0 0-65535
"""

TABLE = """
table inet upnp {
    chain miniupnpd { }
    chain prerouting_miniupnpd { }
    chain postrouting_miniupnpd { }
    chain before { type nat hook prerouting priority dstnat; jump prerouting_miniupnpd; }
}
"""


class Gateway:
    """miniupnpd on the router of `host`, running or not."""

    def __init__(self, world: Lab, host: Host, folder: Path) -> None:
        self.router, lan = host.router, host.space.rpartition("-")[2]
        self.external = f"11.3.0.{host.outside.rpartition('.')[2]}"
        self._folder = folder
        self._child: subprocess.Popen[bytes] | None = None
        self._said = b""
        for space, address in ((world.hub, HUB), (self.router, self.external)):
            run(["ip", "netns", "exec", space, "ip", "addr", "replace", f"{address}/24", "dev", "wan"], "")
        self._nft(TABLE)
        self._device = f"lan{lan}"

    def start(self, *, old: bool = True) -> None:
        """Returns when it answers; an old one says that it has run for as long as this computer."""
        assert PROGRAM is not None
        config = self._folder / "miniupnpd.conf"
        facts = {"external": self.external, "device": self._device, "old": "yes" if old else "no"}
        config.write_text(CONFIG.format(**facts))
        words = [PROGRAM, "-d", "-f", str(config), "-P", str(self._folder / "miniupnpd.pid")]
        command = ["ip", "netns", "exec", self.router, *words]
        self._child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self._said = b""
        while b"NAT-PMP/PCP traffic" not in self._said:
            self._hear()

    def stop(self) -> None:
        """As a power cut: nothing of what was mapped is left."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate(timeout=10)
            self._child = None
            chains = ("miniupnpd", "prerouting_miniupnpd", "postrouting_miniupnpd")
            self._nft("".join(f"flush chain inet upnp {chain}\n" for chain in chains))

    async def said(self, text: str) -> None:
        """Wait until it has logged `text` once more."""
        while text.encode() not in self._said:
            assert self._child is not None
            assert self._child.stdout is not None
            await trio.lowlevel.wait_readable(self._child.stdout.fileno())
            self._hear()
        self._said = self._said.partition(text.encode())[2]

    @property
    def maps(self) -> bool:
        """Whether anything is mapped now."""
        words = ["ip", "netns", "exec", self.router, "nft", "list", "chain", "inet", "upnp"]
        done = subprocess.run([*words, "prerouting_miniupnpd"], capture_output=True, check=True, timeout=10)
        return b"dnat" in done.stdout

    def _hear(self) -> None:
        assert self._child is not None
        assert self._child.stdout is not None
        more = os.read(self._child.stdout.fileno(), 65536)
        if not more:
            pytest.fail(f"miniupnpd ended: {self._said.decode(errors='replace')}")
        self._said += more

    def _nft(self, rules: str) -> None:
        run(["ip", "netns", "exec", self.router, "nft", "-f", "-"], rules)


@contextlib.contextmanager
def gateway(world: Lab, host: Host, folder: Path) -> Iterator[Gateway]:
    """A running one, ended when the block is left."""
    made = Gateway(world, host, folder)
    try:
        made.start()
        yield made
    finally:
        made.stop()
