"""Keep from a person's terminal what would steer it: names and consoles are written by others.

Pure.  A control character can move the cursor, forge a line, rename the window, or on some terminals
type; a direction mark (Unicode bidi, CVE-2021-42574) makes a name read as another.
"""

from __future__ import annotations

import re
from typing import Any


def plain(text: str) -> str:
    """`text` on one line, every character visible: what is not is written as Python would write it."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def cleaned(value: Any) -> Any:
    """An answer in which every text is plain."""
    match value:
        case str():
            return plain(value)
        case dict():
            return {cleaned(key): cleaned(item) for key, item in value.items()}
        case list() | tuple():
            return [cleaned(item) for item in value]
        case _:
            return value


def console(text: str) -> str:
    """What a machine wrote to its console, as lines: colours and cursor movements are left out."""
    lines = _SEQUENCE.sub("", text.replace("\r\n", "\n").replace("\r", "\n")).split("\n")
    return "\n".join(plain(line.replace("\t", "    ")) for line in lines)


_SEQUENCE = re.compile(
    "\x1b\\[[0-?]{0,64}[ -/]{0,8}[@-~]"  # CSI: colours, cursor
    "|\x1b[\\]PX^_][^\x07\x1b\n]{0,4096}(?:\x07|\x1b\\\\)"  # strings: titles, links
    "|\x1b[ -/]{0,8}[0-~]"  # the others (ECMA-48, 5.3)
)
