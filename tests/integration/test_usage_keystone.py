"""A whole Keystone is used through its API: projects and users live from the call that made them to that which ends
them, in both formats of its notifications.

Keystone's rows of projects keep no time, but it notifies before it answers: each moment lies between the sending of
a request and its answer, by the one clock of this machine.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from hostler_common.testing import RunningService, RunService
from hostler_usage import app
from hostler_usage.settings import Settings

RunPeer = Callable[..., AbstractAsyncContextManager[str]]
Overheard = Callable[[str], AbstractAsyncContextManager[Callable[[], Awaitable[int]]]]
Stored = Callable[[RunningService, int], Awaitable[list[dict[str, Any]]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """From the sending of a request to the end of its answer."""

    sent_at: datetime
    answered_at: datetime

    def covers(self, moment: str) -> bool:
        return self.sent_at <= datetime.fromisoformat(moment) <= self.answered_at


@dataclass(frozen=True, slots=True, kw_only=True)
class Keystone:
    """Keystone as its administrator uses it; `calls` are those that made, changed and ended what has an id."""

    session: aiohttp.ClientSession
    url: str
    token: dict[str, str] = field(default_factory=dict)
    calls: dict[str, list[Call]] = field(default_factory=dict)

    async def log_in(self, password: str, expected: int = 201) -> None:
        domain = {"id": "default"}
        user = {"name": "admin", "domain": domain, "password": password}
        auth = {
            "identity": {"methods": ["password"], "password": {"user": user}},
            "scope": {"project": {"name": "admin", "domain": domain}},
        }
        async with self.session.post(
            f"{self.url}/v3/auth/tokens", json={"auth": auth}
        ) as response:
            assert response.status == expected, await response.text()
            if expected == 201:
                self.token["X-Auth-Token"] = response.headers["X-Subject-Token"]

    async def _call(self, method: str, path: str, expected: int, body: Any = None) -> Any:
        sent_at = datetime.now(UTC)
        async with self.session.request(
            method, f"{self.url}/v3{path}", headers=self.token, json=body
        ) as response:
            assert response.status == expected, await response.text()
            answer = await response.json() if expected != 204 else None
        call = Call(sent_at=sent_at, answered_at=datetime.now(UTC))
        item_id = next(iter(answer.values()))["id"] if answer else path.rpartition("/")[2]
        self.calls.setdefault(item_id, []).append(call)
        return item_id

    async def create(self, kind: str, name: str, domain_id: str | None = "default") -> str:
        body = {"name": name} | ({"domain_id": domain_id} if domain_id else {})
        made: str = await self._call("POST", f"/{kind}s", 201, {kind: body})
        return made

    async def change(self, kind: str, item_id: str, **fields: Any) -> None:
        await self._call("PATCH", f"/{kind}s/{item_id}", 200, {kind: fields})

    async def delete(self, kind: str, item_id: str) -> None:
        await self._call("DELETE", f"/{kind}s/{item_id}", 204)


@asynccontextmanager
async def administrator(url: str) -> AsyncIterator[Keystone]:
    async with aiohttp.ClientSession() as session:
        keystone = Keystone(session=session, url=url)
        await keystone.log_in("admin")
        yield keystone


async def intervals(service: RunningService, kind: str, item_id: str) -> list[dict[str, Any]]:
    answer = await service.api.get(f"/v1/resources/{kind}/{item_id}/intervals")
    assert answer["anomalies"] == []
    found: list[dict[str, Any]] = answer["intervals"]
    return found


@pytest.mark.parametrize("notifications", ["cadf", "basic"])
async def test_projects_and_users_live_from_the_call_that_made_them_to_the_one_that_ended_them(
    notifications: str,
    run_service: RunService,
    run_peer: RunPeer,
    overheard: Overheard,
    stored: Stored,
    amqp_url: str,
    tmp_path: Path,
) -> None:
    settings = {"fold_seconds": 0.1, "log_level": "WARNING"}
    async with (
        run_service(app.serve, Settings, app.PACKAGE, **settings) as service,
        overheard("keystone") as published,
    ):
        async with (
            run_peer(
                "keystone",
                tmp_path,
                *("--amqp-url", amqp_url, "--format", notifications),
            ) as url,
            administrator(url) as keystone,
        ):
            await keystone.log_in("wrong", expected=401)
            gone = {kind: await keystone.create(kind, "gone") for kind in ("project", "user")}
            stays = {kind: await keystone.create(kind, "stays") for kind in ("project", "user")}
            for items in (gone, stays):
                for kind, item_id in items.items():
                    await keystone.change(kind, item_id, description="changed")
                    await keystone.change(kind, item_id, enabled=False)
            for kind, item_id in gone.items():
                await keystone.delete(kind, item_id)
            # what goes with its domain
            domain_id = await keystone.create("domain", "theirs", domain_id=None)
            swept = {
                kind: await keystone.create(kind, "swept", domain_id)
                for kind in ("project", "user")
            }
            await keystone.change("domain", domain_id, enabled=False)
            await keystone.delete("domain", domain_id)
        events = await stored(service, await published())

        for kind in ("project", "user"):
            for item_id, ending in (
                (gone[kind], keystone.calls[gone[kind]][-1]),
                (stays[kind], None),
                (swept[kind], keystone.calls[domain_id][-1]),
                *([(domain_id, keystone.calls[domain_id][-1])] if kind == "project" else []),
            ):
                course = await intervals(service, kind, item_id)
                assert keystone.calls[item_id][0].covers(course[0]["start"])
                if ending is None:
                    assert course[-1]["end"] is None
                else:
                    assert ending.covers(course[-1]["end"])
                assert {part["provenance"] for part in course} == {"events"}
                assert {part["project_id"] for part in course} == {
                    item_id if kind == "project" else None
                }
        told = [event for event in events if event["resource_type"] in ("project", "user")]
        assert all(event["problems"] == [] and event["resource_id"] for event in told)
        for kind in ("project", "user"):
            assert [
                event["event_type"] for event in told if event["resource_id"] == gone[kind]
            ] == [
                f"identity.{kind}.created",
                f"identity.{kind}.updated",
                f"identity.{kind}.updated",  # Keystone keeps `disabled` to itself
                f"identity.{kind}.deleted",
            ]
        # a project's events are its own readers', those of users nobody's
        assert {event["project_id"] for event in told if event["resource_type"] == "user"} == {
            None
        }
        assert all(
            event["project_id"] == event["resource_id"]
            for event in told
            if event["resource_type"] == "project"
        )
        others = {event["event_type"] for event in events} - {
            event["event_type"] for event in told
        }
        assert others >= {"identity.authenticate", "identity.role.created"}
