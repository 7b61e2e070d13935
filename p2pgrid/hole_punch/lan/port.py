"""Move a guest's frames between its hypervisor's socket and the switch, a turn at a time.

A turn (`reactor.py`) never blocks: it writes what waits for the guest and takes what the guest has
sent, all that there is at once.  A guest that does not read loses frames, as at any switch; one that
sends more than we take waits, for its hypervisor cannot write.
"""

from __future__ import annotations

import collections
import socket
import threading
from collections.abc import Callable

from p2pgrid.errors import BadFrame
from p2pgrid.hole_punch.reactor import READ, WRITE, Next

READ_MAX = 64 * 1024
"""Bytes taken in one turn: some 40 whole frames, and never so many that links wait long."""
WAITING_MAX = 1 << 20
"""Bytes that wait for a guest; what comes then is dropped."""
BUFFER = 1 << 20
"""Bytes that the kernel may hold each way: a burst of small frames takes many times its length."""


class Port:
    """One end of a guest's cable; `put` and `close` may be called by any thread."""

    def __init__(
        self,
        sock: socket.socket,
        forward: Callable[[bytes], int],
        call: Callable[[Port], None],
        ended: Callable[[], None],
    ) -> None:
        """Closes `sock` at its end.  `forward` takes frames and says how many bytes were whole ones,
        `call` has the port called for a turn, `ended` hears when it has had its last.
        """
        sock.setblocking(False)
        self._socket = sock
        self._forward = forward
        self._call = call
        self._ended = ended
        self._lock = threading.Lock()
        self._waiting: collections.deque[bytes] = collections.deque()
        self._waits = 0
        self._begun = memoryview(b"")
        self._rest = b""
        """The beginning of a frame."""
        self._closing = self._over = False

    def put(self, frames: bytes) -> bool:
        """Send `frames` to the guest; False where it does not read and they are lost."""
        with self._lock:
            if self._closing or self._waits + len(frames) > WAITING_MAX:
                return False
            self._waiting.append(frames)
            self._waits += len(frames)
        self._call(self)
        return True

    def close(self) -> None:
        self._closing = True
        self._call(self)

    # --- in the reactor's thread ------------------------------------------------------------

    @property
    def over(self) -> bool:
        return self._over

    def fileno(self) -> int:
        return self._socket.fileno()

    def turn(self, readable: bool) -> Next | None:
        if self._closing:
            return None
        try:
            if readable:
                self._take()
            blocked = not self._give()
        except (EOFError, BadFrame, OSError):  # the hypervisor has ended, or is out of its mind
            return None
        return False, None, READ | WRITE if blocked else READ

    def end(self, why: str) -> None:
        self._closing = self._over = True
        self._socket.close()
        self._ended()

    def _take(self) -> None:
        """Take what the guest has sent; of more the selector tells once the links have had their turns."""
        try:
            got = self._socket.recv(READ_MAX)
        except BlockingIOError:
            return
        if not got:
            raise EOFError
        data = self._rest + got if self._rest else got
        self._rest = data[self._forward(data) :]

    def _give(self) -> bool:
        """Write what waits; False where the guest takes no more now."""
        while True:
            if not self._begun:
                with self._lock:
                    if not self._waiting:
                        return True
                    whole = b"".join(self._waiting) if len(self._waiting) > 1 else self._waiting[0]
                    self._waiting.clear()
                self._begun = memoryview(whole)
            try:
                count = self._socket.send(self._begun)
            except BlockingIOError:
                return False
            self._begun = self._begun[count:]
            with self._lock:
                self._waits -= count
