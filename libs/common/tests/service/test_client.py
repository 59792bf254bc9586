"""HTTP to other services, against a real server."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from hostler_common import client, errors, logs, servers


@pytest_asyncio.fixture
async def peer() -> AsyncIterator[str]:
    """The address of a server that says what it was asked, and answers as its paths say."""

    async def echo(request: web.Request) -> web.Response:
        body = await request.json() if request.can_read_body else None
        names = ("Authorization", "Idempotency-Key", "traceparent")
        return web.json_response(
            {
                "method": request.method,
                "path": request.path,
                "query": dict(request.query),
                "body": body,
                "headers": {n: request.headers[n] for n in names if n in request.headers},
            }
        )

    async def problem(_: web.Request) -> web.Response:
        document = {"code": "peer.thing.taken", "detail": "it is taken", "holder": "x"}
        return web.json_response(document, status=409, content_type="application/problem+json")

    async def html(_: web.Request) -> web.Response:
        return web.Response(text="<h1>Bad gateway</h1>", status=502, content_type="text/html")

    async def plain(_: web.Request) -> web.Response:
        return web.Response(text="plain")

    async def broken(_: web.Request) -> web.Response:
        return web.Response(text='{"half', content_type="application/json")

    async def empty(_: web.Request) -> web.Response:
        return web.Response(status=204)

    app = web.Application()
    app.add_routes(
        [
            web.get("/base/problem", problem),
            web.get("/base/html", html),
            web.get("/base/plain", plain),
            web.get("/base/broken", broken),
            web.get("/base/empty", empty),
            web.route("*", "/{rest:.*}", echo),
        ]
    )
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}/base"
    await runner.cleanup()


async def test_calls_carry_the_token_the_key_and_the_trace(peer: str) -> None:
    logs.traceparent.set(trace := logs.new_traceparent())
    async with client.open_api(peer, token="t") as api:
        got: dict[str, Any] = await api.post("/v1/things", {"a": 1}, idempotency_key="k")
    assert (got["method"], got["path"], got["body"]) == ("POST", "/base/v1/things", {"a": 1})
    assert got["headers"] == {
        "Authorization": "Bearer t",
        "Idempotency-Key": "k",
        "traceparent": trace,
    }


async def test_parameters_that_are_none_are_left_out(peer: str) -> None:
    async with client.open_api(peer) as api:
        got = await api.get("/v1/things", limit=5, marker=None, name="a b&c")
        assert got["query"] == {"limit": "5", "name": "a b&c"}
        assert (await api.put("/v1/things/1", [1]))["body"] == [1]
        assert (await api.delete("/v1/things/1"))["method"] == "DELETE"


@pytest.mark.parametrize("path", ["", "/"])
async def test_an_empty_path_is_the_address_itself(peer: str, path: str) -> None:
    async with client.open_api(peer) as api:
        assert (await api.get(path))["path"] == "/base" + path


async def test_answers_that_are_no_json_come_as_text_or_none(peer: str) -> None:
    async with client.open_api(peer) as api:
        assert await api.get("/plain") == "plain"
        assert await api.get("/empty") is None


async def test_a_problem_comes_back_as_the_error_it_was(peer: str) -> None:
    async with client.open_api(peer) as api:
        with pytest.raises(errors.Conflict) as caught:
            await api.get("/problem")
    assert caught.value.code == "peer.thing.taken"
    assert caught.value.fields == {"holder": "x"}


async def test_an_error_without_a_problem_document_has_the_status(peer: str) -> None:
    async with client.open_api(peer) as api:
        with pytest.raises(errors.HostlerError) as caught:
            await api.get("/html")
    assert (caught.value.status, caught.value.detail) == (502, "HTTP status 502")


async def test_a_peer_that_does_not_answer_is_unavailable_and_its_password_not_shown() -> None:
    address = f"http://me:hunter2@127.0.0.1:{servers.free_port()}"
    async with client.open_api(address) as api:
        with pytest.raises(client.PeerUnavailable, match="does not answer") as caught:
            await api.get("/v1/things")
    assert "hunter2" not in caught.value.detail


async def test_a_peer_that_says_json_and_sends_none_is_unavailable(peer: str) -> None:
    async with client.open_api(peer) as api:
        with pytest.raises(client.PeerUnavailable, match="sends none"):
            await api.get("/broken")
