"""The HTTP side that every service has, served by the real server."""

import asyncio
import html
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, ClassVar

import httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CollectorRegistry
from pydantic import BaseModel, ConfigDict
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Mount, Route

from hostler_common import auth, errors, http, logs, runtime, settings
from hostler_common.health import Health


class Example(settings.Settings):
    service: ClassVar[str] = "example"


class Thing(BaseModel):
    model_config = ConfigDict(extra="forbid")

    size_bytes: int


class ThingTaken(errors.Conflict):
    code = "example.thing.taken"


router = APIRouter(prefix="/v1/things", dependencies=[auth.require(auth.Role.READER)])


@router.get("")
async def list_things(caller: auth.Caller, store: Annotated[str, http.state("store")]) -> Any:
    return {"caller": caller.name, "store": store}


@router.post("", dependencies=[auth.require(auth.Role.OPERATOR)])
async def make_thing(thing: Thing) -> Thing:
    return thing


@router.get("/taken")
async def taken() -> None:
    raise ThingTaken("it is taken", holder="somebody")


@router.get("/away")
async def away() -> None:
    raise errors.Unavailable("the database cannot be reached")


@router.get("/broken")
async def broken() -> None:
    raise RuntimeError("SELECT secret FROM thing -- postgresql://me:hunter2@db/x")


direct_router = APIRouter(prefix="/v1/direct", route_class=http.DirectRoute)


@direct_router.put("/{name}/size", dependencies=[auth.require(auth.Role.OPERATOR)])
async def put_size(name: str, request: Request) -> Response:
    body = await request.body()
    if name == "taken":
        raise ThingTaken("it is taken")
    if name == "broken":
        raise RuntimeError("secret")
    if name == "odd":
        raise RequestValidationError([{"loc": ("body",), "msg": "odd"}])
    caller = request.state.principal.name
    return PlainTextResponse(f"{name} {len(body)} {caller} {request.state.store}")


@router.get("/told")
async def told(store: Annotated[Any, http.state("store")]) -> StreamingResponse:
    async def words() -> AsyncIterator[str]:
        yield "first"
        await asyncio.sleep(0)
        while (word := await store.get()) != "end":
            if word == "break":
                raise RuntimeError("half an answer")
            yield word

    return StreamingResponse(words())


@router.get("/trace")
async def trace() -> str:
    return logs.traceparent.get() or ""


page_router = APIRouter(prefix="/things", dependencies=[auth.require(auth.Role.READER)])


@page_router.get("/taken")
async def taken_page() -> None:
    raise ThingTaken("it is taken by <b>somebody</b>", holder="somebody")


@page_router.get("/away")
async def away_page() -> None:
    await away()


@page_router.get("/broken")
async def broken_page() -> None:
    await broken()


@page_router.get("/sizes/{size_bytes}")
async def size_page(size_bytes: int) -> int:
    return size_bytes


@page_router.post("/taken", dependencies=[auth.require(auth.Role.OPERATOR)])
async def take() -> None:
    await taken_page()


Opened = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]


@pytest.fixture
def tokens(tmp_path: Path) -> dict[str, str]:
    """A token of each role, in a tokens file."""
    found = {}
    lines = []
    for role in auth.Role:
        found[role.value], line = auth.new_token(name=f"my-{role}", role=role)
        lines.append(line)
    (tmp_path / "tokens").write_text("\n".join(lines))
    return found


@pytest.fixture
def opened(serving: Any, tokens: dict[str, str], tmp_path: Path) -> Opened:
    """The example app, served: with tokens, or with other settings."""

    @asynccontextmanager
    async def run(
        *, health: Health | None = None, **overrides: Any
    ) -> AsyncIterator[httpx.AsyncClient]:
        loaded = settings.load(
            Example,
            **{
                "amqp_url": "amqp://nowhere/",
                "database_url": "postgresql://nowhere/x",
                "auth_tokens_file": tmp_path / "tokens",
                **overrides,
            },
        )
        async with serving(build(loaded, health=health), loaded) as client:
            yield client

    return run


def build(loaded: Example, *routers: APIRouter, health: Health | None = None) -> FastAPI:
    return http.create_app(
        loaded,
        title="example",
        package="hostler_example",
        routers=routers or [router, page_router, direct_router],
        state={"store": "the store"},
        health=health,
        registry=CollectorRegistry(),
    )


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def open_settings() -> Example:
    return settings.load(
        Example, amqp_url="amqp://nowhere/", database_url="postgresql://x/", auth_mode="none"
    )


# --- default deny


async def ask() -> str:
    return "anything"


def _plain_route() -> APIRouter:
    made = APIRouter()
    made.add_api_route("/open", ask)
    return made


def _nested_route() -> APIRouter:
    outer = APIRouter(prefix="/outer")
    outer.include_router(_plain_route())
    return outer


def _mount() -> APIRouter:
    return APIRouter(routes=[Mount("/open", app=PlainTextResponse("anything"))])


def _starlette_route() -> APIRouter:
    async def answer(request: Request) -> PlainTextResponse:
        return PlainTextResponse("anything")

    return APIRouter(routes=[Route("/open", answer)])


def _other_dependency() -> APIRouter:
    made = APIRouter(dependencies=[Depends(ask)])
    made.add_api_route("/open", ask)
    return made


@pytest.mark.parametrize(
    "unguarded", [_plain_route, _nested_route, _mount, _starlette_route, _other_dependency]
)
def test_an_app_with_an_unguarded_route_is_not_built(unguarded: Callable[[], APIRouter]) -> None:
    with pytest.raises(ValueError, match="/open says neither which role"):
        build(open_settings(), router, unguarded())


def test_a_route_is_guarded_by_its_own_its_routers_or_its_including_routers_dependency() -> None:
    own = APIRouter()
    own.add_api_route("/own", ask, dependencies=[auth.require(auth.Role.READER)])
    outer = APIRouter(dependencies=[Depends(auth.public)])
    outer.include_router(_plain_route())
    build(open_settings(), router, own, outer)


async def test_a_role_is_needed_and_the_problem_says_which(
    opened: Opened, tokens: dict[str, str]
) -> None:
    async with opened() as client:
        nobody = await client.get("/v1/things")
        stranger = await client.get("/v1/things", headers=bearer("made-up"))
        reader = await client.get("/v1/things", headers=bearer(tokens["reader"]))
        weak = await client.post(
            "/v1/things", headers=bearer(tokens["reader"]), json={"size_bytes": 1}
        )
        operator = await client.post(
            "/v1/things", headers=bearer(tokens["operator"]), json={"size_bytes": 1}
        )
    assert nobody.status_code == stranger.status_code == 401
    assert nobody.json()["code"] == stranger.json()["code"] == "auth.unauthenticated"
    assert 'Bearer realm="hostler"' in nobody.headers["www-authenticate"]
    assert "made-up" not in stranger.text
    assert reader.json() == {"caller": "my-reader", "store": "the store"}
    assert (weak.status_code, weak.json()["code"]) == (403, "auth.forbidden")
    assert "operator" in weak.json()["detail"]
    assert operator.status_code == 200


async def test_the_password_of_basic_is_a_token(opened: Opened, tokens: dict[str, str]) -> None:
    async with opened() as client:
        good = await client.get("/v1/things", auth=("any name", tokens["reader"]))
        bad = await client.get("/v1/things", auth=(tokens["reader"], "x"))
        broken = await client.get("/v1/things", headers={"Authorization": "Basic %%%"})
    assert good.json()["caller"] == "my-reader"
    assert bad.status_code == broken.status_code == 401


# --- problems


ERRORS: list[tuple[str, str, bytes | None, int, str]] = [
    ("GET", "/v1/nothing", None, 404, "http.404"),
    ("DELETE", "/v1/things", None, 405, "http.405"),
    ("POST", "/v1/things", b'{"size_bytes": "many"}', 422, "request.invalid"),
    ("POST", "/v1/things", b'{"size_bytes": 1, "colour": 2}', 422, "request.invalid"),
    ("POST", "/v1/things", b"{", 422, "request.invalid"),
    ("POST", "/v1/things", b"[" * 100_000, 400, "http.400"),
    ("POST", "/v1/things", b'"\xff"', 400, "http.400"),
    ("GET", "/v1/things/taken", None, 409, "example.thing.taken"),
    ("GET", "/v1/things/broken", None, 500, "hostler.internal"),
    ("GET", "/v1/things/away", None, 503, "service.unavailable"),
]


async def test_every_error_is_a_problem_with_a_stable_code(opened: Opened) -> None:
    async with opened(auth_mode="none") as client:
        for method, path, body, status, code in ERRORS:
            headers = {"Content-Type": "application/json"} if body else {}
            answer = await client.request(method, path, content=body, headers=headers)
            problem = answer.json()
            assert (answer.status_code, problem["code"]) == (status, code)
            assert answer.headers["content-type"] == "application/problem+json"
            assert problem["status"] == status
            assert problem["type"] == f"urn:hostler:error:{code}"
            assert problem["instance"] == answer.headers["x-request-id"]
            assert {"title", "detail"} <= problem.keys()


# as Chromium and Firefox send them
NAVIGATES = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
PAGES: list[tuple[str, str, int, str, str]] = [
    ("GET", "/nothing", 404, "http.404", "Check the address"),
    ("DELETE", "/things/taken", 405, "http.405", "Use the buttons"),
    ("GET", "/things/sizes/many", 422, "request.invalid", "Change what the message names"),
    ("GET", "/things/taken", 409, "example.thing.taken", "Look at it again"),
    ("POST", "/things/taken", 409, "example.thing.taken", "Look at it again"),
    ("GET", "/things/broken", 500, "hostler.internal", "Tell whoever runs this service"),
    ("GET", "/things/away", 503, "service.unavailable", "Wait a moment"),
]


async def test_an_error_on_a_page_is_a_page_that_says_the_same_and_what_to_do(
    opened: Opened,
) -> None:
    async with opened(auth_mode="none") as client:
        for method, path, status, code, advice in PAGES:
            page = await client.request(method, path, headers=NAVIGATES)
            assert (page.status_code, page.headers["content-type"]) == (
                status,
                "text/html; charset=utf-8",
            ), path
            problem = (await client.request(method, path)).json()  # who accepts anything
            for said in (problem["title"], html.escape(problem["detail"]), code, advice):
                assert said in page.text, path
            assert page.headers["x-request-id"] in page.text
            assert "hunter2" not in page.text
            assert "<b>" not in page.text
            assert (problem["status"], problem["code"]) == (status, code)
        page = await client.get("/things/away", headers=NAVIGATES)
        assert page.headers["retry-after"] == "5"
        answer = await client.delete("/things/taken", headers=NAVIGATES)
        assert "GET" in answer.headers["allow"]


async def test_the_api_answers_a_browser_with_a_problem_document(opened: Opened) -> None:
    async with opened(auth_mode="none") as client:
        for method, path, body, status, code in ERRORS:
            headers = {"Content-Type": "application/json"} if body else {}
            answer = await client.request(
                method, path, content=body, headers={**NAVIGATES, **headers}
            )
            assert (answer.status_code, answer.json()["code"]) == (status, code)


async def test_a_page_that_is_not_for_the_caller_leads_to_the_sign_in(
    opened: Opened, tokens: dict[str, str]
) -> None:
    async with opened() as client:
        headers = {**NAVIGATES, **bearer(tokens["reader"])}
        page = await client.post("/things/taken", headers=headers)
        unknown = await client.post("/things/taken", headers=NAVIGATES)
    assert (page.status_code, unknown.status_code) == (403, 401)
    for answer in (page, unknown):
        assert 'href="/login?next=/"' in answer.text  # what was sent is not sent again
    assert "auth.forbidden" in page.text
    assert unknown.headers["www-authenticate"].startswith("Bearer")


async def test_an_invalid_request_names_each_fault_by_a_pointer(opened: Opened) -> None:
    async with opened(auth_mode="none") as client:
        answer = await client.post("/v1/things", json={"size_bytes": "many", "colour": 1})
    assert {error["pointer"] for error in answer.json()["errors"]} == {
        "/body/size_bytes",
        "/body/colour",
    }


async def test_a_bug_shows_the_caller_nothing_and_the_log_everything(
    opened: Opened, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure(service="example", log_format="json")  # to what `capsys` reads
    async with opened(auth_mode="none") as client:
        answer = await client.get("/v1/things/broken")
    assert answer.status_code == 500
    assert "SELECT" not in answer.text
    assert "hunter2" not in answer.text
    shown = capsys.readouterr().out
    assert "request_crashed" in shown
    assert "SELECT secret FROM thing" in shown
    assert "hunter2" not in shown


async def test_an_unavailable_server_says_when_to_come_again(opened: Opened) -> None:
    async with opened(auth_mode="none") as client:
        answer = await client.get("/v1/things/away")
    assert answer.headers["retry-after"] == "5"


async def test_405_names_the_methods_there_are(opened: Opened) -> None:
    async with opened(auth_mode="none") as client:
        answer = await client.delete("/v1/things")
    assert "GET" in answer.headers["allow"]


async def test_a_body_that_says_it_is_too_large_is_refused_unread(opened: Opened) -> None:
    async with opened(auth_mode="none") as client:
        host, port = client.base_url.host, client.base_url.port
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(
            b"POST /v1/things HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % (http.MAX_BODY_BYTES + 1)
        )
        answer = await asyncio.wait_for(reader.readuntil(b"}"), 10)
        writer.close()
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"code":"request.body_too_large"' in answer


@pytest.mark.parametrize(("more", "status"), [(0, 200), (1, 413)])
async def test_a_chunked_body_is_bounded_as_it_is_read(
    opened: Opened, more: int, status: int
) -> None:
    length = http.MAX_BODY_BYTES + more
    body = b'{"size_bytes": 1}'.ljust(length)

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, length, 65536):
            yield body[start : start + 65536]

    async with opened(auth_mode="none") as client:
        answer = await client.post(
            "/v1/things", content=chunks(), headers={"Content-Type": "application/json"}
        )
    assert answer.status_code == status
    if status == 413:
        assert answer.json()["code"] == "request.body_too_large"


# --- direct routes


async def test_a_direct_route_is_guarded_counted_and_answered_like_any_other(
    opened: Opened, tokens: dict[str, str]
) -> None:
    operator = bearer(tokens["operator"])
    answers = {}
    async with opened() as client:
        for name in ("mine", "taken", "broken", "odd"):
            answers[name] = await client.put(
                f"/v1/direct/{name}/size", content=b"abc", headers=operator
            )
        wrong = [
            (await client.put("/v1/direct/mine/size", headers=headers)).status_code
            for headers in ({}, bearer("nothing"), bearer(tokens["reader"]))
        ]
        others = [
            (await client.request(method, path, headers=operator)).status_code
            for method, path in (
                ("GET", "/v1/direct/mine/size"),
                ("PUT", "/v1/direct/mine/more/size"),
                ("PUT", "/v1/direct/mine/size/"),
            )
        ]
        metrics = (await client.get("/metrics")).text
        document = (await client.get("/v1/openapi.json", headers=operator)).json()
    assert answers["mine"].text == "mine 3 my-operator the store"
    assert {name: one.status_code for name, one in answers.items()} == {
        "mine": 200, "taken": 409, "broken": 500, "odd": 422,
    }  # fmt: skip
    for name in ("taken", "broken", "odd"):
        assert answers[name].headers["content-type"] == "application/problem+json"
        assert answers[name].json()["instance"] == answers[name].headers["x-request-id"]
    assert "secret" not in answers["broken"].text
    for one in answers.values():
        assert {name: one.headers.get(name) for name in http.SECURITY_HEADERS} == (
            http.SECURITY_HEADERS
        )
    assert wrong == [401, 401, 403]
    assert others == [405, 404, 307]
    counted = 'method="PUT",route="/v1/direct/{name}/size",status="200"} 1.0'
    assert counted in metrics
    assert "/v1/direct/{name}/size" in document["paths"]


async def test_the_body_of_a_direct_route_is_bounded(
    opened: Opened, tokens: dict[str, str]
) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(http.MAX_BODY_BYTES // 65536 + 1):
            yield bytes(65536)

    async with opened() as client:
        answer = await client.put(
            "/v1/direct/mine/size", content=chunks(), headers=bearer(tokens["operator"])
        )
    assert (answer.status_code, answer.json()["code"]) == (413, "request.body_too_large")


def test_a_direct_route_without_a_guard_is_refused(tokens: dict[str, str]) -> None:
    open_router = APIRouter(route_class=http.DirectRoute)
    open_router.add_api_route("/v1/anything", ask)
    with pytest.raises(ValueError, match="says neither which role"):
        build(open_settings(), open_router)


# --- ids, headers, probes


async def test_a_request_keeps_the_id_it_came_with_and_else_gets_one(opened: Opened) -> None:
    async with opened(auth_mode="none") as client:
        given = await client.get("/v1/things", headers={"X-Request-Id": "mine-7"})
        openstack = await client.get("/v1/things", headers={"X-OpenStack-Request-ID": "req-1"})
        fresh = await client.get("/v1/things")
        endless = await client.get("/v1/things", headers={"X-Request-Id": "x" * 1000})
    assert given.headers["x-request-id"] == "mine-7"
    assert openstack.headers["x-request-id"] == "req-1"
    assert len(fresh.headers["x-request-id"]) == 32
    assert len(endless.headers["x-request-id"]) == 32


async def test_a_handler_works_in_the_trace_of_its_caller(opened: Opened) -> None:
    given = logs.new_traceparent()
    async with opened(auth_mode="none") as client:
        kept = await client.get("/v1/things/trace", headers={"traceparent": given})
        bad = await client.get("/v1/things/trace", headers={"traceparent": "00-nonsense"})
    assert kept.json() == given
    assert logs.valid_traceparent(bad.json())


async def test_every_answer_carries_the_security_headers(opened: Opened) -> None:
    async with opened(auth_mode="none") as client:
        for path in ("/v1/things", "/v1/nothing", "/v1/things/broken", "/login", "/healthz"):
            answer = await client.get(path)
            shown = {name: answer.headers.get(name) for name in http.SECURITY_HEADERS}
            assert shown == http.SECURITY_HEADERS
            assert "unsafe" not in answer.headers["content-security-policy"]
            assert "server" not in answer.headers


async def test_probes_need_no_token_and_say_what_is_wrong(opened: Opened) -> None:
    health = Health()
    health.check("database", lambda: (False, "away"))
    async with opened(health=health) as client:
        alive = await client.get("/healthz")
        unready = await client.get("/readyz")
        health.check("database", lambda: (True, "answers"))
        ready = await client.get("/readyz")
        health.draining = True
        draining = await client.get("/readyz")
    assert alive.json() == {"status": "pass", "stuck": []}
    assert unready.status_code == 503
    assert unready.json()["checks"] == [{"name": "database", "status": "fail", "detail": "away"}]
    assert (ready.status_code, ready.json()["status"]) == (200, "pass")
    assert draining.status_code == 503


async def test_requests_are_counted_by_route_and_not_by_path(opened: Opened) -> None:
    async with opened(auth_mode="none") as client:
        await client.get("/v1/things")
        for number in range(3):
            await client.get(f"/v1/nothing/{number}")
        shown = (await client.get("/metrics")).text
    assert 'hostler_http_requests_total{method="GET",route="/v1/things",status="200"} 1.0' in shown
    assert 'hostler_http_requests_total{method="GET",route="unknown",status="404"} 3.0' in shown
    assert "nothing" not in shown


async def test_version_and_the_apis_own_document_are_public(opened: Opened) -> None:
    async with opened() as client:
        version = await client.get("/v1/version")
        document = await client.get("/v1/openapi.json")
    assert version.json()["service"] == "example"
    assert version.json()["version"]
    assert "/v1/things" in document.json()["paths"]


async def test_probes_are_not_logged_and_requests_are_once(
    opened: Opened, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure(service="example", log_format="json")  # to what `capsys` reads
    async with opened(auth_mode="none") as client:
        for path in (*http.UNLOGGED, "/v1/things"):
            await client.get(path)
    requests = [
        line for line in capsys.readouterr().out.splitlines() if '"event": "request"' in line
    ]
    assert len(requests) == 1
    assert '"path": "/v1/things"' in requests[0]
    assert '"caller": "anybody"' in requests[0]


@pytest.mark.parametrize("ending", ["end", "break"])
async def test_what_is_streamed_arrives_as_it_is_told_and_a_half_answer_is_never_whole(
    serving: Any, ending: str, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure(service="example", log_format="json")
    loaded = open_settings()
    words: asyncio.Queue[str] = asyncio.Queue()
    app = http.create_app(
        loaded,
        title="example",
        package="hostler_example",
        routers=[router],
        state={"store": words},
        registry=CollectorRegistry(),
    )
    async with serving(app, loaded) as client, client.stream("GET", "/v1/things/told") as answer:
        chunks = answer.aiter_text()
        got = [await anext(chunks)]  # before the handler has been told to go on
        words.put_nowait("second")
        got.append(await anext(chunks))
        words.put_nowait(ending)
        if ending == "end":
            assert [chunk async for chunk in chunks] == []
        else:
            with pytest.raises(httpx.RemoteProtocolError):
                await anext(chunks)
        shown = (await client.get("/metrics")).text
    assert got == ["first", "second"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert (
        'hostler_http_requests_total{method="GET",route="/v1/things/told",status="200"} 1.0'
        in shown
    )
    assert ("request_crashed" in capsys.readouterr().out) == (ending == "break")


# --- pages and signing in


async def test_a_page_without_a_token_leads_to_the_sign_in_and_back(opened: Opened) -> None:
    async with opened() as client:
        answer = await client.get("/v1/things?a=1&b=2", headers={"Accept": "text/html"})
        form = await client.get(answer.headers["location"])
    assert answer.status_code == 303
    assert 'name="next" value="/v1/things?a=1&amp;b=2"' in form.text


async def test_signing_in_sets_a_cookie_that_no_script_reads(
    opened: Opened, tokens: dict[str, str]
) -> None:
    async with opened() as client:
        signed_in = await client.post(
            "/login", data={"token": tokens["reader"], "next": "/v1/things"}
        )
        page = await client.get("/v1/things")  # the client keeps the cookie
    cookie = signed_in.headers["set-cookie"].lower()
    assert (signed_in.status_code, signed_in.headers["location"]) == (303, "/v1/things")
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert page.json()["caller"] == "my-reader"


async def test_a_wrong_token_signs_nobody_in_and_is_not_shown(opened: Opened) -> None:
    async with opened() as client:
        answer = await client.post("/login", data={"token": "made-up<b>"})
    assert answer.status_code == 401
    assert "set-cookie" not in answer.headers
    assert "made-up" not in answer.text


async def test_signing_in_never_ends_on_another_site(
    opened: Opened, tokens: dict[str, str]
) -> None:
    elsewhere = (
        "https://evil.example/",
        "//evil.example/",
        "/\\evil.example",
        "javascript:alert(1)",
        "",
    )
    async with opened() as client:
        for target in elsewhere:
            answer = await client.post("/login", data={"token": tokens["reader"], "next": target})
            form = await client.get("/login", params={"next": target})
            assert answer.headers["location"] == "/"
            assert 'name="next" value="/"' in form.text


async def test_a_change_by_cookie_must_come_from_our_own_pages(
    opened: Opened, tokens: dict[str, str]
) -> None:
    async with opened() as client:
        origins: list[tuple[dict[str, str], int]] = [
            ({"Origin": "https://evil.example"}, 403),
            ({"Origin": "null"}, 403),
            ({"Sec-Fetch-Site": "cross-site"}, 403),
            ({"Sec-Fetch-Site": "same-site", "Origin": "https://other.example"}, 403),
            ({}, 403),
            ({"Sec-Fetch-Site": "same-origin"}, 200),
            ({"Origin": str(client.base_url).rstrip("/")}, 200),
        ]
        cookie = {"Cookie": f"{auth.COOKIE}={tokens['operator']}"}
        for origin, status in origins:
            answer = await client.post(
                "/v1/things", json={"size_bytes": 1}, headers={**cookie, **origin}
            )
            assert (origin, answer.status_code) == (origin, status)


async def test_common_assets_are_served_by_the_service_itself(opened: Opened) -> None:
    async with opened() as client:
        answer = await client.get("/static/common/style.css")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/css")


# --- the server


def test_a_port_in_use_is_named() -> None:
    listener = runtime.bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    with pytest.raises(
        runtime.PortUnavailable, match=f"cannot listen on 127.0.0.1:{port}: Address"
    ):
        runtime.bind("127.0.0.1", port)
    listener.close()


async def test_draining_finishes_the_request_at_hand(serving: Any) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()
    slow = APIRouter(dependencies=[Depends(auth.public)])

    @slow.get("/slow")
    async def wait() -> str:
        begun.set()
        await go_on.wait()
        return "done"

    loaded = open_settings()
    server = http.Server(build(loaded, slow), loaded)
    running = asyncio.create_task(server.run())
    async with httpx.AsyncClient(trust_env=False) as client:
        answering = asyncio.create_task(client.get(f"http://127.0.0.1:{server.port}/slow"))
        await begun.wait()
        await server.drain()
        go_on.set()
        assert (await answering).json() == "done"
    await running


def test_uvicorn_says_nothing_of_its_own_about_requests() -> None:
    assert logging.getLogger("uvicorn.access").getEffectiveLevel() >= logging.ERROR
