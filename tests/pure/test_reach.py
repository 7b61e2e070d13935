"""Who serves the index follows from the addresses."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pgrid.node.reach import index_mode, told
from p2pgrid.scheduler.messages import ADDRESSES_MAX

LOOPBACK, LAN, PUBLIC, V6 = (
    "/ip4/127.0.0.1/tcp/1", "/ip4/192.168.1.7/tcp/1", "/ip4/8.8.8.8/tcp/1", "/ip6/2001:4860:4860::8888/tcp/1",
)  # fmt: skip


@pytest.mark.parametrize(
    ("mine", "coordinator", "mode"),
    [
        ([LOOPBACK], [LOOPBACK], "server"),
        ([LAN], [LOOPBACK, LAN], "server"),
        ([LAN], [LAN, PUBLIC], "client"),
        ([LAN, V6], [PUBLIC], "server"),
        ([], [PUBLIC], "client"),
        (["/dns4/x/tcp/1", "/ip4", "/ip4/nonsense/tcp/1"], [PUBLIC], "client"),
        ([PUBLIC], ["/dns4/coordinator.example/tcp/1"], "server"),
    ],
)
def test_a_server_can_be_reached_where_the_coordinator_can(mine, coordinator, mode):
    assert index_mode(mine, coordinator) == mode


@given(st.lists(st.text(max_size=3), max_size=30), st.lists(st.text(max_size=3), max_size=30))
def test_of_each_kind_some_are_told(links: list[str], network: list[str]) -> None:
    both = told(links, network)
    assert len(both) == min(ADDRESSES_MAX, len(links) + len(network))
    mine = max(ADDRESSES_MAX // 2, ADDRESSES_MAX - len(network))
    assert both[: len(links[:mine])] == tuple(links[:mine])
    assert both[len(links[:mine]) :] == tuple(network[: len(both) - len(links[:mine])])
