"""The HTTP API of distributions: an image wanted on hosts, how it gets there, and how far it is."""

import asyncio
import json
import time as clock
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime, time
from typing import Annotated, Self
from uuid import UUID

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import AwareDatetime, ConfigDict, Field, TypeAdapter, model_validator

from hostler_common import auth, db, idempotency
from hostler_common.auth import Caller, Role
from hostler_precache import protocol
from hostler_precache.deps import (
    DistributionsDep,
    EfficiencyDep,
    Limit,
    LooksDep,
    SettingsDep,
    StoreDep,
    SwarmsDep,
    TrackerDep,
)
from hostler_precache.distribution import bound, endings, estimate, rollout
from hostler_precache.distribution.distribution_store import HOSTS_AT_ONCE, DistributionStore
from hostler_precache.distribution.distributions import (
    Distribution,
    DistributionId,
    DistributionState,
    HostProgress,
    new_distribution_id,
)
from hostler_precache.distribution.estimate import Estimate
from hostler_precache.distribution.looks import Looks
from hostler_precache.distribution.rollout import Rollout, Targets
from hostler_precache.settings import Settings
from hostler_precache.sources.listers import ListedImage
from hostler_precache.swarming import tracker as tracking
from hostler_precache.transfer.manifest import BlobId
from hostler_precache.wire import HostNames, ImageIdText, Request, View, image_of

router = APIRouter(prefix="/v1")

NAMES_SHOWN = 100
HEARTBEAT_SECONDS = 15.0
Percent = Annotated[int, Field(ge=1, le=100)]
BytesPerSecond = Annotated[int, Field(ge=1, lt=2**63)]


class WindowBody(Request, View):
    """Times of day in which pieces may move; past midnight where `stop` is not after `start`."""

    model_config = ConfigDict(extra="forbid", from_attributes=True)

    start: time
    stop: time
    time_zone: Annotated[str, Field(max_length=64)] = "UTC"
    days: Annotated[list[str], Field(min_length=1, max_length=7)] = Field(
        list(rollout.DAYS), description="on which a window begins"
    )

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        self.to_window()
        return self

    def to_window(self) -> rollout.Window:
        """The window.

        Raises:
            ValueError: a time zone or day that there is not, or a time with an offset.
        """
        if self.start.tzinfo is not None or self.stop.tzinfo is not None:
            raise ValueError("a time of day has no offset: name the time zone")
        return rollout.Window(
            start=self.start,
            stop=self.stop,
            time_zone=self.time_zone,
            days=frozenset(self.days),
        )


Windows = Annotated[list[WindowBody], Field(max_length=rollout.MAX_WINDOWS)]


class RolloutChange(Request):
    """What of a distribution may be changed on its way; what is not named stays."""

    priority: int | None = Field(None, ge=-100, le=100)
    deadline_at: AwareDatetime | None = None
    deadline_percent: Percent | None = None
    host_bytes_per_second: BytesPerSecond | None = None
    total_bytes_per_second: BytesPerSecond | None = None
    windows: Windows | None = None


class DistributionRequest(Request):
    """An image wanted on hosts."""

    image_id: ImageIdText
    image: ListedImage | None = Field(
        None, description="where it is, for an image that is not known yet"
    )
    hosts: HostNames | None = Field(None, description="these hosts, or those with `labels`")
    labels: protocol.Labels = Field(
        {}, description="hosts with these labels, there are or will be; all, without any"
    )
    percent: Percent | None = Field(None, description="of those hosts, so many")
    canary_percent: Annotated[int, Field(ge=1, le=99)] | None = Field(
        None, description="so many get it first, the others once none of these has failed"
    )
    priority: int = Field(0, ge=-100, le=100)
    deadline_at: AwareDatetime | None = None
    deadline_percent: Percent = Field(100, description="of the hosts, by the deadline")
    host_bytes_per_second: BytesPerSecond | None = Field(
        None, description="what one host may fetch"
    )
    total_bytes_per_second: BytesPerSecond | None = Field(
        None, description="what all hosts together may fetch"
    )
    windows: Windows = Field([], description="when pieces may move; always, without any")

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if self.hosts is not None and self.labels:
            raise ValueError("either hosts are named or labels")
        if self.image is not None and self.image.image_id != self.image_id:
            raise ValueError("image.image_id is another one than image_id")
        return self

    def targets(self) -> Targets:
        """On which hosts."""
        hosts = None if self.hosts is None else sorted(set(self.hosts))
        return Targets(hosts=hosts, labels=self.labels, percent=self.percent)

    def rollout(self) -> Rollout:
        """How."""
        return Rollout(
            canary_percent=self.canary_percent,
            deadline_at=self.deadline_at,
            deadline_percent=self.deadline_percent,
            host_bytes_per_second=self.host_bytes_per_second,
            total_bytes_per_second=self.total_bytes_per_second,
            windows=[one.to_window() for one in self.windows],
        )


class RolloutView(View):
    """How the image gets onto its hosts."""

    canary_percent: int | None
    deadline_at: datetime | None
    deadline_percent: int
    host_bytes_per_second: int | None
    total_bytes_per_second: int | None
    windows: list[WindowBody]


class EstimateView(View):
    """How fast this network can do it, and how far from that it is."""

    bound_seconds: float = Field(description="no scheme is faster (Kumar and Ross 2006)")
    limit: str = Field(description="what the bound comes from")
    slowest_host: str | None
    elapsed_seconds: float
    remaining_seconds: float | None
    over_bound: float | None = Field(
        description="time taken, or expected, over the bound; null while nobody can tell"
    )
    ends_at: datetime | None
    is_in_time: bool | None = Field(description="whether the deadline is, or will be, met")
    cluster_bytes_per_second: int | None = Field(
        description="what the hosts of all distributions together may fetch"
    )


class DistributionView(View):
    """A distribution, with the senders' own counts."""

    distribution_id: UUID
    image_id: str
    blob_id: UUID | None
    policy_id: UUID | None
    hosts: list[str] | None
    labels: dict[str, str]
    percent: int | None
    rollout: RolloutView
    wave: int = Field(description="0 while only the canaries get it")
    is_open: bool = Field(description="whether a window lets pieces move now")
    paused_reason: str | None
    deadline_met: bool | None
    priority: int
    state: DistributionState
    reason: str | None
    failures: int = Field(description="how often in a row its image could not be fetched")
    last_failure: str | None = Field(description="stays when it is tried again")
    retry_at: datetime | None = Field(
        description="when its policy tries again what has failed, at the first run from then on"
    )
    size_bytes: int | None
    fetched_bytes: int
    verification: str | None
    seed_sent_bytes: int
    peers_sent_bytes: int
    host_states: dict[str, int]
    created_at: datetime
    announced_at: datetime | None
    finished_at: datetime | None


class HostProgressView(View):
    """Where one host is."""

    host: str
    is_there: bool = Field(description="whether its agent was heard of in the last minute")
    state: protocol.HostState
    reason: str | None
    wave: int
    pieces_done: int
    bytes_done: int
    coverage: str = Field(
        description="a digit a 64th of the image: how many sixteenths are verified"
    )
    sent_bytes: int
    received_from_seed_bytes: int
    received_from_peers_bytes: int
    received_from_rack_bytes: int = Field(description="of the peers' bytes, those from its rack")
    wasted_bytes: int
    link_bytes_per_second: int | None = Field(description="what its network card can do")
    started_at: datetime | None
    updated_at: datetime
    finished_at: datetime | None


class DistributionNow(DistributionView):
    """A distribution with how far it is from the bound."""

    estimate: EstimateView | None = Field(description="null until the size is known")
    pace: str = Field(
        description="in words: how far it is from the bound, or why it does not move; empty while"
        " nobody can tell"
    )
    left: str = Field(description="in words: how long it still takes; empty while nobody can tell")

    @classmethod
    def of(cls, record: Distribution, found: Estimate | None) -> Self:
        """The view of a distribution, and of what is estimated of it."""
        return cls(
            **DistributionView.model_validate(record).model_dump(),
            estimate=None if found is None else EstimateView.model_validate(found),
            pace=estimate.pace_in_words(record, found),
            left=estimate.left_in_words(found),
        )


class DistributionDetail(DistributionNow):
    """A distribution with every host of it."""

    progress: list[HostProgressView]


_PROGRESS = TypeAdapter(list[HostProgress])


async def json_of(
    view: DistributionNow, hosts: Sequence[HostProgress], made: list[str] | None = None
) -> AsyncIterator[str]:
    """A `DistributionDetail` as JSON, in parts, between which others are answered.

    Of thousands of hosts no views are made first: they are as many objects again. And it is made on the
    loop, since a thread that computes takes the loop's turn at each of its system calls. Parts of these
    hosts that are `made` are not made again.
    """
    made = [] if made is None else made
    yield view.model_dump_json()[:-1] + ',"progress":['
    for number, start in enumerate(range(0, len(hosts), HOSTS_AT_ONCE)):
        await asyncio.sleep(0)
        if number == len(made):
            part = _PROGRESS.dump_json(list(hosts[start : start + HOSTS_AT_ONCE]))
            made.append(part[1:-1].decode())
        yield ("," if start else "") + made[number]
    yield "]}"


class DistributionList(View):
    """Distributions, newest first."""

    distributions: list[DistributionView]
    next_marker: str | None


class PlanView(View):
    """What a distribution would do, had it been asked for: nothing has happened."""

    image_id: str
    size_bytes: int | None
    host_count: int
    canary_count: int
    unknown_hosts: list[str] = Field(description="no agent has spoken for these; at most 100")
    full_hosts: list[str] = Field(description="these have no room for it; at most 100")
    bound_seconds: float | None
    limit: str | None
    slowest_host: str | None
    begins_at: datetime | None = Field(description="when a window is open next")
    is_in_time: bool | None = Field(description="whether the deadline is possible at all")
    cluster_bytes_per_second: int | None = Field(
        description="what the hosts of all distributions together may fetch"
    )


@router.post(
    "/distributions",
    status_code=202,
    dependencies=[auth.require(Role.OPERATOR, every_project=True)],
)
async def distribute(
    body: DistributionRequest,
    store: StoreDep,
    distributions: DistributionsDep,
    tracker: TrackerDep,
    settings: SettingsDep,
    caller: Caller,
    key: idempotency.IdempotencyKey = None,
) -> Response:
    """Put an image on hosts: fetched if need be, then announced; `state` says how far it is."""
    image = image_of(body.image) if body.image else None
    async with db.transaction(store.pool) as connection:
        if key is not None:
            stored = await idempotency.begin(
                connection, key, caller=caller.name, request=body.model_dump(mode="json")
            )
            if stored is not None:
                return JSONResponse(stored.body, status_code=stored.status)
        if image is not None:
            await store.add_image(connection, image)
        distribution_id, state = await distributions.add_distribution(
            connection,
            distribution_id=new_distribution_id(),
            image_id=body.image_id,
            targets=body.targets(),
            rollout=body.rollout(),
            priority=body.priority,
        )
        blob_id = None
        if state is DistributionState.DISTRIBUTING:
            blob = await store.served_blob(connection, body.image_id)
            blob_id = blob.blob_id
            casts = tracking.announcements(
                blob,
                [distribution_id],
                public_url=settings.public_url,
                token_seconds=settings.token_seconds,
            )
            said = await endings.beginnings_of(connection, distributions, [distribution_id])
            await store.announce(connection, [*casts, *said])
        reply = {"distribution_id": str(distribution_id), "state": state.value}
        if key is not None:
            await idempotency.finish(connection, key, caller=caller.name, status=202, body=reply)
    if blob_id is not None:
        tracker.forget(blob_id)
    return JSONResponse(
        reply, status_code=202, headers={"Location": f"/v1/distributions/{distribution_id}"}
    )


@router.post("/plans", dependencies=[auth.require(Role.READER, every_project=True)])
async def plan(
    body: DistributionRequest,
    store: StoreDep,
    distributions: DistributionsDep,
    settings: SettingsDep,
) -> PlanView:
    """What a distribution would do: which hosts, how fast at best, and what is in its way."""
    size_bytes = image_of(body.image).size_bytes if body.image else None
    if body.image is None:
        record = await store.image(body.image_id)
        known = record.blob.size_bytes if record.blob else None
        size_bytes = record.image.size_bytes if known is None else known
    chosen = await distributions.chosen(body.targets())
    links = {
        one.host: one.link_bytes_per_second or bound.ASSUMED_LINK_BYTES_PER_SECOND
        for one in chosen
    }
    how = body.rollout()
    if how.host_bytes_per_second is not None:
        links = {host: min(link, how.host_bytes_per_second) for host, link in links.items()}
    found = None
    if size_bytes is not None:
        found = bound.bound(
            size_bytes,
            seed_bytes_per_second=settings.link_bytes_per_second,
            hosts_bytes_per_second=links,
            total_bytes_per_second=how.total_bytes_per_second,
            cluster_bytes_per_second=settings.cluster_bytes_per_second,
        )
    begins_at = rollout.next_open(how.windows, datetime.now(UTC))
    is_in_time = None
    if how.deadline_at is not None and found is not None:
        ends_at = begins_at and bound.ends_at(begins_at, found.seconds)
        is_in_time = ends_at is not None and ends_at <= how.deadline_at
    return PlanView(
        image_id=body.image_id,
        size_bytes=size_bytes,
        host_count=len(chosen),
        canary_count=rollout.share_of(len(chosen), how.canary_percent or 0),
        unknown_hosts=[one.host for one in chosen if not one.is_known][:NAMES_SHOWN],
        full_hosts=[
            one.host
            for one in chosen
            if None not in (one.free_bytes, size_bytes)
            and (one.free_bytes or 0) < (size_bytes or 0)
        ][:NAMES_SHOWN],
        bound_seconds=found.seconds if found else None,
        limit=found.limit.value if found else None,
        slowest_host=found.slowest_host if found else None,
        begins_at=begins_at,
        is_in_time=is_in_time,
        cluster_bytes_per_second=settings.cluster_bytes_per_second,
    )


@router.get("/distributions", dependencies=[auth.require(Role.READER, every_project=True)])
async def list_distributions(
    distributions: DistributionsDep,
    limit: Limit = 100,
    marker: UUID | None = None,
    image_id: str | None = None,
) -> DistributionList:
    """Distributions, newest first."""
    records = await distributions.distributions(limit=limit, marker=marker, image_id=image_id)
    last = str(records[-1].distribution_id) if len(records) == limit else None
    return DistributionList(
        distributions=[DistributionView.model_validate(record) for record in records],
        next_marker=last,
    )


@router.get(
    "/distributions/{distribution_id}",
    response_model=DistributionDetail,
    dependencies=[auth.require(Role.READER, every_project=True)],
)
async def show_distribution(
    distribution_id: UUID, distributions: DistributionsDep, settings: SettingsDep
) -> Response:
    """One distribution with every host of it."""
    record = await distributions.distribution(distribution_id)
    hosts = await distributions.progress(distribution_id)
    found = estimate.estimate(
        record,
        hosts,
        seed_bytes_per_second=settings.link_bytes_per_second,
        cluster_bytes_per_second=settings.cluster_bytes_per_second,
        now=datetime.now(UTC),
    )
    view = DistributionNow.of(record, found)
    return StreamingResponse(json_of(view, hosts), media_type="application/json")


@router.get(
    "/distributions/{distribution_id}/events",
    dependencies=[auth.require(Role.READER, every_project=True)],
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}}},
)
async def watch_distribution(
    distribution_id: UUID, distributions: DistributionsDep, looks: LooksDep
) -> StreamingResponse:
    """The distribution each time it changes, as server-sent events, until it is over.

    The first `progress` event has every host, each later one those that have changed since.
    """
    await distributions.distribution(distribution_id)  # 404 before the stream begins
    return StreamingResponse(_events(looks, distribution_id), media_type="text/event-stream")


async def _events(looks: Looks, distribution_id: UUID) -> AsyncIterator[str]:
    told, told_at = "", clock.monotonic()
    async with aclosing(looks.watch(distribution_id)) as watching:
        async for look, hosts in watching:
            now = clock.monotonic()
            current = DistributionNow.of(look.record, look.estimate)
            # what only the clock changes is no news
            view = current.model_dump_json(exclude={"estimate", "pace", "left"})
            if hosts or view != told:
                told, told_at = view, now
                yield "event: progress\ndata: "
                made = look.texts if hosts is look.changed else None
                async for text in json_of(current, hosts, made):
                    yield text
                yield "\n\n"
            elif now - told_at > HEARTBEAT_SECONDS:
                told_at = now
                yield ": nothing new\n\n"  # a proxy ends what is silent for long
            state = look.record.state
            if state.is_over:
                yield f"event: end\ndata: {json.dumps({'state': state.value})}\n\n"
                return


@router.patch(
    "/distributions/{distribution_id}",
    response_model=DistributionDetail,
    dependencies=[auth.require(Role.OPERATOR, every_project=True)],
)
async def change_distribution(
    distribution_id: UUID,
    body: RolloutChange,
    distributions: DistributionsDep,
    tracker: TrackerDep,
    settings: SettingsDep,
) -> Response:
    """Change its priority, deadline, limits or windows while it is on its way."""
    # a field that is null is taken away, one that is not named stays
    given = body.model_dump(exclude_unset=True, exclude={"priority", "windows"})
    if given.get("deadline_percent", 1) is None:
        given["deadline_percent"] = 100
    if "windows" in body.model_fields_set:
        given["windows"] = [one.to_window() for one in body.windows or []]
    async with db.transaction(distributions.pool) as connection:
        priority, how = await distributions.hold(connection, distribution_id)
        await distributions.change_distribution(
            connection,
            distribution_id,
            priority=priority if body.priority is None else body.priority,
            rollout=replace(how, **given),
        )
    return await _changed(distribution_id, distributions, tracker, settings)


@router.post(
    "/distributions/{distribution_id}/pause",
    response_model=DistributionDetail,
    dependencies=[auth.require(Role.OPERATOR, every_project=True)],
)
async def pause_distribution(
    distribution_id: UUID,
    distributions: DistributionsDep,
    tracker: TrackerDep,
    settings: SettingsDep,
    caller: Caller,
) -> Response:
    """Its hosts fetch nothing more until it is resumed, and keep what they have."""
    async with db.transaction(distributions.pool) as connection:
        await distributions.pause(connection, distribution_id, reason=f"by {caller.name}")
    return await _changed(distribution_id, distributions, tracker, settings)


@router.post(
    "/distributions/{distribution_id}/resume",
    response_model=DistributionDetail,
    dependencies=[auth.require(Role.OPERATOR, every_project=True)],
)
async def resume_distribution(
    distribution_id: UUID,
    store: StoreDep,
    distributions: DistributionsDep,
    efficiency: EfficiencyDep,
    swarms: SwarmsDep,
    tracker: TrackerDep,
    settings: SettingsDep,
) -> Response:
    """Its hosts go on where they were. One that its canaries stopped goes on to all hosts."""
    async with db.transaction(distributions.pool) as connection:
        blob = await distributions.resume(connection, distribution_id)
        finished = await swarms.settle(connection, [distribution_id])
        events = await endings.events_of(connection, distributions, ended=[], finished=finished)
        await store.announce(connection, events)
        if blob is not None:
            await store.announce(
                connection,
                tracking.announcements(
                    blob,
                    [DistributionId(distribution_id)],
                    public_url=settings.public_url,
                    token_seconds=settings.token_seconds,
                ),
            )
    efficiency.done(finished)
    return await _changed(distribution_id, distributions, tracker, settings)


async def _changed(
    distribution_id: UUID,
    distributions: DistributionStore,
    tracker: tracking.Tracker,
    settings: Settings,
) -> Response:
    record = await distributions.distribution(distribution_id)
    if record.blob_id is not None:
        tracker.forget(BlobId(record.blob_id))
    return await show_distribution(distribution_id, distributions, settings)


@router.delete(
    "/distributions/{distribution_id}",
    status_code=204,
    dependencies=[auth.require(Role.OPERATOR, every_project=True)],
)
async def cancel_distribution(
    distribution_id: UUID, distributions: DistributionsDep, tracker: TrackerDep
) -> None:
    """Cancel: hosts that are still fetching stop; files that are in place stay, and are unpinned."""
    blob_id = await distributions.cancel(distribution_id)
    if blob_id is not None:
        tracker.forget(blob_id)
