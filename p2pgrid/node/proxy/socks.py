"""Read what a program asks of a SOCKS5 proxy, and word the answers.

Pure.  RFC 1928 with no authentication or with user and password (RFC 1929); CONNECT and UDP ASSOCIATE.
A `Session` is fed bytes in any cut and says what to answer; what follows the request is the program's own
first bytes, and is kept.

    methods ──> (user and password) ──> request ──> Asked

Where a password is wanted, none else will do.  Noise only ever raises `BadFrame`.
"""

from __future__ import annotations

import hmac
import ipaddress

import attrs

from p2pgrid.errors import BadFrame

VERSION = 5
NONE, PASSWORD, NO_METHOD = 0, 2, 0xFF
CONNECT, ASSOCIATE = 1, 3
IPV4, NAME, IPV6 = 1, 3, 4
GRANTED, FAILED, NOT_ALLOWED, NET_UNREACHABLE, UNREACHABLE, REFUSED, EXPIRED, NO_COMMAND, NO_ADDRESS = range(
    9
)
BEFORE_MAX = 1024
"""Bytes that a program may send before it has been answered: more than any request has."""


@attrs.frozen
class Asked:
    """What a program wants: `command` is CONNECT or ASSOCIATE."""

    command: int
    host: str
    """A name, or an address in its usual form."""
    port: int


@attrs.frozen
class Account:
    """Who may use the proxy."""

    user: bytes
    password: bytes


@attrs.define
class Session:
    """One program's beginning.  `account` None: whoever reaches this is welcome."""

    account: Account | None = None
    said: bytes = b""
    """What came and was not understood yet; at the end, what the program has sent beyond its request."""
    _state: str = "methods"

    def feed(self, data: bytes) -> tuple[bytes, Asked | None]:
        """What to answer, and what is wanted once it is known.  Raises `BadFrame`, to be answered by closing;
        `answer_of` tells what else to say."""
        self.said += data
        out = b""
        while True:
            before = self._state
            answer, asked = getattr(self, f"_{before}")()
            out += answer
            if asked is not None or self._state == before:
                if asked is None and len(self.said) > BEFORE_MAX:
                    raise BadFrame(why="a SOCKS request that does not end")
                return out, asked

    def _take(self, count: int) -> bytes:
        taken, self.said = self.said[:count], self.said[count:]
        return taken

    def _methods(self) -> tuple[bytes, None]:
        if self.said and self.said[0] != VERSION:
            raise BadFrame(why=f"not SOCKS5 but version {self.said[0]}")
        if len(self.said) < 2 or len(self.said) < 2 + self.said[1]:
            return b"", None
        offered = self._take(2 + self.said[1])[2:]
        wanted = NONE if self.account is None else PASSWORD
        if wanted not in offered:
            raise SocksRefused(why="the program offers no way to log in that is wanted", answer=b"\5\xff")
        self._state = "request" if self.account is None else "password"
        return bytes((VERSION, wanted)), None

    def _password(self) -> tuple[bytes, None]:
        said = self.said
        if said and said[0] != 1:
            raise BadFrame(why="not a SOCKS password")
        if len(said) < 2 or len(said) < 3 + said[1] or len(said) < 3 + said[1] + said[2 + said[1]]:
            return b"", None
        size = said[1]
        user, password = said[2 : 2 + size], said[3 + size : 3 + size + said[2 + size]]
        self._take(3 + len(user) + len(password))
        assert self.account is not None
        right = hmac.compare_digest(user, self.account.user)
        if not (hmac.compare_digest(password, self.account.password) and right):
            raise SocksRefused(why="the user or the password is wrong", answer=b"\1\1")
        self._state = "request"
        return b"\1\0", None

    def _request(self) -> tuple[bytes, Asked | None]:
        said = self.said
        if said and said[0] != VERSION:
            raise BadFrame(why="not a SOCKS5 request")
        if len(said) < 5:
            return b"", None
        size = {IPV4: 4, NAME: 1 + said[4], IPV6: 16}.get(said[3])
        if size is None:
            raise SocksRefused(why="an address of a kind that is not known", answer=reply(NO_ADDRESS))
        if len(said) < 6 + size:
            return b"", None
        self._take(6 + size)
        if said[1] not in (CONNECT, ASSOCIATE):
            raise SocksRefused(why=f"SOCKS command {said[1]}", answer=reply(NO_COMMAND))
        host = _host(said[3], said[4 : 4 + size])
        return b"", Asked(said[1], host, int.from_bytes(said[4 + size : 6 + size], "big"))


@attrs.frozen(kw_only=True, slots=False)
class SocksRefused(BadFrame):
    """A program asks for what is not to be had."""

    answer: bytes
    """What to say before closing."""


def _host(kind: int, raw: bytes) -> str:
    if kind != NAME:
        return str(ipaddress.ip_address(raw))
    try:
        return raw[1:].decode("ascii")
    except UnicodeDecodeError:
        raise SocksRefused(why="a name that is not ASCII", answer=reply(NO_ADDRESS)) from None


def reply(code: int, host: str = "0.0.0.0", port: int = 0) -> bytes:
    """The answer to a request; the address is the proxy's own."""
    address = ipaddress.ip_address(host)
    kind = IPV4 if address.version == 4 else IPV6
    return bytes((VERSION, code, 0, kind)) + address.packed + port.to_bytes(2, "big")


# --- datagrams ----------------------------------------------------------------------------


def read_datagram(data: bytes) -> tuple[str, int, bytes] | None:
    """Host, port and body of what a program sends; None for fragments and whatever is cut."""
    if len(data) < 5 or data[:3] != b"\0\0\0":
        return None
    size = {IPV4: 4, NAME: 1 + data[4], IPV6: 16}.get(data[3])
    if size is None or len(data) < 6 + size:
        return None
    try:
        host = _host(data[3], data[4 : 4 + size])
    except BadFrame:
        return None
    return host, int.from_bytes(data[4 + size : 6 + size], "big"), data[6 + size :]


def datagram(host: str, port: int, body: bytes) -> bytes:
    """What a program is sent: `host` as it named it."""
    try:
        packed = ipaddress.ip_address(host).packed
        head = bytes((IPV4 if len(packed) == 4 else IPV6,)) + packed
    except ValueError:
        name = host.encode("ascii")
        head = bytes((NAME, len(name))) + name
    return b"\0\0\0" + head + port.to_bytes(2, "big") + body
