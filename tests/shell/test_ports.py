"""Are links taken at the port that was asked for, or at the same one as before?"""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import trio

from p2pgrid.errors import Misconfigured, Misused
from p2pgrid.node import launch
from p2pgrid.node.config import Config
from p2pgrid.node.daemon import open_node
from p2pgrid.node.ports import link_port


def config(**more: int) -> Config:
    return Config(roles=("coordinator",), listen="127.0.0.1:0", **more)


@pytest.mark.parametrize("wrong", [0, -1, 65536])
def test_what_is_no_port_is_refused(wrong: int) -> None:
    with pytest.raises(Misused, match="--link-port"):
        launch.link_port(wrong)
    assert launch.link_port(443) == 443


def test_a_port_that_somebody_has_is_refused_or_another_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        with pytest.raises(Misconfigured, match="somebody else listens"):
            link_port(config(link_port=taken))
        assert link_port(config(link_port_before=taken)) == 0
    assert link_port(config(link_port=taken)) == taken
    assert link_port(config(link_port_before=taken)) == taken
    assert link_port(config()) == 0


async def test_a_node_is_at_the_same_ports_again(tmp_path: Path) -> None:
    config().save(tmp_path)
    seen = []
    for _ in range(2):
        stopping = trio.Event()
        async with open_node(tmp_path, stopping) as node:
            seen.append((node.network.addresses, node.exchange.links.bound))
            stopping.set()
    assert seen[0] == seen[1]
