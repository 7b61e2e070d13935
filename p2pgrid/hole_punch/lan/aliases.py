"""Give names beyond the LAN addresses in it, so that programs which know only addresses can connect.

Pure.  10.77.255.1 to .254 are nobody's place (`segment.py`).  Each name on the grid that a guest asks for
gets one of them; a connection to it is taken by the node, which knows by it the name.  Where there are more
names, the one that was asked for least lately gives its address up.
"""

from __future__ import annotations

import collections
import re

START = bytes((10, 77, 255))
NAMES_MAX = 254
NAME_MAX = 253
_NAME = re.compile(r"([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?\.)+grid")


def is_alias(ip: bytes) -> bool:
    return ip[:3] == START and 0 < ip[3] < 255


def is_name(name: str) -> bool:
    """Whether `name`, in lower case, is one on the grid."""
    return len(name) <= NAME_MAX and _NAME.fullmatch(name) is not None


class Aliases:
    """The names of one segment, as this node gives them."""

    def __init__(self) -> None:
        self._by_name: collections.OrderedDict[str, bytes] = collections.OrderedDict()
        self._by_ip: dict[bytes, str] = {}

    def ip_of(self, name: str) -> bytes | None:
        """The address of `name`, in lower case; None where it is no name on the grid."""
        if not is_name(name):
            return None
        if name not in self._by_name:
            if len(self._by_name) < NAMES_MAX:
                ip = START + bytes((1 + len(self._by_name),))
            else:
                _, ip = self._by_name.popitem(last=False)
            self._by_name[name] = ip
            self._by_ip[ip] = name
        self._by_name.move_to_end(name)
        return self._by_name[name]

    def name_of(self, ip: bytes) -> str | None:
        return self._by_ip.get(ip)
