"""Swarm tokens: the right to fetch one blob, for one distribution, until a time.

Precache mints them with a key that it makes for each blob; whoever serves the blob knows the key
and checks a token without asking anybody. No agent ever holds a credential of the cloud.
The distribution is inside, so a sender can say which distribution its bytes went to. Whoever serves
a blob could sign anything, so what is signed is still read as a stranger's.
"""

import base64
import binascii
import hashlib
import hmac
import uuid
from dataclasses import dataclass
from typing import Final

KEY_BYTES: Final = 32
_MAC_BYTES: Final = 16
_MAX_TOKEN_CHARACTERS: Final = 512


class TokenError(ValueError):
    """A token that opens nothing; the text says why and holds none of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """What a token allows: this blob, on behalf of this distribution, until this Unix time."""

    blob_id: str
    distribution_id: str
    expires_at: int


def mint(grant: Grant, key: bytes) -> str:
    """The token for a grant, in characters that fit a header and a URL."""
    body = f"{grant.blob_id}.{grant.distribution_id}.{grant.expires_at}"
    mac = base64.urlsafe_b64encode(_mac(body, key)).decode("ascii").rstrip("=")
    return f"{body}.{mac}"


def verify(token: str, key: bytes, *, blob_id: str, now: float) -> Grant:
    """The grant in a token for this blob.

    Raises:
        TokenError: malformed, not signed with this key, for another blob, or expired.
    """
    parts = token.split(".")
    if len(token) > _MAX_TOKEN_CHARACTERS or len(parts) != 4 or not token.isascii():
        raise TokenError("the token is malformed")
    blob, distribution, expires, mac = parts
    try:
        given = base64.urlsafe_b64decode(mac + "=" * (-len(mac) % 4))
        expires_at = int(expires)
        is_id = str(uuid.UUID(distribution)) == distribution
    except (binascii.Error, ValueError) as exc:
        raise TokenError("the token is malformed") from exc
    if not is_id:  # what is sent for it is told to precache under that id
        raise TokenError("the token is malformed")
    if not hmac.compare_digest(given, _mac(f"{blob}.{distribution}.{expires}", key)):
        raise TokenError("the token is not signed with the key of this swarm")
    if blob != blob_id:
        raise TokenError("the token is for another blob")
    if expires_at <= now:
        raise TokenError("the token has expired")
    return Grant(blob_id=blob, distribution_id=distribution, expires_at=expires_at)


def _mac(body: str, key: bytes) -> bytes:
    return hmac.new(key, body.encode(), hashlib.sha256).digest()[:_MAC_BYTES]
