"""Default deny, and a caller that is bound to a project sees that project alone: on every GET route."""

import hashlib
import json
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp

from hostler_common import client, settings, testing
from hostler_common.testing import RunningService
from hostler_usage import app
from hostler_usage.settings import Settings

RunUsage = Callable[..., AbstractAsyncContextManager[RunningService]]
Publish = Callable[..., Awaitable[None]]
Stored = Callable[..., Awaitable[list[dict[str, Any]]]]

DAY = datetime(2026, 5, 8, tzinfo=UTC)
HOUR = timedelta(hours=1)
# whatever belongs to the other project has this in it
OTHER = "zulu"
OWN = "alpha"
# whoever asks, these say nothing of any project
OPEN = {"/healthz", "/readyz", "/metrics", "/login", "/v1/version", "/v1/openapi.json"}
SHOWN_TO_ALL = {"/static/usage/{name}", "/quarantine"}
# of these an operator sees something of the other project, so that the data is there to be leaked
TELLING = {
    "/v1/events",
    "/v1/events/{event}",
    "/v1/events/{event}/body",
    "/v1/usage",
    "/v1/resources/{resource_type}/{resource_id}/intervals",
    "/v1/audits",
    "/v1/audits/report",
    "/v1/operations",
    "/v1/operations/summary",
    "/v1/costs",
    "/v1/price-books",
    "/v1/price-books/{name}",
    "/v1/budgets",
    "/v1/budgets/{name}",
    "/v1/project-groups",
    "/v1/exports/usage.{file_format}",
    "/v1/exports/intervals.{file_format}",
    "/v1/exports/focus.{file_format}",
    "/v1/reports/idle",
    "/v1/reports/top-projects",
    "/v1/quarantine/{entry_id}/body",
    "/events",
    "/v1/usage/explain",
    "/budgets",
    "/costs",
    "/explain",
    "/price-books",
    "/price-books/{name}",
    "/resources/{resource_type}/{resource_id:path}",
    "/projects/{project_id:path}",
    "/feeds/all.atom",
    "/feeds/projects/{project_id:feed_key}.atom",
    "/yagi/",
}


def told(tag: str, name: str, event_type: str, at: datetime, payload: object) -> bytes:
    """A notification, all of whose words have the tag in them."""
    return json.dumps(
        {
            "message_id": f"{tag}-message-{name}",
            "event_type": event_type,
            "publisher_id": f"compute.{tag}-publisher",
            "priority": "INFO",
            "timestamp": at.isoformat(),
            "_context_project_id": f"{tag}-project",
            "_context_request_id": f"req-{tag}-{name.partition('.')[0]}",
            "payload": payload,
        }
    ).encode()


def instance(tag: str, **more: object) -> dict[str, object]:
    return {
        "instance_id": f"{tag}-instance",
        "tenant_id": f"{tag}-project",
        "user_id": f"{tag}-user",
        "instance_type": f"{tag}-flavor",
        "display_name": f"{tag}-name",
        "vcpus": 2,
        "memory_mb": 512,
        "root_gb": 1,
        "ephemeral_gb": 0,
        "state": "active",
        "host": f"{tag}-host",
        "node": f"{tag}-node",
        "availability_zone": f"{tag}-zone",
        "image_ref_url": f"http://image/{tag}-image",
        "launched_at": str(DAY),
        **more,
    }


def messages(tag: str) -> Iterator[bytes]:
    """An instance that was made, moved bytes, and was audited; a volume nobody uses; an address; an image."""
    at = DAY
    yield told(tag, "create.start", "compute.instance.create.start", at - HOUR, instance(tag))
    yield told(tag, "create.end", "compute.instance.create.end", at, instance(tag))
    yield told(
        tag,
        "exists",
        "compute.instance.exists",
        at + 25 * HOUR,
        instance(
            tag,
            audit_period_beginning=str(at),
            audit_period_ending=str(at + 24 * HOUR),
            bandwidth={f"{tag}-network": {"bw_in": 1000, "bw_out": 7}},
        ),
    )
    volume = {
        "volume_id": f"{tag}-volume",
        "tenant_id": f"{tag}-project",
        "user_id": f"{tag}-user",
        "size": 10,
        "volume_type": f"{tag}-type",
        "status": "available",
        "created_at": str(at),
    }
    yield told(tag, "volume", "volume.create.end", at, volume)
    address = {
        "id": f"{tag}-address",
        "project_id": f"{tag}-project",
        "floating_ip_address": f"{tag}-192.0.2.1",
        "port_id": None,
        "created_at": str(at),
    }
    yield told(tag, "address", "floatingip.create.end", at, {"floatingip": address})
    image = {"id": f"{tag}-image", "owner": f"{tag}-project", "name": f"{tag}-name", "size": 5}
    yield told(tag, "image", "image.activate", at, {**image, "status": "active"})
    # a page of images of both projects, in one message
    mixed = [image, {**image, "id": f"{OTHER}-image", "owner": f"{OTHER}-project"}]
    period = {
        "audit_period_beginning": str(at),
        "audit_period_ending": str(at + 24 * HOUR),
        "owner": f"{tag}-project",
    }
    if tag == OTHER:
        yield told(tag, "images", "image.exists", at + 25 * HOUR, {**period, "images": mixed})


MESSAGES = [*messages(OWN), *messages(OTHER)]


def paths() -> list[str]:
    """The path of every route that answers a GET."""
    loaded = settings.load(
        Settings, auth_mode="none", database_url="postgresql://x/y", amqp_url="amqp://x/"
    )
    found: list[str] = []

    def walk(routes: list[Any]) -> None:
        for route in routes:
            if hasattr(route, "original_router"):
                walk(route.original_router.routes)
            elif "GET" in (getattr(route, "methods", None) or ()):
                found.append(route.path)

    walk(list(app.http_app(loaded).routes))
    return sorted(set(found))


def names(tag: str, path: str, event: str) -> dict[str, str]:
    """What a path's places are filled with."""
    name = {"budgets": f"{tag}-budget", "price-books": f"{tag}-book", "periods": "2026-05"}
    return {
        "event": event,
        "resource_type": "instance",
        "resource_id": f"{tag}-instance",
        "project_id": f"{tag}-project",
        "user_id": f"{tag}-user",
        "file_format": "csv",
        "event_type": "compute.instance.create.end",
        "message_id": f"{tag}-message-create.end",
        "entry_id": "1",
        "name": name.get(path.removeprefix("/v1").split("/")[1], f"{tag}.js"),
    }


def filled(path: str, values: dict[str, str]) -> str:
    parts = []
    for piece in path.split("{"):
        place, closed, rest = piece.partition("}")
        parts.append(quote(values[place.partition(":")[0]]) + rest if closed else piece)
    return "".join(parts)


def asks(tag: str) -> list[dict[str, str]]:
    """What to ask besides the window: of everything, and of all that has the tag in it."""
    groups = "project user resource type region state_class label hour day month flavor host zone"
    return [
        {},
        *({"group_by": one} for one in groups.split()),
        {"group_by": "project,resource_type"},
        {"group_by": "host,project"},
        {"project_id": f"{tag}-project"},
        {"project_id": f"{tag}-project", "group_by": "resource"},
        {"resource_type": "instance", "resource_id": f"{tag}-instance"},
        {"resource_type": "volume", "resource_id": f"{tag}-volume", "region": "RegionOne"},
        {"message_id": f"{tag}-message-exists"},
        {"request_id": f"req-{tag}-create"},
        {"host": f"{tag}-host"},
        {"flavor": f"{tag}-flavor"},
        {"include_unknown": "true"},
        {"price_book": f"{tag}-book"},
        {"compare": f"{tag}-book"},
        {"by": "cost", "price_book": f"{tag}-book"},
        {"kind": f"{tag}_kind"},
        {"group": f"{tag}-group"},
        {"group_by": f"group:{tag}_kind"},
        {"month": "2026-05"},
        {"measure": "instance_hours"},
        {"measure": "bandwidth_out_bytes", "project_id": f"{tag}-project"},
    ]


def without(text: str, words: Iterable[str]) -> str:
    """The text without what was asked for: an answer may name that."""
    for word in sorted(words, key=len, reverse=True):
        text = text.replace(word, "").replace(quote(word, safe=""), "")
    return text


WINDOW = {"start": DAY.isoformat(), "end": (DAY + 48 * HOUR).isoformat()}


def book(tag: str) -> dict[str, Any]:
    """Two prices, the first for that project alone; of the other's, the names too are none of anybody's business."""
    own = {"name": f"{tag}-price", "measure": "instance_hours", "price": 1}
    return {
        "currency": "EUR",
        "public": tag == OWN,
        "prices": [{**own, "match": {"project": f"{tag}-project"}}],
    }


async def filled_in(admin: client.Api) -> None:
    """Both projects have a price book, a budget, and a group."""
    for tag in (OWN, OTHER):
        await admin.put(f"/v1/price-books/{tag}-book", book(tag))
        await admin.put(
            f"/v1/budgets/{tag}-budget",
            {
                "subject": {"projects": [f"{tag}-project"]},
                "limit": {"amount": 100, "measure": "instance_hours"},
                "period": "month",
            },
        )
        await admin.put(
            f"/v1/project-groups/{tag}_kind/{tag}-project",
            {"memberships": [{"group": f"{tag}-group", "valid_from": "2026-05-01T00:00:00Z"}]},
        )
    both = {
        "currency": "EUR",
        "public": True,
        "prices": [price for tag in (OWN, OTHER) for price in book(tag)["prices"]],
    }
    await admin.put("/v1/price-books/default", both)


async def test_every_route_denies_strangers_and_shows_a_bound_caller_its_project_alone(
    run_usage: RunUsage, publish: Publish, stored: Stored, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(
        "\n".join(
            f"{name}:{role}:{projects}:{hashlib.sha256(name.encode()).hexdigest()}"
            for name, role, projects in (
                ("admin", "admin", "*"),
                ("bound", "admin", f"{OWN}-project"),
            )
        )
    )
    async with (
        run_usage(auth_mode="token", auth_tokens_file=tokens) as service,
        client.open_api(service.url, token="admin") as admin,
        aiohttp.ClientSession() as http,
    ):
        whole = RunningService(
            url=service.url, api=admin, settings=service.settings, stop=service.stop
        )
        await publish([*MESSAGES, f"{OTHER} poison".encode()])

        async def folded() -> bool:
            usage = await admin.get("/v1/usage", **WINDOW)
            kept = await admin.get("/v1/quarantine")
            return (
                len(await stored(whole)) == len(MESSAGES)
                and not usage["unfolded_resources"]
                and len(kept["entries"]) == 1
            )

        await testing.eventually(folded)
        await filled_in(admin)
        events = {
            tag: (await stored(whole, message_id=f"{tag}-message-create.end"))[0]["id"]
            for tag in (OWN, OTHER)
        }

        async def answer(path: str, ask: dict[str, str], token: str | None) -> tuple[int, str]:
            headers = {} if token is None else {"Authorization": f"Bearer {token}"}
            params = {**WINDOW, **ask}
            async with http.get(
                service.url + path, params=params, headers=headers, allow_redirects=False
            ) as got:
                return got.status, (await got.read()).decode("utf-8", "replace")

        leaks, open_doors, failures = [], [], []
        telling = set()
        seen_by_bound = set()
        for path in paths():
            if path in OPEN:
                continue
            status, _ = await answer(filled(path, names(OTHER, path, events[OTHER])), {}, None)
            if status not in (302, 303, 307, 401) and path not in SHOWN_TO_ALL:
                open_doors.append((path, status))
            for tag in (OWN, OTHER):
                values = names(tag, path, events[tag])
                for ask in asks(tag):
                    asked = [*values.values(), *ask.values()]
                    target = filled(path, values)
                    status, text = await answer(target, ask, "bound")
                    if status >= 500:
                        failures.append((target, ask, status, text[:300]))
                    if OWN in text:
                        seen_by_bound.add(path)
                    # a page writes the kind of group that it was asked for in words
                    words = [str(one).removeprefix("group:").replace("_", " ") for one in asked]
                    text = without(text, [*asked, *words])
                    if OTHER in text:
                        place = text.index(OTHER)
                        leaks.append((target, ask, text[max(0, place - 80) : place + 80]))
                    if path not in telling:
                        status, text = await answer(target, ask, "admin")
                        if status == 200 and OTHER in text:
                            telling.add(path)
    assert not open_doors
    assert not failures
    assert not leaks
    assert telling >= TELLING
    assert "/v1/usage" in seen_by_bound
