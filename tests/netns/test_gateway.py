"""Does a real gateway (miniupnpd) let others in while we want it, and no longer?"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import trio

from p2pgrid.hole_punch.netwatch import open_netwatch
from p2pgrid.hole_punch.path import Address
from p2pgrid.hole_punch.portmap import WAYS, Mapping, open_mapping, story
from tests.netns.gateway import Gateway, gateway, needs_miniupnpd
from tests.netns.lab import Host, Lab, lab, needs_namespaces, run

pytestmark = needs_namespaces

PORT = 4001
GRANTED = {"pcp": "PCP MAP: added", "nat-pmp": "NAT-PMP port mapping request", "upnp": "redirecting port"}


@pytest.fixture(scope="module")
def world() -> Iterator[Lab]:
    with lab() as built:
        yield built


@pytest.fixture(scope="module")
def home(world: Lab) -> Host:
    return world.home()


@pytest.fixture
def router(world: Lab, home: Host, tmp_path: Path) -> Iterator[Gateway]:
    with gateway(world, home, tmp_path) as running:
        yield running


def at(home: Host, play: Callable[[], Awaitable[None]]) -> None:
    """Have `play` run in the home, for half a minute at most."""

    async def bounded() -> None:
        with trio.fail_after(30):
            await play()

    home.call(lambda: trio.run(bounded))


async def mapped(mapping: Mapping) -> Address:
    while mapping.address is None:
        assert not mapping.why, mapping.why
        await mapping.changed.wait()
    return mapping.address


async def reaches(world: Lab, address: Address, patience: float = 5.0) -> None:
    """A connection from the hub arrives at our port.  Raises `OSError`."""
    with (
        trio.socket.socket() as listening,
        trio.socket.from_stdlib_socket(world.call(socket.socket)) as caller,
    ):
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        await listening.bind(("0.0.0.0", PORT))
        listening.listen()
        with trio.move_on_after(patience) as scope:
            await caller.connect(address)
        if scope.cancelled_caught:
            raise TimeoutError
        arrived, _ = await listening.accept()
        with arrived:
            await caller.send(b"hello")
            assert await arrived.recv(5) == b"hello"


@needs_miniupnpd
@pytest.mark.parametrize("way", WAYS)
def test_others_get_in_until_we_leave(world: Lab, home: Host, router: Gateway, way: str) -> None:
    async def play() -> None:
        async with open_mapping(PORT, ways=[way]) as mapping:
            address = await mapped(mapping)
            assert (address, mapping.how) == ((router.external, PORT), way)
            await reaches(world, address)
        assert not router.maps
        with pytest.raises(OSError):  # noqa: PT011  (refused, or dropped)
            await reaches(world, address, 0.3)

    at(home, play)


@needs_miniupnpd
def test_the_first_way_that_works_is_taken(home: Host, router: Gateway) -> None:
    async def play() -> None:
        async with open_mapping(PORT) as mapping:
            await mapped(mapping)
            assert mapping.how == "pcp"

    at(home, play)


@needs_miniupnpd
@pytest.mark.parametrize("way", WAYS)
def test_after_a_restart_of_the_gateway_others_get_in_again(
    world: Lab, home: Host, router: Gateway, way: str
) -> None:
    """PCP and NAT-PMP announce a start; UPnP does not, so that it is noticed at half the lifetime."""

    async def play() -> None:
        async with open_mapping(PORT, ways=[way], lifetime=2 if way == "upnp" else 1200) as mapping:
            address = await mapped(mapping)
            router.stop()
            assert not router.maps
            router.start(old=False)
            await router.said(GRANTED[way])
            await reaches(world, address)
            assert mapping.address == address

    at(home, play)


@needs_miniupnpd
@pytest.mark.parametrize("way", ["pcp", "upnp"])
def test_it_lasts_as_long_as_it_is_renewed(
    world: Lab, home: Host, router: Gateway, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def play() -> None:
        async with open_mapping(PORT, ways=[way], lifetime=2) as mapping:
            address = await mapped(mapping)
            for _ in range(3):
                await router.said("request received" if way == "pcp" else "#AddPortMapping")
            assert router.maps
            await reaches(world, address)
            monkeypatch.setattr(story, "RELEASE_PATIENCE", 0.0)  # as a node that is killed
        while router.maps:
            await router.said("expired")

    at(home, play)


def test_a_new_address_is_noticed_once_and_what_changes_nothing_is_not(home: Host) -> None:
    def ip(*words: str) -> None:
        run(["ip", "-n", home.space, *words], "")

    async def play() -> None:
        async with open_netwatch() as changes:
            ip("addr", "add", "10.99.0.1/24", "dev", "eth0")
            ip("addr", "add", "10.99.0.2/24", "dev", "eth0")
            change = await changes.receive()
            assert change.after.addresses - change.before.addresses == {"10.99.0.1", "10.99.0.2"}
            ip("addr", "flush", "to", "10.99.0.0/24", "dev", "eth0")
            change = await changes.receive()
            assert change.before.addresses - change.after.addresses == {"10.99.0.1", "10.99.0.2"}
            ip("link", "add", "name", "container0", "type", "bridge")
            ip("link", "set", "container0", "up")  # gets a link-local address, and nobody is reached by it
            ip("link", "del", "container0")
            gateway = change.after.v4.gateway
            ip("route", "replace", "default", "via", gateway, "metric", "7")
            ip("route", "del", "default", "via", gateway, "metric", "0")
            ip("route", "del", "default", "via", gateway, "metric", "7")
            change = await changes.receive()
            assert (change.before.v4.gateway, change.after.v4) == (gateway, None)
            assert change.before.addresses == change.after.addresses
            ip("route", "add", "default", "via", gateway)
            change = await changes.receive()
            assert change.after.v4.gateway == gateway
            with pytest.raises(trio.WouldBlock):
                changes.receive_nowait()

    at(home, play)


@needs_miniupnpd
def test_another_address_at_home_moves_the_mapping(world: Lab, home: Host, router: Gateway) -> None:
    def ip(*words: str) -> None:
        run(["ip", "-n", home.space, *words], "")

    async def play() -> None:
        own = f"{home.ipv4}/24"
        other = own.replace(".2/24", ".77/24")
        async with open_mapping(PORT, ways=["pcp"]) as mapping:
            address = await mapped(mapping)
            gateway = home.ipv4.rpartition(".")[0] + ".1"
            ip("addr", "del", own, "dev", "eth0")
            ip("addr", "add", other, "dev", "eth0")
            ip("route", "add", "default", "via", gateway)
            try:
                await router.said(f"->{other.removesuffix('/24')}:")
                while mapping.address is None:
                    await mapping.changed.wait()
                await reaches(world, mapping.address)
                assert mapping.address[0] == address[0]
            finally:
                ip("addr", "del", other, "dev", "eth0")
                ip("addr", "add", own, "dev", "eth0")
                ip("route", "replace", "default", "via", gateway)

    at(home, play)
