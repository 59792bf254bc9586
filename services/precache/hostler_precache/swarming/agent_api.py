"""The HTTP API of agents: what a host should have, how far it is, and a blob's pieces."""

import base64
import re
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from hostler_common import auth, errors, http
from hostler_common.auth import Caller, Principal, Role
from hostler_precache import protocol
from hostler_precache.deps import (
    DesiresDep,
    GrowthsDep,
    SettingsDep,
    StoreDep,
    SwarmsDep,
    TrackerDep,
)
from hostler_precache.swarming.growths import pause_seconds
from hostler_precache.swarming.reports import Reports
from hostler_precache.swarming.swarm_store import SwarmStore
from hostler_precache.swarming.tracker import Tracker, desired_image
from hostler_precache.transfer.manifest import DIGEST_BYTES, MAX_PIECES, BlobId

# digests in one answer: more, and making it would hold up whoever else asks
TOLD_AT_ONCE = 8192
router = APIRouter(prefix="/v1")
_HOST = re.compile(protocol.HOST_PATTERN.removesuffix("$"))


@router.get("/desired", dependencies=[auth.require(Role.AGENT, every_project=True)])
async def desired(
    desires: DesiresDep,
    tracker: TrackerDep,
    settings: SettingsDep,
    caller: Caller,
    host: Annotated[str, Query(pattern=protocol.HOST_PATTERN)],
) -> protocol.Desired:
    """What a host should have; its agent asks at start, at every fanout, and now and then."""
    caller.speak_for(host)
    desire = await desires.ask(host)
    return protocol.Desired(
        images=[
            desired_image(
                wanted,
                await tracker.swarm(host, wanted.blob.blob_id),
                token_seconds=settings.token_seconds,
            )
            for wanted in desire.wanted
        ],
        deleted_image_ids=list(desire.deleted_image_ids),
    )


direct_router = APIRouter(prefix="/v1", route_class=http.DirectRoute)


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
    caller: Principal = request.state.principal
    caller.speak_for(host)
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
            if not await tracker.heard(host, body, blob_id):
                look_again = True  # then it learns that it should not
                continue
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
async def manifest(blob_id: UUID, store: StoreDep, swarms: SwarmsDep, caller: Caller) -> Response:
    """The piece list of a blob."""
    await _wanted_by(caller, swarms, blob_id)
    return Response(await store.manifest(blob_id), media_type="application/json")


@router.get("/blobs/{blob_id}/growth", dependencies=[auth.require(Role.AGENT, every_project=True)])
async def growth(
    blob_id: UUID,
    growths: GrowthsDep,
    swarms: SwarmsDep,
    tracker: TrackerDep,
    caller: Caller,
    after: Annotated[int, Query(ge=0, le=MAX_PIECES)] = 0,
    most: Annotated[int, Query(ge=1, le=MAX_PIECES)] = MAX_PIECES,
) -> protocol.Growth:
    """The digests of a blob's pieces from number `after` on, `most` of them, also while it is fetched.

    The answer waits a moment for more to come, and has no root while there are more to ask for. 404
    means that what is here of the blob is nothing.
    """
    await _wanted_by(caller, swarms, blob_id)
    most = min(most, TOLD_AT_ONCE)
    found = await growths.ask(blob_id, after=after, most=most)
    is_cut = len(found.digests) == most * DIGEST_BYTES
    members = tracker.members(BlobId(str(blob_id)))
    return protocol.Growth(
        size_bytes=found.size_bytes,
        piece_bytes=found.piece_bytes,
        first_piece=found.first_piece,
        digests=base64.b64encode(found.digests).decode("ascii"),
        root=found.root.hex() if found.root is not None else None,
        pause_seconds=0.0 if is_cut else pause_seconds(members),
    )


async def _wanted_by(caller: Principal, swarms: SwarmStore, blob_id: UUID) -> None:
    """Return if the caller may know of the blob: one that speaks for a host, if it is wanted there.

    Raises:
        OtherHost: it is not.
    """
    if caller.host is not None and not await swarms.has_blob(caller.host, blob_id):
        raise auth.OtherHost(f"no distribution wants blob {blob_id} on {caller.host}")
