"""Is only the gateway believed, and nothing waited for?  Loopback addresses instead of a router's."""

from __future__ import annotations

import socket

import pytest
import trio

from p2pgrid.hole_punch.netlink import Route
from p2pgrid.hole_punch.netwatch import Net
from p2pgrid.hole_punch.portmap import Mapping, mapper, open_mapping
from p2pgrid.hole_punch.portmap import story as module
from p2pgrid.hole_punch.portmap.messages import PORT
from tests.pure.test_portmap import pmp_address, pmp_mapped

GATEWAY, OWN, STRANGER = "127.0.0.77", "127.0.0.7", "127.0.0.78"


def net(gateway: str = GATEWAY, own: str = OWN) -> Net:
    return Net(frozenset([own]), Route(gateway, own, 1))


def at(host: str) -> trio.socket.SocketType:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((host, PORT))
    sock.setblocking(False)
    return trio.socket.from_stdlib_socket(sock)


async def tried(mapping: Mapping) -> None:
    while not mapping.tried:
        await mapping.changed.wait()


async def test_a_gateway_that_has_nobody_there_says_so_at_once(monkeypatch) -> None:
    monkeypatch.setattr(mapper, "SILENCES", (1000.0, 1000.0, 1000.0))
    with trio.fail_after(5):
        async with open_mapping(4001, ways=("pcp", "nat-pmp"), look=net) as mapping:
            await tried(mapping)
            assert mapping.address is None
            assert mapping.why == "pcp: nobody answers; nat-pmp: nobody answers"


async def test_a_node_that_leaves_waits_for_no_answer_that_it_does_not_need(monkeypatch) -> None:
    monkeypatch.setattr(module, "RELEASE_PATIENCE", 1000.0)
    monkeypatch.setattr(module, "RELEASE_TRIES", 1000)
    with trio.fail_after(5), at(GATEWAY) as gateway:
        async with open_mapping(4001, ways=("pcp",), look=net):
            await gateway.recv(1100)
        assert (await gateway.recv(1100))[4:8] == bytes(4), "what may have been granted is given back"


async def test_a_stranger_is_not_heard(monkeypatch) -> None:
    monkeypatch.setattr(module, "RELEASE_PATIENCE", 0.0)
    with trio.fail_after(5), at(GATEWAY) as gateway, at(STRANGER) as stranger:
        async with open_mapping(4001, ways=("nat-pmp",), look=net) as mapping:
            _, node = await gateway.recvfrom(1100)
            assert node[0] == OWN
            await stranger.sendto(pmp_address(5, "11.6.6.6"), node)
            await gateway.sendto(b"\x80noise", node)
            await gateway.sendto(pmp_address(5), node)
            assert (await gateway.recv(1100))[:2] == b"\x00\x02"
            await stranger.sendto(pmp_mapped(5, 666, 1200), node)
            await gateway.sendto(pmp_mapped(5, 4001, 1200), node)
            await tried(mapping)
            assert (mapping.address, mapping.how) == (("11.3.0.1", 4001), "nat-pmp")


async def test_a_gateway_that_forgets_to_answer_at_the_end_does_not_hold_us_up(monkeypatch) -> None:
    monkeypatch.setattr(module, "RELEASE_PATIENCE", 0.1)
    monkeypatch.setattr(module, "RELEASE_TRIES", 1000)
    with trio.fail_after(5), at(GATEWAY) as gateway:
        async with open_mapping(4001, ways=("nat-pmp",), look=net) as mapping:
            for answer in (pmp_address(5), pmp_mapped(5, 4001, 1200)):
                _, node = await gateway.recvfrom(1100)
                await gateway.sendto(answer, node)
            await tried(mapping)


@pytest.mark.parametrize(
    ("world", "host", "why"),
    [
        (Net(), "0.0.0.0", "no gateway"),
        (net(), "127.0.0.9", "no gateway"),
        (net("11.3.0.254", "11.3.0.1"), "0.0.0.0", "public"),
    ],
)
async def test_where_there_is_nothing_to_ask_it_says_why(world: Net, host: str, why: str) -> None:
    with trio.fail_after(5):
        async with open_mapping(4001, host, look=lambda: world) as mapping:
            await tried(mapping)
            assert why in mapping.why
