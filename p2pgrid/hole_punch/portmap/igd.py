"""Write and read what is said with a gateway's UPnP service (WANIPConnection 1 and 2).

Pure.  A search by UDP, its answer, the gateway's description (XML over HTTP), and three calls (SOAP):

    M-SEARCH ──> LOCATION of the description ──> GET it ──> control URL of a WAN connection ──> POST calls

Whatever a gateway says is a stranger's: no address but its own is asked, documents with a document
type (and so with entities) are refused before they are parsed, and bodies are bounded by the caller.
"""

from __future__ import annotations

import urllib.parse
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping
from xml.sax.saxutils import escape

import attrs

from p2pgrid.errors import BadFrame

GROUP, PORT = "239.255.255.250", 1900
DEVICES = tuple(f"urn:schemas-upnp-org:device:InternetGatewayDevice:{n}" for n in (1, 2))
SERVICES = tuple(
    f"urn:schemas-upnp-org:service:{name}"
    for name in ("WANIPConnection:2", "WANIPConnection:1", "WANPPPConnection:1")
)
"""Those that map ports, best first."""

NO_SUCH_ENTRY, CONFLICT, CONFLICT_ELSEWHERE, ONLY_PERMANENT = 714, 718, 729, 725


@attrs.frozen
class Service:
    """Where and as what a gateway takes calls."""

    host: str
    port: int
    target: str
    kind: str


@attrs.frozen(kw_only=True, slots=False)
class Fault(Exception):
    """The gateway refused a call."""

    code: int
    why: str

    def __str__(self) -> str:
        return f"{self.why or 'refused'} ({self.code})"


def search(device: str) -> bytes:
    lines = ("M-SEARCH * HTTP/1.1", f"HOST: {GROUP}:{PORT}", 'MAN: "ssdp:discover"', "MX: 1", f"ST: {device}")
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode()


def found(data: bytes, gateway: str) -> str:
    """The URL of `gateway`'s description in an answer to a search.  Raises `BadFrame`."""
    head, *lines = data.decode("latin-1").split("\r\n")
    if not head.startswith("HTTP/1.1 200"):
        raise BadFrame(why="no answer to a search")
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip().lower() == "location":
            place_of(value.strip(), gateway)
            return value.strip()
    raise BadFrame(why="an answer that names no description")


def service_of(description: bytes, url: str, gateway: str) -> Service:
    """What maps ports, in the description that came from `url`.  Raises `BadFrame`."""
    root = _parse(description)
    base = next((text for name, text in _texts(root) if name == "URLBase"), "") or url
    for wanted in SERVICES:
        for element in root.iter():
            if _bare(element.tag) != "service":
                continue
            facts = dict(_texts(element))
            if facts.get("serviceType") == wanted and facts.get("controlURL"):
                host, port, target = place_of(_joined(base, facts["controlURL"]), gateway)
                return Service(host, port, target, wanted)
    raise BadFrame(why="its description has no service that maps ports")


def request(service: Service, action: str, args: Mapping[str, str]) -> tuple[dict[str, str], bytes]:
    """Headers and body of a call."""
    inner = "".join(f"<{name}>{escape(value)}</{name}>" for name, value in args.items())
    body = (
        '<?xml version="1.0"?>\r\n'
        '<s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/" '
        's:encodingStyle="http://schemas.xmlsoap.org/soap/encoding/"><s:Body>'
        f'<u:{action} xmlns:u="{service.kind}">{inner}</u:{action}></s:Body></s:Envelope>\r\n'
    ).encode()
    headers = {"Content-Type": 'text/xml; charset="utf-8"', "SOAPAction": f'"{service.kind}#{action}"'}
    return headers, body


def answer(status: int, body: bytes) -> dict[str, str]:
    """What a call came to, by name.  Raises `Fault` where it was refused, `BadFrame` for nonsense."""
    if status not in (200, 500):
        raise BadFrame(why=f"its service answers with status {status}")
    facts = dict(_texts(_parse(body)))
    if status == 500:
        code = facts.get("errorCode", "")
        if not (code.isascii() and code.isdigit() and len(code) < 6):
            raise BadFrame(why="a fault without a code")
        raise Fault(code=int(code), why=facts.get("errorDescription", "")[:80])
    return facts


def _parse(data: bytes) -> ElementTree.Element:
    try:
        text = data.decode("utf-8-sig")
        if "<!DOCTYPE" in text.upper():
            raise BadFrame(why="a document with a type of its own")
        return ElementTree.fromstring(text)
    except (ValueError, ElementTree.ParseError) as broken:
        raise BadFrame(why=f"no XML: {broken}") from None


def _texts(root: ElementTree.Element) -> Iterator[tuple[str, str]]:
    for element in root.iter():
        yield _bare(element.tag), (element.text or "").strip()


def _bare(tag: str) -> str:
    return tag.rpartition("}")[2]


def _joined(base: str, url: str) -> str:
    try:
        return urllib.parse.urljoin(base, url)
    except ValueError as broken:
        raise BadFrame(why=f"no URL: {broken}") from None


def place_of(url: str, gateway: str) -> tuple[str, int, str]:
    """Host, port and target of a URL of `gateway`'s.  Raises `BadFrame` for anybody else's."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname or "", parts.port or 80
    except ValueError as broken:
        raise BadFrame(why=f"no URL: {broken}") from None
    if parts.scheme != "http" or host != gateway or parts.username is not None:
        raise BadFrame(why="it names a place that is not its own")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if not target.isascii() or not target.isprintable() or " " in target:
        raise BadFrame(why="it names a place that no request can name")
    return host, port, target
