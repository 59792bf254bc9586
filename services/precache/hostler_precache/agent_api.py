"""The HTTP API of agents: what a host should have, how far it is, and a blob's pieces."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Path, Query, Response

from hostler_common import auth
from hostler_common.auth import Role
from hostler_precache import protocol
from hostler_precache.deps import ReportsDep, SettingsDep, StoreDep, SwarmsDep, TrackerDep
from hostler_precache.manifest import BlobId
from hostler_precache.tracker import desired_image

router = APIRouter(prefix="/v1")


@router.get("/desired", dependencies=[auth.require(Role.AGENT)])
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


@router.put("/hosts/{host}/report", dependencies=[auth.require(Role.AGENT)])
async def report(
    host: Annotated[str, Path(pattern=protocol.HOST_PATTERN)],
    body: protocol.HostReport,
    reports: ReportsDep,
    tracker: TrackerDep,
) -> protocol.ReportReply:
    """What an agent has and how far it is; the answer names its neighbours in each swarm."""
    await reports.put(host, body)
    asked, look_again = {}, False
    for blob in body.blobs:
        blob_id = BlobId(blob.blob_id)
        if not blob.state.is_final:
            await tracker.heard(host, body, blob_id)
            asked[blob_id] = await tracker.swarm(host, blob_id, banned=blob.banned)
            look_again |= await tracker.is_halted(host, blob_id)
    return protocol.ReportReply(swarms=asked, look_again=look_again)


@router.get(
    "/blobs/{blob_id}/manifest",
    dependencies=[auth.require(Role.AGENT)],
    responses={200: {"content": {"application/json": {}}}},
    response_class=Response,
)
async def manifest(blob_id: UUID, store: StoreDep) -> Response:
    """The piece list of a blob."""
    return Response(await store.manifest(blob_id), media_type="application/json")
