"""Calls to addresses that subscribers named: bounded in time and size, without redirects, never to this machine.

The address is judged where it is connected to, not where it is asked for: a name that resolves to
something else a moment later gains nothing.
"""

import asyncio
import errno
import ipaddress
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
from yarl import URL

from hostler_usage.feeds import websub
from hostler_usage.feeds.websub import Network

CALL_SECONDS: Final = 10.0
_ANSWER_BYTES: Final = 1024
_AGENT: Final = "hostler-usage (WebSub hub)"


class CallFailedError(Exception):
    """No answer came; the text says why, for the subscription's owner."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a subscriber answered; of a long body the beginning."""

    status: int
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Callbacks:
    """Calls subscribers. Made by `open_callbacks`."""

    session: aiohttp.ClientSession = field(repr=False)

    async def get(self, url: str) -> Answer:
        """The answer to a GET.

        Raises:
            CallFailedError: none came.
        """
        return await self._call("GET", url, b"", {})

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """The answer to a POST.

        Raises:
            CallFailedError: none came.
        """
        return await self._call("POST", url, body, headers)

    async def _call(
        self, method: str, url: str, body: bytes, headers: Mapping[str, str]
    ) -> Answer:
        try:
            async with (
                asyncio.timeout(CALL_SECONDS),
                self.session.request(
                    method,
                    URL(url, encoded=True),  # a query that the subscriber chose stays as it is
                    data=body or None,
                    headers=headers,
                    allow_redirects=False,
                ) as answer,
            ):
                return Answer(status=answer.status, body=await _beginning(answer))
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as exc:
            raise CallFailedError(f"{type(exc).__name__}: {exc}"[:200]) from exc


async def _beginning(answer: aiohttp.ClientResponse) -> bytes:
    """The first bytes of the body, one more than a challenge ever has at most."""
    body = b""
    while len(body) <= _ANSWER_BYTES and (part := await answer.content.read(_ANSWER_BYTES + 1)):
        body += part
    return body[: _ANSWER_BYTES + 1]


@asynccontextmanager
async def open_callbacks(allowed: Sequence[Network] = ()) -> AsyncIterator[Callbacks]:
    """What calls subscribers, in these networks beside those that anyone may be called in."""

    def connect(info: Any) -> socket.socket:  # noqa: ANN401  aiohttp's type has no public name
        family, kind, protocol, _, place = info
        address = ipaddress.ip_address(str(place[0]).partition("%")[0])
        if not websub.may_call(address, allowed):
            raise PermissionError(errno.EACCES, f"{address} is none that the hub may call")
        return socket.socket(family, kind, protocol)

    connector = aiohttp.TCPConnector(
        socket_factory=connect, force_close=True, use_dns_cache=False, limit=0
    )
    async with aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=CALL_SECONDS),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"User-Agent": _AGENT},
        trust_env=False,
        auto_decompress=False,
    ) as session:
        yield Callbacks(session=session)
