"""Is an address dialled as it says, and not at all where that cannot be done?"""

import pytest

from p2pgrid.hole_punch.addresses import bare, relay_of

ME = "12D3KooWHp9eJQ9Afhb9LLijgnZ7ckgaTXUoHnWb2f4jLwhEggBn"
RELAY = "12D3KooWSsGdqZZK4YLWPX3ACwmDnqi6S8Zj7i6xyYWsJ3CnkhPL"


@pytest.mark.parametrize(
    "host", ["/ip4/192.0.2.1", "/ip6/2001:db8::1", "/dns4/example.org", "/dns/example.org"]
)
def test_tcp_and_circuits_are_dialled(host):
    plain = f"{host}/tcp/4001"
    assert bare(plain) == bare(f"{plain}/p2p/{ME}") == plain
    assert relay_of(plain) is None
    around = f"{plain}/p2p/{RELAY}/p2p-circuit"
    assert bare(around) == bare(f"{around}/p2p/{ME}") == around
    assert relay_of(around) == (plain, RELAY)


@pytest.mark.parametrize(
    "other",
    [
        "",
        "noise",
        "/ip4/192.0.2.1",
        "/ip4/192.0.2.1/udp/4001/quic-v1",
        "/ip4/192.0.2.1/tcp/4001/ws",
        "/ip4/192.0.2.1/tcp/4001/tls",  # a link's
        f"/ip4/192.0.2.1/tcp/4001/tls/p2p/{RELAY}/p2p-circuit",
        f"/p2p/{RELAY}/p2p-circuit",  # who knows where that is
        f"/p2p/{RELAY}/p2p-circuit/p2p/{ME}",
        "/ip4/192.0.2.1/tcp/4001/p2p-circuit",
        f"/ip4/192.0.2.1/tcp/4001/p2p/{RELAY}/p2p-circuit/p2p/{ME}/p2p-circuit",
        f"/ip4/192.0.2.1/udp/4001/quic-v1/p2p/{RELAY}/p2p-circuit",
    ],
)
def test_others_are_passed_over(other):
    assert bare(other) == ""
