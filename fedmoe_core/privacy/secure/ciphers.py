"""The primitives of secure aggregation, all of the package cryptography: agree, sign, seal, expand."""

from __future__ import annotations

import numpy as np
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

CHUNK = 1 << 17  # words of a mask that are made at once, 1 MB
NOTHING = memoryview(bytes(8 * CHUNK))  # encrypted, it is the key stream


def public_of(secret: bytes) -> bytes:
    """Return the X25519 public key of a secret key, 32 bytes each."""
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def agreed(secret: bytes, public: bytes, purpose: bytes) -> bytes:
    """Return the 32 bytes that both owners of two X25519 key pairs get for one purpose (RFC 7748, RFC 5869).

    Raises:
        ValueError: ``public`` is not a key, or one of the few that would make the result known to all.
    """
    shared = X25519PrivateKey.from_private_bytes(secret).exchange(X25519PublicKey.from_public_bytes(public))
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=purpose).derive(shared)


def identity_of(secret: bytes) -> bytes:
    """Return the Ed25519 public key by which others know the owner of a secret key, 32 bytes each."""
    return Ed25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def signature(secret: bytes, message: bytes) -> bytes:
    """Sign by Ed25519."""
    return Ed25519PrivateKey.from_private_bytes(secret).sign(message)


def is_signed(identity: bytes, signed: bytes, message: bytes) -> bool:
    """Tell whether the owner of ``identity`` signed exactly this message."""
    try:
        Ed25519PublicKey.from_public_bytes(identity).verify(signed, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def seal(key: bytes, plain: bytes, about: bytes) -> bytes:
    """Encrypt so that changes show, bound to ``about``; a key seals one message only, so its nonce is zero."""
    return ChaCha20Poly1305(key).encrypt(bytes(12), plain, about)


def unseal(key: bytes, sealed: bytes, about: bytes) -> bytes:
    """Invert ``seal``.

    Raises:
        ValueError: another key, another ``about``, or changed bytes.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), sealed, about)
    except InvalidTag:
        raise ValueError("a sealed message was changed or is for another receiver; send it again") from None


class KeyStream:
    """The key stream of AES-256 in counter mode, read as little-endian words of 64 bits, from its beginning.

    Args:
        key: 32 bytes; a key is for one stream.
    """

    def __init__(self, key: bytes) -> None:
        self._cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def words(self, count: int) -> np.ndarray:
        """Return the next ``count`` words, uint64."""
        buffer = np.empty(8 * count + 15, dtype=np.uint8)  # the cipher wants room for a block more
        for start in range(0, 8 * count, len(NOTHING)):
            self._cipher.update_into(NOTHING[: 8 * count - start], buffer.data[start:])
        return buffer[: 8 * count].view("<u8")


def add_mask(total_N: np.ndarray, seed: bytes, *, minus: bool) -> None:
    """Add the mask of a seed to words modulo 2^64, or take it off, in place.

    Args:
        total_N: uint64, changed in place.
        seed: 32 bytes; its key stream masks one vector only.
        minus: take the mask off.
    """
    stream = KeyStream(seed)
    for start in range(0, len(total_N), CHUNK):
        part = total_N[start : start + CHUNK]
        if minus:
            part -= stream.words(len(part))
        else:
            part += stream.words(len(part))
