"""Say by which proxy an origin is reached, as the usual environment variables have it.

Pure.  `https_proxy` or `http_proxy`, by the origin's scheme, else `all_proxy`; in small letters first,
else in capitals.  None where `no_proxy` names the origin, and none to this computer itself.  Only
proxies that are spoken to in plain HTTP: for `https` they carry bytes that they cannot read (CONNECT;
RFC 9110, section 9.3.6), so what they see is the origin's name.
"""

from __future__ import annotations

import base64
import ipaddress
from collections.abc import Mapping
from urllib.parse import unquote, urlsplit

import attrs

from p2pgrid.errors import Misused
from p2pgrid.transfer.ranges import HOST, Site


@attrs.frozen
class Proxy:
    """Where it is."""

    host: str
    port: int
    authorization: str | None = attrs.field(repr=False, default=None)

    @property
    def shown(self) -> str:
        """For people and logs: without what is secret."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    @property
    def headers(self) -> dict[str, str]:
        """What it is told with each request that it can read."""
        return {"Proxy-Authorization": self.authorization} if self.authorization else {}


def proxy_for(site: Site, environ: Mapping[str, str]) -> Proxy | None:
    """The proxy by which `site` is asked; None: it is asked itself.

    Raises `Misused` where a variable says something else than a proxy that can be used: going past it would
    not be what its owner wanted.
    """
    name, text = next(
        ((name, text) for name in (f"{site.scheme}_proxy", "all_proxy") if (text := _said(environ, name))),
        ("", ""),
    )
    if not text or _is_here(site.host) or _excepted(site, _said(environ, "no_proxy")):
        return None
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        host, port = (parts.hostname or "").encode("idna").decode(), parts.port or 80
    except ValueError:  # UnicodeError, too
        host, port, parts = "", 0, None
    if parts is None or not HOST.fullmatch(host) or parts.scheme != "http":
        raise Misused(why=f"{name} is not http://HOST:PORT; other proxies are not supported")
    secret = None
    if parts.username is not None:
        words = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        secret = "Basic " + base64.b64encode(words).decode()
    return Proxy(host, port, secret)


def _said(environ: Mapping[str, str], name: str) -> str:
    """What a variable says, if it is there in small letters or in capitals; empty counts as absent."""
    return (environ.get(name) or environ.get(name.upper()) or "").strip()


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _is_here(host: str) -> bool:
    address = _address(host)
    return address.is_loopback if address else host in ("localhost", "localhost.")


def _excepted(site: Site, listed: str) -> bool:
    """Whether a `no_proxy` of names, addresses and networks has `site`; a name stands for all below it."""
    return any(_is_meant(entry.strip().lower(), site) for entry in listed.split(",") if entry.strip())


def _is_meant(entry: str, site: Site) -> bool:
    host, address = site.host.lower().rstrip("."), _address(site.host)
    if entry == "*":
        return True
    if address is not None:
        try:
            return address in ipaddress.ip_network(entry, strict=False)
        except ValueError:
            return entry in (site.authority, f"{host}:{site.port}", f"[{host}]", f"[{host}]:{site.port}")
    name, _, port = entry.partition(":")
    name = name.removeprefix("*").strip(".")
    return (not port or port == str(site.port)) and (host == name or host.endswith(f".{name}"))
