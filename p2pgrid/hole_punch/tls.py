"""Seal and open the bytes of one TCP socket, many TLS records at a time.

`ssl.SSLSocket` makes one system call for each record of 16 KiB it writes and two for each it
reads, and each record wakes the other side.  So here OpenSSL works between two buffers in memory,
and the socket is read and written in large pieces:

    socket ──> incoming ──> records opened ──> `read`
    socket <── outgoing <── records sealed <── `seal`; `flush` sends them

Nothing here waits; not thread-safe.  Its errors are `OSError`, of which `ssl.SSLError` is one.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import struct

RECORD = 16 << 10
"""Bytes in one record, at most."""
READ = 256 << 10
"""Bytes taken from the socket at once: what came while others had the processor."""


class Tls:
    """One TLS connection; closes `sock`, which must not block."""

    def __init__(self, context: ssl.SSLContext, sock: socket.socket, *, server: bool) -> None:
        self.socket = sock
        self.more = True
        """Whether `read` may bring something before the socket becomes readable again."""
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server)
        self._raw = memoryview(bytearray(READ))
        self._unsent = memoryview(b"")

    def fileno(self) -> int:
        return self.socket.fileno()

    def close(self) -> None:
        self.socket.close()

    def abort(self) -> None:
        """Close so that nothing of the connection stays: punching the next one takes its ports at once."""
        with contextlib.suppress(OSError):  # it has ended by itself
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def end(self) -> None:
        """Tell the other side that this is the end, if the socket takes it now; not more than that."""
        with contextlib.suppress(ssl.SSLError):  # it wants to hear the other side say so, too
            self._tls.unwrap()
        self.flush()

    @property
    def certificate(self) -> bytes | None:
        """What the other side showed, in DER."""
        return self._tls.getpeercert(binary_form=True)

    def shake(self) -> int:
        """Go on with the handshake; what to poll for before the next call, 0 when it is done."""
        while True:
            try:
                self._tls.do_handshake()
                return 0 if self.flush() else select.POLLOUT
            except ssl.SSLWantReadError:
                if not self.flush():
                    return select.POLLOUT
                try:
                    self._take(READ)
                except BlockingIOError:
                    return select.POLLIN
            except ssl.SSLError:
                self.flush()  # the alert that tells the other side why
                raise

    def read(self, view: memoryview, most: int = READ) -> int:
        """Fill `view` with what has come, at most `most` bytes of it from the socket; 0: nothing yet.

        Raises `EOFError` at the end of the stream; with a word of it where the other side ended it in
        good order, with none where the connection just ended.
        """
        got, size = 0, len(view)
        self.more, taken = True, False
        while got < size:
            try:
                count: int = self._tls.read(size - got, view[got:])  # type: ignore[assignment]
                if count == 0:  # the other side has said that this is the end
                    if got:
                        break  # it is found again by the next call
                    raise EOFError("the peer closed the link")
                got += count
            except ssl.SSLWantReadError:
                if taken or got:  # the rest another time: what came is still in the processor's cache
                    break
                try:
                    taken, self.more = True, self._take(most) == most
                except BlockingIOError:
                    self.more = False
                    break
        else:
            self.more = True
        return got

    def seal(self, data: bytes | memoryview) -> None:
        """Encrypt `data`, in as many records as it takes; `flush` sends them."""
        count = self._tls.write(data)
        assert count == len(data), "memory takes all of it"

    def flush(self) -> bool:
        """Send what was sealed; False where the socket takes no more for now."""
        while True:
            if not self._unsent:
                if not self._outgoing.pending:
                    return True
                self._unsent = memoryview(self._outgoing.read())
            try:
                count = self.socket.send(self._unsent)
            except BlockingIOError:
                return False
            self._unsent = self._unsent[count:]

    def _take(self, most: int) -> int:
        count = self.socket.recv_into(self._raw[:most])
        if count == 0:
            raise EOFError
        self._incoming.write(self._raw[:count])
        return count
