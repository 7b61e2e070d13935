"""Does the SOCKS parser understand any cut of what programs send, and nothing else?"""

from __future__ import annotations

import ipaddress
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pgrid.errors import BadFrame
from p2pgrid.node.proxy.socks import (
    ASSOCIATE,
    CONNECT,
    Account,
    Asked,
    Session,
    SocksRefused,
    datagram,
    read_datagram,
    reply,
)

ANN = Account(b"ann", b"secret")
names = st.from_regex(r"[a-z0-9.-]{1,60}", fullmatch=True).filter(lambda n: not _is_address(n))
hosts = st.one_of(names, st.ip_addresses().map(str))
ports = st.integers(0, 65535)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def spelled(host: str) -> bytes:
    if _is_address(host):
        packed = ipaddress.ip_address(host).packed
        return bytes((1 if len(packed) == 4 else 4,)) + packed
    return bytes((3, len(host))) + host.encode()


def request(command: int, host: str, port: int) -> bytes:
    return b"\5" + bytes((command,)) + b"\0" + spelled(host) + port.to_bytes(2, "big")


def fed(session: Session, data: bytes, cuts: list[int]) -> tuple[bytes, Asked | None]:
    places = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    out, found = b"", None
    for start, end in itertools.pairwise(places):
        if found is not None:
            session.said += data[start:end]
            continue
        answer, found = session.feed(data[start:end])
        out += answer
    return out, found


@given(
    st.sampled_from([CONNECT, ASSOCIATE]), hosts, ports, st.lists(st.integers(0, 500)), st.binary(max_size=20)
)
def test_any_cut_is_understood(command: int, host: str, port: int, cuts: list[int], more: bytes) -> None:
    session = Session()
    answer, asked = fed(session, b"\5\2\0\2" + request(command, host, port) + more, cuts)
    assert answer == b"\5\0"
    assert asked == Asked(command, host, port)
    assert session.said == more


@given(hosts, ports, st.lists(st.integers(0, 500)))
def test_a_password_is_asked_for(host: str, port: int, cuts: list[int]) -> None:
    login = b"\1\3ann\6secret"
    session = Session(ANN)
    answer, asked = fed(session, b"\5\2\0\2" + login + request(CONNECT, host, port), cuts)
    assert answer == b"\5\2\1\0"
    assert asked == Asked(CONNECT, host, port)


@pytest.mark.parametrize("login", [b"\1\3ann\5wrong", b"\1\3bob\6secret", b"\1\0\0", b"\1\3ann\0"])
def test_a_wrong_password_is_refused(login: bytes) -> None:
    with pytest.raises(SocksRefused) as refused:
        Session(ANN).feed(b"\5\1\2" + login)
    assert refused.value.answer == b"\1\1"


def test_nobody_comes_in_without_the_password() -> None:
    with pytest.raises(SocksRefused) as refused:
        Session(ANN).feed(b"\5\1\0" + request(CONNECT, "a", 1))
    assert refused.value.answer == b"\5\xff"


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (b"\5\1\0\5\2\0\1\1\2\3\4\0\1", b"\5\7"),
        (b"\5\1\0\5\1\0\2\1\2\3\4\0\1", b"\5\x08"),
        (b"\5\1\0" + b"\5\1\0\3\2\xff\xfe\0\1", b"\5\x08"),
    ],
)
def test_what_is_not_to_be_had_is_answered(said: bytes, answer: bytes) -> None:
    with pytest.raises(SocksRefused) as refused:
        Session().feed(said)
    assert refused.value.answer.startswith(answer)


@given(st.binary(max_size=1500), st.booleans(), st.lists(st.integers(0, 2000), max_size=10))
def test_noise_is_only_ever_a_bad_frame(noise: bytes, open_: bool, cuts: list[int]) -> None:
    session = Session(None if open_ else ANN)
    try:
        _, asked = fed(session, noise, cuts)
    except BadFrame:
        return
    assert asked is not None or len(session.said) <= 1024


@given(hosts, ports, st.binary(max_size=100))
def test_datagrams_are_read_as_they_are_written(host: str, port: int, body: bytes) -> None:
    assert read_datagram(datagram(host, port, body)) == (host, port, body)


@given(st.binary(max_size=80))
def test_datagrams_of_noise_are_passed_over(noise: bytes) -> None:
    found = read_datagram(noise)
    assert found is None or noise.startswith(b"\0\0\0")


def test_a_reply_names_the_proxy() -> None:
    assert reply(0, "127.0.0.1", 1080) == b"\5\0\0\1\x7f\0\0\1\x04\x38"
    assert reply(5, "::1", 1)[:4] == b"\5\5\0\4"
