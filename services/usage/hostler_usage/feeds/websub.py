"""WebSub as a hub speaks it (W3C Recommendation of 23 January 2018): requests, verification, signatures.

Pure: what to send, and what an answer means. What is sent is `hub_deliver`'s work.
"""

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final
from urllib.parse import urlencode, urlsplit

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

MAX_URL_LENGTH: Final = 1000
MAX_SECRET_BYTES: Final = 199  # section 5.1: less than 200
BACKOFF_SECONDS: Final = (5, 15, 45, 120, 300, 900, 1800, 3600)
"""How long the hub waits after the first, second, ... failure in a row; after the last, as long as then."""

_URL: Final = re.compile(r"[\x21\x23-\x3b\x3d\x3f-\x5b\x5d\x5f\x61-\x7a\x7e]+", re.ASCII)
_EMBEDDED_IPV4: Final = ipaddress.ip_network("64:ff9b::/96")  # NAT64, RFC 6052


class BadRequestError(ValueError):
    """A subscription request that cannot be meant; the text says why."""


class Mode(StrEnum):
    """What a subscriber asks for."""

    SUBSCRIBE = "subscribe"
    UNSUBSCRIBE = "unsubscribe"


class Outcome(StrEnum):
    """What a subscriber's answer to a delivery means."""

    DELIVERED = "delivered"
    GONE = "gone"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The bounds of how long a subscription lasts without being renewed, in seconds."""

    least: int = 300
    usual: int = 86_400
    most: int = 864_000

    def seconds(self, asked: int | None, token_lasts: int | None = None) -> int:
        """How long a subscription lasts: what was asked for, within the bounds; never for ever.

        `token_lasts` is for how long the token is good that was shown, where it ends by itself: what
        its holder may see cannot be asked after that, so the subscription ends with it.
        """
        granted = self.usual if asked is None else max(self.least, min(asked, self.most))
        return granted if token_lasts is None else max(1, min(granted, token_lasts))


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request to subscribe or to unsubscribe; `lease_seconds` is what was asked for."""

    mode: Mode
    topic: str
    callback: str
    lease_seconds: int | None = None
    secret: str | None = None


def read_request(
    *,
    mode: str | None,
    topic: str | None,
    callback: str | None,
    lease_seconds: str | None = None,
    secret: str | None = None,
) -> Request:
    """The request that the parameters make.

    Raises:
        BadRequestError: one is missing or wrong.
    """
    if mode not in tuple(Mode):
        raise BadRequestError("hub.mode must be subscribe or unsubscribe")
    seconds = None
    # section 5.1: to be ignored where it is about unsubscribing
    if lease_seconds and mode == Mode.SUBSCRIBE:
        if not re.fullmatch(r"[0-9]{1,18}", lease_seconds) or not int(lease_seconds):
            raise BadRequestError("hub.lease_seconds must be a positive decimal integer")
        seconds = int(lease_seconds)
    if secret is not None and (len(_encoded(secret)) > MAX_SECRET_BYTES or "\x00" in secret):
        raise BadRequestError("hub.secret must have less than 200 bytes and no NUL")
    return Request(
        mode=Mode(mode),
        topic=_url("hub.topic", topic),
        callback=_url("hub.callback", callback),
        lease_seconds=seconds,
        secret=secret or None,
    )


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as exc:
        raise BadRequestError("hub.secret must be text in UTF-8") from exc


def _url(name: str, text: str | None) -> str:
    if not text:
        raise BadRequestError(f"{name} is missing")
    if len(text) > MAX_URL_LENGTH or not _URL.fullmatch(text):
        raise BadRequestError(
            f"{name} must be an address of at most {MAX_URL_LENGTH} characters, percent-encoded"
        )
    try:
        parts = urlsplit(text)
        is_whole = parts.scheme in ("http", "https") and bool(parts.hostname)
        is_plain = parts.username is None and parts.password is None and parts.port != 0
    except ValueError as exc:
        raise BadRequestError(f"{name} is no address: {exc}") from exc
    if not is_whole or not is_plain or "#" in text:
        raise BadRequestError(f"{name} must be http(s)://host/..., without user and fragment")
    return text


# --- verification of intent, section 5.3


def verification_url(
    callback: str, *, mode: Mode, topic: str, challenge: str, lease_seconds: int
) -> str:
    """Where to ask the subscriber whether the request was its own. The callback's query stays as it is."""
    return _with(
        callback,
        {
            "hub.mode": str(mode),
            "hub.topic": topic,
            "hub.challenge": challenge,
            "hub.lease_seconds": str(lease_seconds),
        },
    )


def denial_url(callback: str, *, topic: str, reason: str) -> str:
    """Where to tell a subscriber that its subscription is denied (section 5.2)."""
    return _with(callback, {"hub.mode": "denied", "hub.topic": topic, "hub.reason": reason})


def _with(callback: str, parameters: dict[str, str]) -> str:
    return f"{callback}{'&' if '?' in callback else '?'}{urlencode(parameters)}"


def is_verified(status: int, body: bytes, challenge: str) -> bool:
    """Whether the subscriber's answer confirms: 2xx, and the challenge as its body. Redirects do not."""
    return 200 <= status < 300 and hmac.compare_digest(body, challenge.encode())


# --- what a subscription may see


def present_scope(
    granted: frozenset[str] | None, named: Sequence[frozenset[str] | None]
) -> frozenset[str] | None:
    """What is left of what its maker might see when it subscribed; None is every project.

    `named` is what each of the tokens may see that bear the maker's name now. A subscription never
    sees more than its maker did: for that it is renewed.
    """
    if any(projects is None for projects in named):
        return granted
    present = frozenset(project for projects in named if projects for project in projects)
    return present if granted is None else granted & present


# --- delivery, sections 7 and 8


def signature(secret: str, body: bytes) -> str:
    """The value of `X-Hub-Signature` for a body."""
    return f"sha256={hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()}"


def outcome(status: int) -> Outcome:
    """What an answer's status means: any 2xx is a success, 410 the end, all others (3xx too) are failures."""
    if 200 <= status < 300:
        return Outcome.DELIVERED
    return Outcome.GONE if status == 410 else Outcome.FAILED


def backoff_seconds(failures: int, spread: float) -> float:
    """How long to wait after so many failures in a row, one at least.

    `spread`, from 0 to 1, moves it between three quarters and five quarters of the table's, so that
    subscribers that failed together are not called together.
    """
    usual = BACKOFF_SECONDS[min(max(failures, 1), len(BACKOFF_SECONDS)) - 1]
    return usual * (0.75 + spread / 2)


# --- which addresses a hub calls


def may_call(address: Address, allowed: Sequence[Network] = ()) -> bool:
    """Whether the hub may call an address that a stranger named.

    Not this machine, its link (where clouds serve metadata), multicast, or what is no host's; nor
    one of these behind an IPv6 address that stands for an IPv4 one. Private networks are where
    subscribers of a private cloud live, and may be called. `allowed` networks may be, whatever they
    are.
    """
    if any(address.version == network.version and address in network for network in allowed):
        return True
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is None and address in _EMBEDDED_IPV4:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return may_call(inner, allowed)
        if address.teredo is not None:  # nobody's subscriber is there
            return False
    return not (
        address.is_loopback
        or address.is_link_local
        or address.is_multicast
        or address.is_unspecified
        or address.is_reserved
        or (address.version == 4 and int(address) >> 24 == 0)
    )
