"""Say who this node is: a key that is made once and never leaves its file.

A key file holds 32 secret bytes, an Ed25519 seed, readable by its owner only.  It appears
whole or not at all, and is never overwritten.  The peer id is computed here, without libp2p,
because the command line shows it:

    base58btc( 0x00 0x24 | 0x08 0x01 0x12 0x20 | public key (32 bytes) )
               identity     protobuf PublicKey: type Ed25519, 32 bytes of data
               multihash

Source: the libp2p peer id specification.
"""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

import attrs
from nacl.signing import SigningKey

from p2pgrid.errors import Misconfigured
from p2pgrid.ids import PeerId

SEED_SIZE = 32
IDENTITY_FILE = "identity.key"
ROOT_FILE = "root.key"

_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_PEER_ID_PREFIX = bytes.fromhex("002408011220")


@attrs.frozen
class Identity:
    """A node's key, and what follows from it."""

    seed: bytes = attrs.field(repr=False)

    @classmethod
    def load_or_create(cls, folder: Path) -> Identity:
        """The identity kept in `folder`.  Raises `Misconfigured` when its file is not fit for a secret."""
        return cls(load_or_create_key(folder / IDENTITY_FILE))

    @property
    def signing_key(self) -> SigningKey:
        return SigningKey(self.seed)

    @property
    def peer(self) -> PeerId:
        return peer_id(bytes(self.signing_key.verify_key))


def load_or_create_root(folder: Path) -> bytes:
    """The seed of the key that signs a grid's tickets; only its coordinator has one."""
    return load_or_create_key(folder / ROOT_FILE)


def load_or_create_key(path: Path) -> bytes:
    """The secret in `path`, made now if there is none; of two who make it at once, both get the same."""
    try:
        return _load(path)
    except FileNotFoundError:
        pass
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _create(path, secrets.token_bytes(SEED_SIZE))
        return _load(path)
    except OSError as refused:
        raise Misconfigured(why=f"cannot keep a key in {path}: {refused.strerror}") from None


def peer_id(public_key: bytes) -> PeerId:
    """The libp2p peer id of a 32-byte Ed25519 public key."""
    assert len(public_key) == 32
    data = _PEER_ID_PREFIX + public_key
    number, text = int.from_bytes(data, "big"), ""
    while number:
        number, digit = divmod(number, 58)
        text = _BASE58[digit] + text
    zeros = len(data) - len(data.lstrip(b"\0"))
    return PeerId(_BASE58[0] * zeros + text)


def _load(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            seed = file.read(SEED_SIZE + 1)
    except FileNotFoundError:
        raise
    except OSError as refused:
        raise Misconfigured(why=f"cannot read the key in {path}: {refused.strerror}") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise Misconfigured(why=f"others may read the key in {path}: chmod 600 it")
    if len(seed) != SEED_SIZE:
        raise Misconfigured(why=f"{path} is not a key of {SEED_SIZE} bytes")
    return seed


def _create(path: Path, seed: bytes) -> None:
    """`seed` in `path`, whole and on the disk, unless somebody was faster."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(seed)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)
        except FileExistsError:
            return
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        draft.unlink()
