"""The HTTP side of a service: one function assembles what every service has around its own routers.

Probes, metrics, version, sign-in and the quarantine page come with it; every other route must say who may use it, or
`create_app` refuses. Errors of any kind leave as RFC 9457 problem documents with a stable ``code``; on a page, in a
browser, as a page that says the same.
"""

import importlib.metadata
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Annotated, Any
from urllib.parse import quote

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Form, Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from fastapi.routing import APIRoute, iter_route_contexts
from fastapi.staticfiles import StaticFiles
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hostler_common import auth, errors, logs, runtime
from hostler_common.health import Health
from hostler_common.pages import Pages
from hostler_common.settings import ProcessSettings, Settings

log = logs.get(__name__)

MAX_BODY_BYTES = 4 * 1024 * 1024
UNLOGGED = ("/healthz", "/readyz", "/metrics")
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_SECURITY_HEADERS = [
    (name.lower().encode(), value.encode()) for name, value in SECURITY_HEADERS.items()
]


class BodyTooLarge(errors.HostlerError):
    """The request's body is larger than any that is meant."""

    code = "request.body_too_large"
    status = 413


def state(name: str) -> Any:  # noqa: ANN401  what fastapi.Depends returns
    """The dependency that gives a handler the resource ``name`` of its app's state."""

    # a coroutine, since FastAPI runs a plain function in a thread: two switches a request and resource
    async def resource(request: Request) -> Any:  # noqa: ANN401  typed by the alias that uses it
        return getattr(request.state, name)

    return Depends(resource)


class DirectRoute(APIRoute):
    """A route that is answered before the framework looks at the request, for what thousands ask all the time.

    Its function gets the request and the path's parameters, and gives a `Response`; its own dependencies, which guard
    it, are called before with the request. Finding a route and resolving dependencies costs more than a small handler.
    Ids, bounds, counting, logging and errors are as with any other route, and it is documented like any other.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What calls the guards and then the function."""
        guards = [guard.dependency for guard in self.dependencies]

        async def handle(request: Request) -> Response:
            for guard in guards:
                assert guard is not None
                await guard(request)
            answer: Response = await self.endpoint(request=request, **request.path_params)
            return answer

        return handle


def create_app(
    settings: Settings,
    *,
    title: str,
    package: str,
    routers: Sequence[APIRouter],
    state: Mapping[str, Any],
    health: Health | None = None,
    registry: CollectorRegistry | None = None,
) -> FastAPI:
    """The service's HTTP application: its routers, and all that every service has.

    ``state`` is the one list of what handlers can reach, by the `state` dependency.

    Raises:
        ValueError: a route names neither a role nor `auth.public`.
        SettingsError: the settings' tokens or keys cannot be read.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[Mapping[str, Any]]:
        yield state

    version = importlib.metadata.version("hostler-common")
    app = FastAPI(
        title=title,
        version=version,
        lifespan=lifespan,
        generate_unique_id_function=lambda route: (
            route.name
        ),  # operation ids are the handlers' names
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        responses={
            "default": {
                "description": "Problem details (RFC 9457) with a stable `code`",
                "content": {"application/problem+json": {"schema": PROBLEM_SCHEMA}},
            }
        },
    )
    app.state.verifier = auth.verifier(settings)
    app.state.pages = Pages(package)
    for router in routers:
        app.include_router(router)
    app.include_router(_service_router(app, package, health or Health(), registry, version))
    if "quarantine" in state or not state:
        app.include_router(_quarantine_page(package))
    _refuse_open_routes(app)
    app.mount("/static/common", StaticFiles(packages=[("hostler_common", "static")]))
    app.add_exception_handler(errors.HostlerError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_bug)
    app.add_middleware(_BoundedBody)
    direct = [one for router in routers for one in router.routes if isinstance(one, DirectRoute)]
    app.add_middleware(_Gate, registry=registry or CollectorRegistry(), direct=direct)
    return app


PROBLEM_SCHEMA = {
    "type": "object",
    "required": ["type", "title", "status", "detail", "code"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "code": {"type": "string"},
        "instance": {"type": "string"},
    },
}


def _refuse_open_routes(app: FastAPI) -> None:
    def guarded(dependant: Dependant) -> bool:
        return (
            isinstance(dependant.call, auth.Require)
            or dependant.call is auth.public
            or any(guarded(child) for child in dependant.dependencies)
        )

    # what is no APIRoute (a mount, a websocket, a plain Starlette route) has no dependencies that could guard it
    for route in iter_route_contexts(app.routes):
        if not isinstance(route.original_route, APIRoute) or not guarded(route.dependant):
            raise ValueError(f"{route.path} says neither which role may use it nor auth.public")


def _service_router(
    app: FastAPI,
    package: str,
    health: Health,
    registry: CollectorRegistry | None,
    version: str,
) -> APIRouter:
    """Probes, metrics, version, the API's own document, sign-in."""
    router = APIRouter(dependencies=[Depends(auth.public)], include_in_schema=False)
    pages = Pages(package)

    @router.get("/healthz")
    async def healthz() -> JSONResponse:
        alive, stuck = health.alive()
        return JSONResponse(
            {"status": "pass" if alive else "fail", "stuck": stuck}, 200 if alive else 503
        )

    @router.get("/readyz")
    async def readyz() -> JSONResponse:
        ready, checks = await health.ready()
        return JSONResponse(
            {"status": "pass" if ready else "fail", "checks": checks}, 200 if ready else 503
        )

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(
            generate_latest(registry or CollectorRegistry()), media_type=CONTENT_TYPE_LATEST
        )

    @router.get("/v1/version")
    async def show_version() -> dict[str, str]:
        return {"service": package.removeprefix("hostler_"), "version": version}

    @router.get("/v1/openapi.json")
    async def openapi() -> dict[str, Any]:
        return app.openapi()

    @router.get("/login")
    async def login_form(request: Request, next: str = "/") -> HTMLResponse:
        return pages.render(request, "login.html", problem=None, next=_local(next))

    @router.post("/login")
    async def login(
        request: Request,
        token: Annotated[str, Form()],
        next: Annotated[str, Form()] = "/",
    ) -> Response:
        try:
            await app.state.verifier.verify(token.strip())
        except errors.Unauthenticated as exc:
            page = pages.render(request, "login.html", problem=exc.detail, next=_local(next))
            page.status_code = 401
            return page
        answer = RedirectResponse(_local(next), status_code=303)
        answer.set_cookie(
            auth.COOKIE,
            token.strip(),
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
        return answer

    return router


def _local(path: str) -> str:
    """The path, if it leads to this service, else its root: no sign-in ends on another site."""
    return path if path.startswith("/") and not path.startswith(("//", "/\\")) else "/"


def _quarantine_page(package: str) -> APIRouter:
    router = APIRouter(include_in_schema=False)
    pages = Pages(package)

    @router.get("/quarantine", dependencies=[auth.require(auth.Role.OPERATOR, every_project=True)])
    async def quarantine(request: Request) -> HTMLResponse:
        store = request.state.quarantine
        return pages.render(
            request, "quarantine.html", rows=await store.rows(limit=200), total=await store.count()
        )

    return router


# --- errors


def problem(request: Request, error: errors.HostlerError) -> Response:
    """The error as the answer to the request: a problem document, or for a browser on one of the pages a page.

    Where a page needs a sign-in, the way to it.
    """
    wants_page = "text/html" in request.headers.get("accept", "")
    target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    sign_in = f"/login?next={quote(target if request.method == 'GET' else '/', safe='/')}"
    if isinstance(error, errors.Unauthenticated) and wants_page and request.method == "GET":
        return RedirectResponse(sign_in, status_code=303)
    headers = {}
    if error.retry_after_seconds is not None:
        headers["Retry-After"] = str(error.retry_after_seconds)
    if isinstance(error, errors.Unauthenticated):
        headers["WWW-Authenticate"] = 'Bearer realm="hostler", Basic realm="hostler"'
    request_id = getattr(request.state, "request_id", "")
    # everything outside the API and the probes is for eyes, also what there is not
    if wants_page and not request.url.path.startswith(("/v1/", *UNLOGGED)):
        pages: Pages = request.app.state.pages
        page = pages.render(
            request, "problem.html", error=error, request_id=request_id, sign_in=sign_in
        )
        page.status_code = error.status
        page.headers.update(headers)
        return page
    return JSONResponse(
        {**error.problem(), "instance": request_id},
        status_code=error.status,
        headers=headers,
        media_type="application/problem+json",
    )


async def _on_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, errors.HostlerError)
    if exc.status >= 500:
        log.warning("request_failed", code=exc.code, detail=exc.detail)
    return problem(request, exc)


async def _on_invalid(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, RequestValidationError)
    found = [
        {"pointer": "/" + "/".join(str(part) for part in error["loc"]), "detail": error["msg"]}
        for error in exc.errors()
    ]
    detail = "; ".join(f"{error['pointer']}: {error['detail']}" for error in found)
    return problem(request, errors.Invalid(detail, errors=found))


async def _on_http_exception(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    if exc.status_code == BodyTooLarge.status:
        return problem(request, BodyTooLarge(f"a body may have {MAX_BODY_BYTES} bytes"))
    error = errors.from_problem(
        exc.status_code, {"detail": str(exc.detail), "code": f"http.{exc.status_code}"}
    )
    answer = problem(request, error)
    for name, value in (exc.headers or {}).items():
        answer.headers[name] = value
    return answer


async def _on_bug(request: Request, exc: Exception) -> Response:
    del exc  # logged by the gate, with its traceback; it is not for the caller
    return problem(request, errors.HostlerError("something of ours is wrong: see the log"))


# --- every request


class _BoundedBody:
    """Ends a request whose body grows past the bound while it is read: a chunked one says no length beforehand."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = 0

        async def bounded() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MAX_BODY_BYTES:
                raise HTTPException(BodyTooLarge.status)
            return message

        await self._app(scope, bounded, send)


class _Direct:
    """A direct route, with the errors that it raises as answers."""

    def __init__(self, route: DirectRoute) -> None:
        self._handle = route.get_route_handler()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            response = await self._handle(request)
        except errors.HostlerError as exc:
            response = await _on_error(request, exc)
        except RequestValidationError as exc:
            response = await _on_invalid(request, exc)
        except HTTPException as exc:
            response = await _on_http_exception(request, exc)
        await response(scope, receive, send)


class _Gate:
    """Counts, times, bounds and logs every request as its answer begins, and gives it an id and a trace context."""

    def __init__(
        self, app: ASGIApp, registry: CollectorRegistry, direct: Sequence[DirectRoute] = ()
    ) -> None:
        self._app = app
        self._direct = [(route, _BoundedBody(_Direct(route))) for route in direct]
        self._noted: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        self._requests = Counter(
            "hostler_http_requests",
            "Requests answered, by method, route and status.",
            ["method", "route", "status"],
            registry=registry,
        )
        self._seconds = Histogram(
            "hostler_http_request_seconds",
            "Time to the answer's head, by method and route.",
            ["method", "route"],
            registry=registry,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        request = Request(scope)
        trace = (
            logs.valid_traceparent(request.headers.get("traceparent")) or logs.new_traceparent()
        )
        logs.traceparent.set(trace)
        given = request.headers.get("x-request-id") or request.headers.get(
            "x-openstack-request-id"
        )
        request.state.request_id = (
            given if given and given.isascii() and len(given) < 128 else trace[3:35]
        )
        begun = False

        async def answer(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                headers = message.get("headers", [])
                named = {name for name, _ in headers}
                message["headers"] = [
                    *(one for one in headers if one[0] != b"x-request-id"),
                    *(one for one in _SECURITY_HEADERS if one[0] not in named),
                    (b"x-request-id", request.state.request_id.encode("latin-1")),
                ]
                self._note(request, message["status"], time.perf_counter() - started)
            await send(message)

        length = request.headers.get("content-length", "0")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            refusal = problem(request, BodyTooLarge(f"a body may have {MAX_BODY_BYTES} bytes"))
            await refusal(scope, receive, answer)
            return
        try:
            await self._find(scope)(scope, receive, answer)
        except Exception:
            log.exception("request_crashed", method=request.method, path=request.url.path)
            if begun:
                raise  # the server cuts the connection: half an answer must not look whole
            bug = errors.HostlerError("something of ours is wrong: see the log")
            await problem(request, bug)(scope, receive, answer)

    def _find(self, scope: Scope) -> ASGIApp:
        """What answers: a direct route, which is then the scope's, or the framework."""
        for route, app in self._direct:
            if scope["method"] in (route.methods or ()) and (
                found := route.path_regex.match(scope["path"])
            ):
                scope["route"], scope["path_params"] = route, found.groupdict()
                return app
        return self._app

    def _note(self, request: Request, status: int, seconds: float) -> None:
        route = getattr(request.scope.get("route"), "path", "unknown")
        key = (request.method, route, status)
        noted = self._noted.get(key)
        if noted is None:  # to find a series by its labels costs more than to count in it
            noted = self._noted[key] = (
                self._requests.labels(*key),
                self._seconds.labels(request.method, route),
            )
        noted[0].inc()
        noted[1].observe(seconds)
        path = request.scope["path"]
        if path not in UNLOGGED:
            principal = getattr(request.state, "principal", None)
            log.info(
                "request",
                method=request.method,
                path=path,
                status=status,
                milliseconds=round(seconds * 1000, 1),
                caller=principal.name if principal else None,
                request_id=request.state.request_id,
            )


# --- the server


class Server:
    """uvicorn inside our own task group, with our own signals."""

    def __init__(self, app: FastAPI, settings: ProcessSettings) -> None:
        if isinstance(settings, Settings) and settings.auth_mode == "none":
            log.warning("auth_is_off", http_host=settings.http_host)
        self._socket = runtime.bind(settings.http_host, settings.http_port)
        self.host = settings.http_host
        self.port = int(self._socket.getsockname()[1])
        self._server = _Uvicorn(
            uvicorn.Config(
                app,
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                # a client that listens to events never ends its request: it may not use up the whole drain
                timeout_graceful_shutdown=max(1, int(settings.drain_seconds / 2)),
                # agents report every few seconds on a connection that they keep: with uvicorn's 5 s, one that is
                # closed in the moment of a request loses it
                timeout_keep_alive=75,
                http="httptools",
                ws="none",
            )
        )

    async def run(self) -> None:
        """Serve until `drain`."""
        await self._server.serve(sockets=[self._socket])

    async def drain(self) -> None:
        """Take no more connections, finish the requests at hand, and let `run` return."""
        self._server.should_exit = True


class _Uvicorn(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the runtime's."""
        yield
