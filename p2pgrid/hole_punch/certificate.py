"""Make the certificate of one process, and the two TLS contexts that use it.

Nobody vouches for it: it is self-signed, its dates and its name mean nothing, and its key lives as long
as the process.  TLS proves that who accepted a connection has that key; whose it is, the *greeting* says
(`greeting.py`), in which each side signs the certificate with the key of its peer id.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import ssl
from collections.abc import Iterator

import attrs
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@attrs.frozen
class Certificate:
    """A self-signed certificate and what TLS does with it."""

    der: bytes
    accepting: ssl.SSLContext = attrs.field(repr=False)
    """Of the side that accepts: shows the certificate, asks for none."""
    dialling: ssl.SSLContext = attrs.field(repr=False)
    """Of the side that dials: takes any certificate, shows none."""

    @classmethod
    def make(cls) -> Certificate:
        """Raises `OSError` where the process has no file descriptor left."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "p2pgrid")])
        made = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(datetime.datetime(2000, 1, 1))  # a volunteer's clock may be wrong
            .not_valid_after(datetime.datetime(9999, 12, 31))
            .sign(key, hashes.SHA256())
        )
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        accepting, dialling = _context(ssl.PROTOCOL_TLS_SERVER), _context(ssl.PROTOCOL_TLS_CLIENT)
        accepting.num_tickets = 0  # sessions are never resumed
        with _file_of(made.public_bytes(serialization.Encoding.PEM) + private) as path:
            accepting.load_cert_chain(path)
        return cls(made.public_bytes(serialization.Encoding.DER), accepting, dialling)


def _context(role: int) -> ssl.SSLContext:
    context = ssl.SSLContext(role)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # not by whom it is signed: what the greeting says of it counts
    return context


@contextlib.contextmanager
def _file_of(secret: bytes) -> Iterator[str]:
    """A path under which `secret` can be read for a moment: ssl reads keys from files only.

    In memory, so that no key lies on a disk and a full disk ends no link.
    """
    fd = os.memfd_create("p2pgrid-key", os.MFD_CLOEXEC)
    with os.fdopen(fd, "wb") as file:
        file.write(secret)
        file.flush()
        yield f"/proc/self/fd/{fd}"
