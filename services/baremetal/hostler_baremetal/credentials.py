"""Secrets of BMCs at rest: AES-256-GCM under a key from a file, bound to the node they belong to.

The file has a line a key, `id:base64 of 32 bytes`. The first key seals; all of them open, so that
a key is changed by putting a new line in front. A sealed value names its key and is of use with its
own node only: moved to another row it does not open.

Invariant: a secret in clear exists only between `open` and the login that needs it.
"""

import base64
import binascii
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Final, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_NONCE_BYTES: Final = 12
_KEY_BYTES: Final = 32


class KeyFileError(ValueError):
    """The key file cannot be used; the message never holds what is in it."""


class Unopenable(ValueError):
    """A sealed value cannot be opened: another key, another node, or damage."""


class Vault:
    """Seals and opens secrets."""

    def __init__(
        self, keys: Mapping[str, bytes], *, entropy: Callable[[int], bytes] = os.urandom
    ) -> None:
        if not keys:
            raise KeyFileError("there is no key")
        self._keys = {name: AESGCM(key) for name, key in keys.items()}
        self._sealing = next(iter(keys))
        self._entropy = entropy

    @classmethod
    def read(cls, path: pathlib.Path) -> Self:
        """Reads a key file. Raises KeyFileError, naming the line that is wrong."""
        try:
            text = path.read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError) as exc:
            raise KeyFileError(f"the key file cannot be read: {type(exc).__name__}") from exc
        keys: dict[str, bytes] = {}
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip() or line.startswith("#"):
                continue
            name, _, encoded = line.strip().partition(":")
            try:
                key = base64.b64decode(encoded, validate=True)
            except binascii.Error as exc:
                raise KeyFileError(f"line {number} of the key file is not base64") from exc
            if not name or len(key) != _KEY_BYTES or name in keys:
                raise KeyFileError(f"line {number} of the key file is not id:base64 of 32 bytes")
            keys[name] = key
        return cls(keys)

    def seal(self, secret: str | bytes, *, belongs_to: str) -> bytes:
        """Returns the secret sealed with the first key, for `belongs_to` only."""
        plain = secret.encode() if isinstance(secret, str) else secret
        nonce = self._entropy(_NONCE_BYTES)
        name = self._sealing.encode()
        sealed = self._keys[self._sealing].encrypt(nonce, plain, belongs_to.encode())
        return bytes([len(name)]) + name + nonce + sealed

    def open(self, sealed: bytes, *, belongs_to: str) -> bytes:
        """Returns the secret. Raises Unopenable."""
        size = sealed[0] if sealed else 0
        name = sealed[1 : 1 + size].decode("ascii", errors="replace")
        nonce = sealed[1 + size : 1 + size + _NONCE_BYTES]
        key = self._keys.get(name)
        if key is None or len(nonce) != _NONCE_BYTES:
            raise Unopenable(f"no key {name!r} in the key file")
        try:
            return key.decrypt(nonce, sealed[1 + size + _NONCE_BYTES :], belongs_to.encode())
        except InvalidTag as exc:
            raise Unopenable("the sealed value is damaged or of another node") from exc


def new_key_line(name: str) -> str:
    """Returns a fresh line for a key file."""
    return f"{name}:{base64.b64encode(os.urandom(_KEY_BYTES)).decode()}"
