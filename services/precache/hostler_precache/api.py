"""The HTTP API of operators: images, distributions, hosts, policies."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Annotated, Any, Self
from uuid import UUID

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from hostler_common import auth, db, errors, idempotency
from hostler_common.auth import Caller, Role
from hostler_precache import plugins, protocol, tracker
from hostler_precache.deps import Limit, PoliciesDep, SettingsDep, StoreDep, SwarmsDep
from hostler_precache.distributions import (
    Distribution,
    DistributionState,
    HostProgress,
    HostRecord,
    ImageRecord,
    Policy,
    PolicyId,
    new_distribution_id,
)
from hostler_precache.images import IMAGE_ID_PATTERN, Image
from hostler_precache.listers import ListedImage
from hostler_precache.store import Store

router = APIRouter(prefix="/v1")

ImageIdText = Annotated[str, Field(pattern=IMAGE_ID_PATTERN)]

EVENT_SECONDS = 0.5


class PluginUnknown(errors.Invalid):
    """No lister or fetcher of that name is installed."""

    code = "precache.plugin.unknown"


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _View(BaseModel):
    model_config = ConfigDict(from_attributes=True)


# --- images


class ImageView(_View):
    """An image, and the state of its bytes at the seed."""

    image_id: str
    name: str | None
    fetcher: str
    location: str
    size_bytes: int | None
    disk_format: str | None
    state: str = Field(description="listed, fetching, ready or error")
    reason: str | None
    fetched_bytes: int
    blob_id: str | None
    root: str | None
    verification: str | None = Field(description="hash, checksum or unverifiable")
    created_at: datetime

    @classmethod
    def of(cls, record: ImageRecord) -> Self:
        """The view of a record."""
        image, blob = record.image, record.blob
        size = blob.size_bytes if blob and blob.size_bytes is not None else image.size_bytes
        return cls(
            image_id=image.image_id,
            name=image.name,
            fetcher=image.fetcher,
            location=image.location,
            size_bytes=size,
            disk_format=image.disk_format,
            state=blob.state.value if blob else "listed",
            reason=blob.reason if blob else None,
            fetched_bytes=blob.fetched_bytes if blob else 0,
            blob_id=blob.blob_id if blob else None,
            root=blob.root.hex() if blob and blob.root else None,
            verification=blob.verification.value if blob and blob.verification else None,
            created_at=record.created_at,
        )


class ImageList(_View):
    """Images by id."""

    images: list[ImageView]
    next_marker: str | None


@router.post("/images", status_code=201, dependencies=[auth.require(Role.OPERATOR)])
async def register_image(body: ListedImage, store: StoreDep) -> ImageView:
    """Make an image known; its bytes are fetched when a distribution wants them."""
    image = _image(body)
    async with db.transaction(store.pool) as connection:
        await store.add_image(connection, image)
    return ImageView.of(await store.image(image.image_id))


@router.get("/images", dependencies=[auth.require(Role.READER)])
async def list_images(store: StoreDep, limit: Limit = 100, marker: str | None = None) -> ImageList:
    """Images by id."""
    records = await store.images(limit=limit, marker=marker)
    last = records[-1].image.image_id if len(records) == limit else None
    return ImageList(images=[ImageView.of(record) for record in records], next_marker=last)


@router.get("/images/{image_id}", dependencies=[auth.require(Role.READER)])
async def show_image(image_id: str, store: StoreDep) -> ImageView:
    """One image."""
    return ImageView.of(await store.image(image_id))


# --- distributions


class DistributionRequest(_Request):
    """An image wanted on hosts."""

    image_id: ImageIdText
    image: ListedImage | None = Field(
        None, description="where it is, for an image that is not known yet"
    )
    hosts: Annotated[list[protocol.HostName], Field(min_length=1, max_length=20_000)] | None = (
        Field(None, description="which hosts; all there are or will be, unless given")
    )
    priority: int = Field(0, ge=-100, le=100)


class DistributionView(_View):
    """A distribution, with the senders' own counts."""

    distribution_id: UUID
    image_id: str
    blob_id: UUID | None
    policy_id: UUID | None
    hosts: list[str] | None
    priority: int
    state: DistributionState
    reason: str | None
    size_bytes: int | None
    fetched_bytes: int
    verification: str | None
    seed_sent_bytes: int
    peers_sent_bytes: int
    host_states: dict[str, int]
    created_at: datetime
    announced_at: datetime | None
    finished_at: datetime | None


class HostProgressView(_View):
    """Where one host is."""

    host: str
    state: protocol.HostState
    reason: str | None
    pieces_done: int
    bytes_done: int
    sent_bytes: int
    received_from_seed_bytes: int
    received_from_peers_bytes: int
    wasted_bytes: int
    updated_at: datetime
    finished_at: datetime | None


class DistributionDetail(DistributionView):
    """A distribution with every host of it."""

    progress: list[HostProgressView]


class DistributionList(_View):
    """Distributions, newest first."""

    distributions: list[DistributionView]
    next_marker: str | None


def detail(record: Distribution, hosts: list[HostProgress]) -> DistributionDetail:
    """The view of a distribution with its hosts."""
    view = DistributionView.model_validate(record)
    progress = [HostProgressView.model_validate(host) for host in hosts]
    return DistributionDetail(**view.model_dump(), progress=progress)


@router.post("/distributions", status_code=202, dependencies=[auth.require(Role.OPERATOR)])
async def distribute(
    body: DistributionRequest,
    store: StoreDep,
    settings: SettingsDep,
    caller: Caller,
    key: idempotency.IdempotencyKey = None,
) -> Response:
    """Put an image on hosts: fetched if need be, then announced; `state` says how far it is."""
    if body.image is not None and body.image.image_id != body.image_id:
        raise errors.Invalid("image.image_id is another one than image_id")
    image = _image(body.image) if body.image else None
    async with db.transaction(store.pool) as connection:
        if key is not None:
            stored = await idempotency.begin(
                connection, key, caller=caller.name, request=body.model_dump(mode="json")
            )
            if stored is not None:
                return JSONResponse(stored.body, status_code=stored.status)
        if image is not None:
            await store.add_image(connection, image)
        distribution_id = new_distribution_id()
        state = await store.add_distribution(
            connection,
            distribution_id=distribution_id,
            image_id=body.image_id,
            hosts=None if body.hosts is None else sorted(set(body.hosts)),
            priority=body.priority,
        )
        if state is DistributionState.DISTRIBUTING:
            blob = await store.ready_blob(connection, body.image_id)
            await store.announce(
                connection,
                tracker.announcements(
                    blob,
                    [distribution_id],
                    public_url=settings.public_url,
                    token_seconds=settings.token_seconds,
                ),
            )
        reply = {"distribution_id": str(distribution_id), "state": state.value}
        if key is not None:
            await idempotency.finish(connection, key, caller=caller.name, status=202, body=reply)
    return JSONResponse(
        reply, status_code=202, headers={"Location": f"/v1/distributions/{distribution_id}"}
    )


@router.get("/distributions", dependencies=[auth.require(Role.READER)])
async def list_distributions(
    store: StoreDep,
    limit: Limit = 100,
    marker: UUID | None = None,
    image_id: str | None = None,
) -> DistributionList:
    """Distributions, newest first."""
    records = await store.distributions(limit=limit, marker=marker, image_id=image_id)
    last = str(records[-1].distribution_id) if len(records) == limit else None
    return DistributionList(
        distributions=[DistributionView.model_validate(record) for record in records],
        next_marker=last,
    )


@router.get("/distributions/{distribution_id}", dependencies=[auth.require(Role.READER)])
async def show_distribution(distribution_id: UUID, store: StoreDep) -> DistributionDetail:
    """One distribution with every host of it."""
    record = await store.distribution(distribution_id)
    return detail(record, await store.progress(distribution_id))


@router.get(
    "/distributions/{distribution_id}/events",
    dependencies=[auth.require(Role.READER)],
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}}},
)
async def watch_distribution(distribution_id: UUID, store: StoreDep) -> StreamingResponse:
    """The distribution each time it changes, as server-sent events, until it is over."""
    await store.distribution(distribution_id)  # 404 before the stream begins
    return StreamingResponse(_events(store, distribution_id), media_type="text/event-stream")


async def _events(store: Store, distribution_id: UUID) -> AsyncIterator[str]:
    told = ""
    while True:
        record = await store.distribution(distribution_id)
        current = detail(record, await store.progress(distribution_id)).model_dump_json()
        if current != told:
            told = current
            yield f"event: progress\ndata: {current}\n\n"
        if record.state not in (DistributionState.FETCHING, DistributionState.DISTRIBUTING):
            yield f"event: end\ndata: {json.dumps({'state': record.state.value})}\n\n"
            return
        await asyncio.sleep(EVENT_SECONDS)


@router.delete(
    "/distributions/{distribution_id}",
    status_code=204,
    dependencies=[auth.require(Role.OPERATOR)],
)
async def cancel_distribution(distribution_id: UUID, store: StoreDep) -> None:
    """Cancel: hosts that are still fetching stop; files that are in place stay."""
    await store.cancel(distribution_id)


# --- hosts


class HostView(_View):
    """A host that an agent has spoken for."""

    host: str
    url: str
    free_bytes: int | None
    images: int = Field(description="images of ours that it has")
    first_seen_at: datetime
    seen_at: datetime


class HostList(_View):
    """Hosts by name."""

    hosts: list[HostView]
    next_marker: str | None


@router.get("/hosts", dependencies=[auth.require(Role.READER)])
async def list_hosts(swarms: SwarmsDep, limit: Limit = 100, marker: str | None = None) -> HostList:
    """Hosts by name."""
    records: list[HostRecord] = await swarms.hosts(limit=limit, marker=marker)
    return HostList(
        hosts=[HostView.model_validate(record) for record in records],
        next_marker=records[-1].host if len(records) == limit else None,
    )


# --- policies


def _storable(options: dict[str, Any]) -> dict[str, Any]:
    # what Python's json reads beyond JSON: NaN, Infinity, halves of surrogate pairs
    json.dumps(options, allow_nan=False, ensure_ascii=False).encode()
    return options


class PolicyRequest(_Request):
    """Put what a lister names on hosts, again and again."""

    name: Annotated[str, Field(min_length=1, max_length=100)]
    lister: str = Field("static", max_length=100)
    options: Annotated[dict[str, Any], AfterValidator(_storable)] = Field(
        {}, description="what the lister wants to know"
    )
    hosts: Annotated[list[protocol.HostName], Field(min_length=1, max_length=20_000)] | None = None
    priority: int = Field(0, ge=-100, le=100)
    every_seconds: int = Field(300, ge=1, le=7 * 86400)


class PolicyView(_View):
    """A policy and its last run."""

    policy_id: UUID
    name: str
    lister: str
    options: dict[str, Any]
    hosts: list[str] | None
    priority: int
    every_seconds: int
    next_run_at: datetime
    last_run_at: datetime | None
    last_outcome: str | None = Field(description="ok, partial or failed")
    last_detail: str | None


class PolicyList(_View):
    """Policies by name."""

    policies: list[PolicyView]
    next_marker: str | None


@router.post("/policies", status_code=201, dependencies=[auth.require(Role.OPERATOR)])
async def create_policy(body: PolicyRequest, policies: PoliciesDep) -> PolicyView:
    """Make a policy, which is due at once."""
    _check_plugin(plugins.LISTERS, body.lister)
    policy_id = PolicyId(uuid.uuid4())
    async with db.transaction(policies.pool) as connection:
        await policies.add_policy(connection, policy_id=policy_id, **body.model_dump())
    return PolicyView.model_validate(await policies.policy(policy_id))


@router.get("/policies", dependencies=[auth.require(Role.READER)])
async def list_policies(
    policies: PoliciesDep, limit: Limit = 100, marker: str | None = None
) -> PolicyList:
    """Policies by name."""
    records: list[Policy] = await policies.policies(limit=limit, marker=marker)
    return PolicyList(
        policies=[PolicyView.model_validate(record) for record in records],
        next_marker=records[-1].name if len(records) == limit else None,
    )


@router.get("/policies/{policy_id}", dependencies=[auth.require(Role.READER)])
async def show_policy(policy_id: UUID, policies: PoliciesDep) -> PolicyView:
    """One policy."""
    return PolicyView.model_validate(await policies.policy(policy_id))


@router.post(
    "/policies/{policy_id}/run", status_code=202, dependencies=[auth.require(Role.OPERATOR)]
)
async def run_policy(policy_id: UUID, policies: PoliciesDep) -> PolicyView:
    """Run it now."""
    await policies.run_policy_now(policy_id)
    return PolicyView.model_validate(await policies.policy(policy_id))


@router.delete(
    "/policies/{policy_id}", status_code=204, dependencies=[auth.require(Role.OPERATOR)]
)
async def delete_policy(policy_id: UUID, policies: PoliciesDep) -> None:
    """Remove the policy; what it distributed stays."""
    await policies.remove_policy(policy_id)


def _image(listed: ListedImage) -> Image:
    _check_plugin(plugins.FETCHERS, listed.fetcher)
    try:
        return listed.to_image()
    except ValueError as exc:
        raise errors.Invalid(str(exc)) from exc


def _check_plugin(group: str, name: str) -> None:
    try:
        plugins.check_installed(group, name)
    except plugins.UnknownPluginError as exc:
        raise PluginUnknown(str(exc)) from exc
