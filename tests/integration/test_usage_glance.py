"""A whole Glance is used through its API; what was held and sent is what Glance's own rows and the wire say.

Glance (peers/glance_server.py) keeps its rows with microseconds, and cuts every moment to its second when it
notifies: `created_at` of the row exactly so, `deleted_at` a moment after the row's. What we say may therefore be
up to a second from the rows at each edge, and between the edges not at all.
"""

import asyncio
import io
import os
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from hostler_common.testing import RunningService, RunService, eventually
from hostler_usage import app
from hostler_usage.settings import Settings

SECOND = timedelta(seconds=1)
MICROSECOND = timedelta(microseconds=1)
SIZE_BYTES = (3 << 20) + 77
BIG_BYTES = 24 << 20  # more than the buffers of both ends of a connection hold

RunPeer = Callable[..., AbstractAsyncContextManager[str]]
Overheard = Callable[[str], AbstractAsyncContextManager[Callable[[], Awaitable[int]]]]
Stored = Callable[[RunningService, int], Awaitable[list[dict[str, Any]]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """Somebody who uses Glance."""

    session: aiohttp.ClientSession
    url: str
    project_id: str

    @property
    def headers(self) -> dict[str, str]:
        """What Keystone's middleware would have set."""
        return {
            "X-Identity-Status": "Confirmed",
            "X-Project-Id": self.project_id,
            "X-User-Id": f"user-of-{self.project_id}",
            "X-Roles": "member",
        }

    async def _call(self, method: str, path: str, expected: int, **body: Any) -> Any:
        headers = self.headers | body.pop("headers", {})
        async with self.session.request(
            method, f"{self.url}/v2/images{path}", headers=headers, **body
        ) as response:
            assert response.status == expected, await response.text()
            return await response.json() if response.content_type == "application/json" else None

    async def create(self, **fields: Any) -> str:
        """An image without bytes."""
        body = {"name": "an image", "disk_format": "raw", "container_format": "bare", **fields}
        made = await self._call("POST", "", 201, json=body)
        return str(made["id"])

    async def upload(self, image_id: str, data: bytes, expected: int = 204) -> None:
        headers = {"Content-Type": "application/octet-stream"}
        await self._call(
            "PUT", f"/{image_id}/file", expected, data=io.BytesIO(data), headers=headers
        )

    async def bring_in(self, image_id: str, data: bytes) -> None:
        """Stage and import the bytes, and wait until Glance has."""
        headers = {"Content-Type": "application/octet-stream"}
        staged = io.BytesIO(data)
        await self._call("PUT", f"/{image_id}/stage", 204, data=staged, headers=headers)
        method = {"method": {"name": "glance-direct"}}
        headers = {"X-Auth-Token": "none"}  # the task wants one to keep, and never shows it
        await self._call("POST", f"/{image_id}/import", 202, json=method, headers=headers)

        async def is_active() -> bool:
            return bool((await self._call("GET", f"/{image_id}", 200))["status"] == "active")

        await eventually(is_active)

    async def replace(self, image_id: str, name: str, value: str) -> None:
        headers = {"Content-Type": "application/openstack-images-v2.1-json-patch"}
        patch = [{"op": "replace", "path": f"/{name}", "value": value}]
        await self._call("PATCH", f"/{image_id}", 200, json=patch, headers=headers)

    async def act(self, image_id: str, action: str) -> None:
        await self._call("POST", f"/{image_id}/actions/{action}", 204)

    async def delete(self, image_id: str) -> None:
        await self._call("DELETE", f"/{image_id}", 204)

    async def download(self, image_id: str, span: str | None = None) -> tuple[int, bool]:
        """How many bytes came, and whether they were all that had been promised."""
        headers = self.headers | ({"Range": f"bytes={span}"} if span else {})
        came = 0
        async with self.session.get(
            f"{self.url}/v2/images/{image_id}/file", headers=headers
        ) as response:
            assert response.status == (206 if span else 200)
            try:
                async for chunk in response.content.iter_any():
                    came += len(chunk)
            except aiohttp.ClientPayloadError:
                return came, False
        return came, True

    async def hang_up(self, image_id: str) -> int:
        """Ask for an image, and close the connection when some of it has come."""
        address = urlsplit(self.url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        lines = [f"GET /v2/images/{image_id}/file HTTP/1.1", f"Host: {address.netloc}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
        came = len(await reader.readexactly(1 << 20))
        writer.transport.abort()
        return came


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """An image as Glance's database has it."""

    created_at: datetime
    deleted_at: datetime | None
    size_bytes: int
    owner: str


def rows_of(directory: Path) -> dict[str, Row]:
    connection = sqlite3.connect(directory / "glance.sqlite")
    try:
        found = connection.execute(
            "SELECT id, created_at, deleted_at, coalesce(size, 0), owner FROM images"
        ).fetchall()
    finally:
        connection.close()
    return {
        image_id: Row(
            created_at=moment(created_at),
            deleted_at=moment(deleted_at) if deleted_at else None,
            size_bytes=size_bytes,
            owner=owner,
        )
        for image_id, created_at, deleted_at, size_bytes, owner in found
    }


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def whole(at: datetime) -> datetime:
    """As Glance writes it."""
    return at.replace(microsecond=0)


async def passed(seconds: float) -> datetime:
    """So much time has passed by the clock that Glance reads, too; what it shows now."""
    until = datetime.now(UTC) + timedelta(seconds=seconds)

    async def is_past() -> bool:
        return datetime.now(UTC) >= until

    await eventually(is_past)
    return datetime.now(UTC)


@asynccontextmanager
async def tenants_of(url: str) -> AsyncIterator[tuple[Tenant, Tenant]]:
    async with aiohttp.ClientSession() as session:
        yield (
            Tenant(session=session, url=url, project_id="alpha"),
            Tenant(session=session, url=url, project_id="beta"),
        )


def run_usage(run_service: RunService) -> AbstractAsyncContextManager[RunningService]:
    return run_service(app.serve, Settings, app.PACKAGE, fold_seconds=0.1, log_level="WARNING")


async def used(
    service: RunningService, start: datetime, end: datetime, group: str
) -> dict[str, dict[str, int]]:
    """Of each group: unit-microseconds of what was held, and what was sent."""
    answer = await service.api.get(
        "/v1/usage",
        start=start.isoformat(),
        end=end.isoformat(),
        group_by=group,
        resource_type="image",
    )
    return {
        row["group"][group]: row["unit_microseconds"] | row["amounts"] for row in answer["usage"]
    }


async def life(service: RunningService, image_id: str) -> list[dict[str, Any]]:
    answer = await service.api.get(f"/v1/resources/image/{image_id}/intervals")
    assert answer["anomalies"] == []
    return [
        interval
        | {
            "start": datetime.fromisoformat(interval["start"]),
            "end": datetime.fromisoformat(interval["end"]) if interval["end"] else None,
        }
        for interval in answer["intervals"]
    ]


def span(row: Row, start: datetime, end: datetime) -> int:
    """Microseconds of the image's row within the window."""
    until = end if row.deleted_at is None else min(end, row.deleted_at)
    return max(0, (until - max(start, row.created_at)) // MICROSECOND)


async def test_images_are_held_from_created_at_to_deleted_at_of_glances_own_rows(
    run_service: RunService,
    run_peer: RunPeer,
    overheard: Overheard,
    stored: Stored,
    amqp_url: str,
    tmp_path: Path,
) -> None:
    before = whole(datetime.now(UTC)) - SECOND
    async with run_usage(run_service) as service, overheard("glance") as published:
        async with (
            run_peer("glance", tmp_path, "--tenants", "--amqp-url", amqp_url) as url,
            tenants_of(url) as (alpha, beta),
        ):
            gone = await alpha.create(os_distro="debian")
            await alpha.upload(gone, os.urandom(SIZE_BYTES))
            stays = await beta.create()
            await beta.bring_in(stays, os.urandom(1000))
            await passed(1.1)
            await alpha.replace(gone, "visibility", "public")
            await alpha.act(gone, "deactivate")
            deactivated = await passed(1.3)
            await alpha.act(gone, "reactivate")
            await passed(1.1)
            await alpha.delete(gone)
            after = whole(await passed(1.5))
        events = await stored(service, await published())

        rows = rows_of(tmp_path)
        assert [event["problems"] for event in events] == [[]] * len(events)
        told = {event["resource_id"] for event in events if event["resource_type"] == "image"}
        assert told == rows.keys() == {gone, stays}
        others = {event["event_type"] for event in events if event["resource_type"] is None}
        assert {name.partition(".")[0] for name in others} == {"task"}  # of the import

        lives = {image_id: await life(service, image_id) for image_id in rows}
        for image_id, row in rows.items():
            course = lives[image_id]
            assert course[0]["start"] == whole(row.created_at)
            assert (course[-1]["end"] is None) == (row.deleted_at is None)
            if row.deleted_at is not None:
                assert abs(course[-1]["end"] - row.deleted_at) < SECOND
            assert {part["attributes"]["size_bytes"] for part in course} == {row.size_bytes}
            assert {part["project_id"] for part in course} == {row.owner}
            assert {part["provenance"] for part in course} == {"events"}
        assert {part["attributes"]["os"] for part in lives[gone]} == {"debian"}
        assert [
            (part["attributes"]["visibility"], part["state_class"]) for part in lives[gone]
        ] == [
            ("shared", "active"),
            ("public", "active"),
            ("public", "deactivated"),
            ("public", "active"),
        ]
        assert lives[gone][2]["start"] < deactivated < lives[gone][2]["end"]

        for group in ("resource", "project"):
            ours = await used(service, before, after, group)
            assert len(ours) == 2
            for image_id, row in rows.items():
                held = ours[image_id if group == "resource" else row.owner]
                edges = 1 if row.deleted_at is None else 2
                theirs, leeway = span(row, before, after), edges * (SECOND // MICROSECOND)
                assert abs(held["image_hours"] - theirs) < leeway < theirs
                said = (lives[image_id][-1]["end"] or after) - whole(row.created_at)
                assert held["image_hours"] == said // MICROSECOND
                assert held["image_byte_hours"] == row.size_bytes * held["image_hours"]
        # between the edges there is no leeway
        inside = (whole(rows[gone].created_at) + SECOND, whole(rows[gone].created_at) + 3 * SECOND)
        assert (await used(service, *inside, "resource"))[gone] == {
            "image_hours": 2_000_000,
            "image_byte_hours": 2_000_000 * SIZE_BYTES,
        }


async def test_bytes_that_glance_sent_are_those_that_came_and_the_owners(
    run_service: RunService,
    run_peer: RunPeer,
    overheard: Overheard,
    stored: Stored,
    amqp_url: str,
    tmp_path: Path,
) -> None:
    before = whole(datetime.now(UTC)) - SECOND
    async with run_usage(run_service) as service, overheard("glance") as published:
        async with (
            run_peer("glance", tmp_path, "--tenants", "--amqp-url", amqp_url) as url,
            tenants_of(url) as (alpha, beta),
        ):
            came: Counter[str] = Counter()
            one, two = await alpha.create(visibility="public"), await beta.create()
            await alpha.upload(one, os.urandom(SIZE_BYTES))
            await beta.upload(two, os.urandom(BIG_BYTES))
            for who, image_id, part, size_bytes in (
                (alpha, one, None, SIZE_BYTES),
                (beta, one, None, SIZE_BYTES),  # whose it is counts, not who takes it
                (alpha, one, "0-99999", 100_000),
                (alpha, one, "-5", 5),
                (alpha, one, "1000-", SIZE_BYTES - 1000),
                (beta, two, None, BIG_BYTES),
            ):
                received, is_whole = await who.download(image_id, part)
                assert (received, is_whole) == (size_bytes, True)
                came[image_id] += received
            # the store loses its end: Glance sends what there is, and says so as an error
            await asyncio.to_thread(os.truncate, tmp_path / "images" / one, 1_500_000)
            assert await alpha.download(one) == (1_500_000, False)
            came[one] += 1_500_000
            # of a transfer that the client breaks off Glance says nothing at all
            assert 0 < await beta.hang_up(two) < BIG_BYTES
        events = await stored(service, await published())
        after = await passed(0.1)

        sent = [event for event in events if event["event_type"] == "image.send"]
        assert Counter(event["priority"] for event in sent) == {"INFO": 6, "ERROR": 1}
        assert [event["problems"] for event in sent] == [[]] * 7
        ours = await used(service, before, after, "resource")
        assert {name: held["image_sent_bytes"] for name, held in ours.items()} == dict(came)
        ours = await used(service, before, after, "project")
        assert {name: held["image_sent_bytes"] for name, held in ours.items()} == {
            "alpha": came[one],
            "beta": came[two],
        }


async def test_images_that_never_got_their_bytes_count_none(
    run_service: RunService,
    run_peer: RunPeer,
    overheard: Overheard,
    stored: Stored,
    amqp_url: str,
    tmp_path: Path,
) -> None:
    before = whole(datetime.now(UTC)) - SECOND
    async with run_usage(run_service) as service, overheard("glance") as published:
        async with (
            run_peer("glance", tmp_path, "--tenants", "--amqp-url", amqp_url) as url,
            tenants_of(url) as (alpha, _),
        ):
            waits, failed = await alpha.create(), await alpha.create(disk_format="qcow2")
            gone = await alpha.create(disk_format="qcow2")
            for image_id in (failed, gone):
                await alpha.upload(image_id, os.urandom(SIZE_BYTES), expected=415)  # it is none
            await passed(1.1)
            await alpha.delete(gone)
            after = await passed(0.1)
        events = await stored(service, await published())

        errors = [event for event in events if event["priority"] == "ERROR"]
        assert [(event["event_type"], event["problems"]) for event in errors] == [
            ("image.upload", ["no_resource_id"])
        ] * 2  # Glance's error is a sentence, and nothing else
        ours = await used(service, before, after, "resource")
        assert ours.keys() & {waits, failed} == set()
        assert gone not in ours
