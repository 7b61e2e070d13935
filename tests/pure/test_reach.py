"""Who serves the index follows from the addresses."""

import pytest

from p2pgrid.node.reach import index_mode

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
