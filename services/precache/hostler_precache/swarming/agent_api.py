"""The HTTP API of agents: what a host should have, how far it is, and a blob's pieces."""

import re
from collections.abc import Callable, Coroutine
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import ValidationError

from hostler_common import auth, errors
from hostler_common.auth import Role
from hostler_precache import protocol
from hostler_precache.deps import SettingsDep, StoreDep, SwarmsDep, TrackerDep
from hostler_precache.swarming.reports import Reports
from hostler_precache.swarming.tracker import Tracker, desired_image
from hostler_precache.transfer.manifest import BlobId

router = APIRouter(prefix="/v1")
_HOST = re.compile(protocol.HOST_PATTERN.removesuffix("$"))


@router.get("/desired", dependencies=[auth.require(Role.AGENT, every_project=True)])
async def desired(
    store: StoreDep,
    swarms: SwarmsDep,
    tracker: TrackerDep,
    settings: SettingsDep,
    host: Annotated[str, Query(pattern=protocol.HOST_PATTERN)],
) -> protocol.Desired:
    """What a host should have; its agent asks at start, at every fanout, and now and then."""
    return protocol.Desired(
        images=[
            desired_image(
                wanted,
                await tracker.swarm(host, wanted.blob.blob_id),
                token_seconds=settings.token_seconds,
            )
            for wanted in await swarms.desired(host)
        ],
        deleted_image_ids=await store.deleted_images(host),
    )


class _DirectRoute(APIRoute):
    """A route that hands its function the request and the path's parameters, and nothing else.

    Resolving dependencies costs more than everything that a report needs. Its own dependencies,
    which guard it, are called; documented it is like any other.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        guards = [guard.dependency for guard in self.dependencies]

        async def handle(request: Request) -> Response:
            for guard in guards:
                assert guard is not None
                await guard(request)
            answer: Response = await self.endpoint(request=request, **request.path_params)
            return answer

        return handle


direct_router = APIRouter(prefix="/v1", route_class=_DirectRoute)


@direct_router.put(
    "/hosts/{host}/report",
    dependencies=[auth.require(Role.AGENT, every_project=True)],
    response_model=protocol.ReportReply,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": {"$ref": "#/components/schemas/HostReport"}}
            },
        }
    },
)
async def report(
    host: Annotated[str, Path(pattern=protocol.HOST_PATTERN)], request: Request
) -> Response:
    """What an agent has and how far it is; the answer names its neighbours in each swarm.

    Thousands of hosts call this every few seconds, so body and answer pass pydantic once, as bytes.
    """
    if not _HOST.fullmatch(host):
        raise errors.Invalid(f"{host!r} is not the name of a host")
    reports: Reports = request.state.reports
    tracker: Tracker = request.state.tracker
    try:
        body = protocol.HostReport.model_validate_json(await request.body())
    except ValidationError as exc:
        raise RequestValidationError(exc.errors(include_url=False, include_context=False)) from exc
    await reports.put(host, body)
    asked, look_again = {}, False
    for blob in body.blobs:
        blob_id = BlobId(blob.blob_id)
        if not blob.state.is_final:
            await tracker.heard(host, body, blob_id)
            news = await tracker.news(host, blob_id, blob)
            if news is not None:
                asked[blob.blob_id] = news
            look_again |= await tracker.has_news(host, blob_id, blob)
    reply = protocol.ReportReply.model_construct(swarms=asked, look_again=look_again)
    return Response(reply.model_dump_json(), media_type="application/json")


@router.get(
    "/blobs/{blob_id}/manifest",
    dependencies=[auth.require(Role.AGENT, every_project=True)],
    responses={200: {"content": {"application/json": {}}}},
    response_class=Response,
)
async def manifest(blob_id: UUID, store: StoreDep) -> Response:
    """The piece list of a blob."""
    return Response(await store.manifest(blob_id), media_type="application/json")
