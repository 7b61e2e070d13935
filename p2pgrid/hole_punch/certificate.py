"""Make the certificate of one process, and TLS contexts that accept pinned ones only.

Peers exchange certificates over a control channel whose ends libp2p has authenticated, and
pin the very bytes; so it is self-signed, its dates mean nothing, and its key lives as long as
the process.  Its name is the peer id, so that nobody passes another's certificate off as his.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import ssl
from collections.abc import Iterable, Iterator

import attrs
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from p2pgrid.ids import PeerId

CERTIFICATE_MAX = 4096
"""Bytes in DER; ours have about 400."""


@attrs.frozen
class Certificate:
    """A self-signed certificate and its key."""

    der: bytes
    pem: bytes = attrs.field(repr=False)
    """Certificate and private key."""

    @classmethod
    def make(cls, peer: PeerId) -> Certificate:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, peer)])
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
        public = made.public_bytes(serialization.Encoding.PEM)
        return cls(made.public_bytes(serialization.Encoding.DER), public + private)

    def context(self, *, server: bool, pinned: Iterable[bytes]) -> ssl.SSLContext:
        """A TLS 1.3 context that shows this certificate and accepts only `pinned` ones (DER).

        The chain check lets a stranger go no further than the handshake; which of the pinned
        peers it is, the caller must still find out by comparing `getpeercert(binary_form=True)`.
        Raises `OSError` where the process has no file descriptor left.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        if server:
            context.num_tickets = 0  # sessions are never resumed
        for der in pinned:
            context.load_verify_locations(cadata=der)
        with _file_of(self.pem) as path:
            context.load_cert_chain(path)
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


def belongs(der: bytes, peer: PeerId) -> bool:
    """Whether `der` is a certificate that its key's owner made for `peer`."""
    if len(der) > CERTIFICATE_MAX:
        return False
    try:
        certificate = x509.load_der_x509_certificate(der)
        certificate.verify_directly_issued_by(certificate)
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        key = certificate.public_key()
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return (
        [name.value for name in names] == [peer]
        and isinstance(key, ec.EllipticCurvePublicKey)
        and isinstance(key.curve, ec.SECP256R1)
    )
