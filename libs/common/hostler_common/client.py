"""HTTP to other services and to ours from the command line: problem documents come back as the errors they were.

The one module that imports httpx.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx

from hostler_common import errors, logs


class PeerUnavailable(errors.Unavailable):
    """The other side cannot be reached or does not answer."""

    code = "peer.unavailable"


class Api:
    """A JSON API. Paths are relative to its address."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    async def get(self, path: str, **params: object) -> Any:  # noqa: ANN401  JSON
        """The answer to a GET; parameters that are None are left out."""
        return await self.call("GET", path, params=params)

    async def post(
        self, path: str, body: object = None, *, idempotency_key: str | None = None
    ) -> Any:  # noqa: ANN401  JSON
        """The answer to a POST, or None where it has no body."""
        headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
        return await self.call("POST", path, body=body, headers=headers)

    async def put(self, path: str, body: object) -> Any:  # noqa: ANN401  JSON
        """The answer to a PUT."""
        return await self.call("PUT", path, body=body)

    async def delete(self, path: str) -> Any:  # noqa: ANN401  JSON
        """The answer to a DELETE."""
        return await self.call("DELETE", path)

    async def call(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, object] | None = None,
        body: object = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:  # noqa: ANN401  JSON
        """The decoded answer of a call.

        Raises:
            PeerUnavailable: no answer came, or one that cannot be read.
            HostlerError: the peer answered with an error: the class for its status, with the peer's code.
        """
        trace = logs.traceparent.get()
        try:
            response = await self._http.request(
                method,
                # an empty path is the address itself, to which httpx would add a slash
                path or str(self._http.base_url).removesuffix("/"),
                # None, not empty: an empty mapping would drop a query that is in the path already
                params={k: str(v) for k, v in (params or {}).items() if v is not None} or None,
                json=body,
                headers={**(headers or {}), **({"traceparent": trace} if trace else {})},
            )
        except httpx.HTTPError as exc:
            where = self._http.base_url.copy_with(userinfo=b"")
            raise PeerUnavailable(f"{where} does not answer: {type(exc).__name__}") from exc
        if response.is_success:
            if not (_is_json(response) and response.content):
                return response.text or None
            try:
                return response.json()
            except ValueError as exc:
                where = self._http.base_url.copy_with(userinfo=b"")
                raise PeerUnavailable(f"{where} says JSON and sends none") from exc
        try:
            problem = response.json()
        except ValueError:
            problem = {}
        raise errors.from_problem(
            response.status_code, problem if isinstance(problem, dict) else {}
        )


def _is_json(response: httpx.Response) -> bool:
    media_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    return bool(media_type == "application/json" or media_type.endswith("+json"))


@asynccontextmanager
async def open_api(
    url: str, *, token: str | None = None, timeout_seconds: float = 30.0
) -> AsyncIterator[Api]:
    """An API at an address, called with a token; its connections are closed on leaving.

    Raises:
        Invalid: the address is none, or the token could not be a header.
    """
    try:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        made = httpx.AsyncClient(
            base_url=url, headers=headers, timeout=timeout_seconds, trust_env=False
        )
    except httpx.InvalidURL as exc:
        raise errors.Invalid(f"{url!r} is not an address: {exc}") from exc
    except UnicodeEncodeError as exc:
        raise errors.Invalid("the token has characters that no token has") from exc
    async with made as http:
        yield Api(http)
