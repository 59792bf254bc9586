"""The HTTP API of agents: what a host should have, how far it is, and a blob's pieces."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Path, Query, Response

from hostler_common import auth, db
from hostler_common.auth import Role
from hostler_common.bus import Message
from hostler_precache import messages, protocol, tracker
from hostler_precache.deps import SettingsDep, StoreDep, SwarmsDep
from hostler_precache.distributions import DistributionId
from hostler_precache.manifest import BlobId
from hostler_precache.store import Store

router = APIRouter(prefix="/v1")


@router.get("/desired", dependencies=[auth.require(Role.AGENT)])
async def desired(
    swarms: SwarmsDep,
    settings: SettingsDep,
    host: Annotated[str, Query(pattern=protocol.HOST_PATTERN)],
) -> protocol.Desired:
    """What a host should have; its agent asks at start, at every fanout, and now and then."""
    wanted = await swarms.desired(host)
    return protocol.Desired(
        images=[tracker.desired_image(one, token_seconds=settings.token_seconds) for one in wanted]
    )


@router.put("/hosts/{host}/report", dependencies=[auth.require(Role.AGENT)])
async def report(
    host: Annotated[str, Path(pattern=protocol.HOST_PATTERN)],
    body: protocol.HostReport,
    store: StoreDep,
    swarms: SwarmsDep,
    settings: SettingsDep,
) -> protocol.ReportReply:
    """What an agent has and how far it is; the answer names its neighbours in each swarm."""
    async with db.transaction(store.pool) as connection:
        for distribution_id in await swarms.report(connection, host, body):
            await store.announce(connection, [await _finished(store, connection, distribution_id)])
    moving = [blob for blob in body.blobs if not blob.state.is_final]
    seeds = await swarms.seeds([blob.blob_id for blob in moving]) if moving else {}
    asked = {}
    for blob in moving:
        blob_id = BlobId(blob.blob_id)
        asked[blob_id] = tracker.swarm_of(
            host,
            blob_id,
            await swarms.members(blob_id, within_seconds=settings.member_seconds),
            seeds=seeds.get(blob_id, []),
            banned=blob.banned,
        )
    return protocol.ReportReply(swarms=asked)


async def _finished(
    store: Store, connection: db.Connection, distribution_id: DistributionId
) -> Message:
    image_id, states = await store.host_states(connection, distribution_id)
    return messages.DISTRIBUTION_FINISHED.message(
        messages.DistributionFinished(
            distribution_id=str(distribution_id), image_id=image_id, hosts=states
        ),
        app_id=messages.APP_ID,
    )


@router.get(
    "/blobs/{blob_id}/manifest",
    dependencies=[auth.require(Role.AGENT)],
    responses={200: {"content": {"application/json": {}}}},
    response_class=Response,
)
async def manifest(blob_id: UUID, store: StoreDep) -> Response:
    """The piece list of a blob."""
    return Response(await store.manifest(blob_id), media_type="application/json")
