"""Carry frames between two devices, each some time late: a wire as long as one wishes.

Where the kernel has no netem.  A thread reads frames from packet sockets and writes them to the other device
when they are due, with the header that says which checksums are still to be made (PACKET_VNET_HDR).
"""

from __future__ import annotations

import collections
import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Iterator

from tests.netns.spaces import inside

ETH_P_ALL = 0x0003
SOL_PACKET, PACKET_VNET_HDR = 263, 15
FRAME_MAX = 10 + (64 << 10) + 64
"""Bytes: of a header and a segment that no device has cut yet."""


@contextlib.contextmanager
def late(space: str, one: str, other: str, seconds: float) -> Iterator[None]:
    """While inside, what comes in at one device goes out at the other after so many seconds, both ways."""

    def tap(device: str) -> socket.socket:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        sock.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        sock.setblocking(False)
        sock.bind((device, ETH_P_ALL))
        return sock

    a, b = (inside(space, lambda device=device: tap(device)) for device in (one, other))
    stop, stopped = socket.socketpair()
    thread = threading.Thread(target=_carry, args=(a, b, stopped, seconds))
    thread.start()
    try:
        yield
    finally:
        stop.close()
        thread.join()
        for sock in (a, b, stopped):
            sock.close()


def _carry(a: socket.socket, b: socket.socket, stopped: socket.socket, seconds: float) -> None:
    under_way: collections.deque[tuple[float, socket.socket, bytes]] = collections.deque()
    with selectors.DefaultSelector() as selector:
        for sock in (a, b, stopped):
            selector.register(sock, selectors.EVENT_READ)
        while True:
            wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
            for key, _ in selector.select(wait):
                if key.fileobj is stopped:
                    return
                sock, to = (a, b) if key.fileobj is a else (b, a)
                with contextlib.suppress(BlockingIOError, OSError):  # none left; or the device is gone
                    while True:
                        frame, source = sock.recvfrom(FRAME_MAX)
                        if source[2] != socket.PACKET_OUTGOING:
                            under_way.append((time.monotonic() + seconds, to, frame))
            while under_way and under_way[0][0] <= time.monotonic():
                _, to, frame = under_way.popleft()
                with contextlib.suppress(OSError):  # as a wire loses what there is no room for
                    to.send(frame)
