"""Quarantine on a real PostgreSQL, its HTTP API, and replaying through a real RabbitMQ."""

import asyncio
import base64
import math
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
from prometheus_client import CollectorRegistry

from hostler_common import auth, bus, db, http, outbox, quarantine, settings
from hostler_common.testing import eventually, open_bus


class Example(settings.Settings):
    service: ClassVar[str] = "example"


def delivery(body: bytes = b"bad", **more: Any) -> bus.Delivery:
    options = {
        "queue": "work",
        "exchange": "hostler",
        "routing_key": "example.thing.made",
        "headers": {"schema": "1.0"},
        "message_id": "m1",
        "type": "example.thing.made",
        "app_id": "somebody",
        "content_type": "application/json",
        "timestamp": datetime(2026, 1, 2, tzinfo=UTC),
        **more,
    }
    return bus.Delivery(body=body, **options)


@pytest.fixture
def kept(pool: db.Pool) -> quarantine.Quarantine:
    return quarantine.Quarantine(pool=pool)


async def put(kept: quarantine.Quarantine, one: bus.Delivery, reason: str = "why") -> int:
    """The row's id."""
    await kept.put(one, code="example.malformed", reason=reason)
    return int((await kept.rows())[-1]["id"])


Opened = Callable[[], AbstractAsyncContextManager[dict[str, httpx.AsyncClient]]]


@pytest.fixture
def opened(serving: Any, tmp_path: Path, kept: quarantine.Quarantine) -> Opened:
    """The HTTP API, as a client of each role."""

    @asynccontextmanager
    async def run() -> AsyncIterator[dict[str, httpx.AsyncClient]]:
        tokens = {str(role): auth.new_token(name=f"my-{role}", role=role) for role in auth.Role}
        tokens["one project's admin"] = auth.new_token(
            name="limited", role=auth.Role.ADMIN, projects="p1"
        )
        (tmp_path / "tokens").write_text("\n".join(line for _, line in tokens.values()))
        loaded = settings.load(
            Example,
            amqp_url="amqp://nowhere/",
            database_url="postgresql://nowhere/x",
            auth_tokens_file=tmp_path / "tokens",
        )
        app = http.create_app(
            loaded,
            title="example",
            package="hostler_example",
            routers=[quarantine.router],
            state={"quarantine": kept},
        )
        async with serving(app, loaded) as client:
            clients = {
                role: httpx.AsyncClient(
                    base_url=client.base_url,
                    headers={"Authorization": f"Bearer {token}"},
                    trust_env=False,
                )
                for role, (token, _) in tokens.items()
            }
            yield clients
            for each in clients.values():
                await each.aclose()

    return run


BODIES = {
    "empty": b"",
    "NUL": b"a\x00b\x00",
    "every byte": bytes(range(256)),
    "not UTF-8": "ü".encode("latin-1"),
    "long": b"x" * (quarantine.MAX_BODY_SHOWN_BYTES + 1),
}


async def test_a_body_is_kept_and_given_back_byte_for_byte(
    kept: quarantine.Quarantine, opened: Opened
) -> None:
    ids = {name: await put(kept, delivery(body)) for name, body in BODIES.items()}
    async with opened() as clients:
        for name, body in BODIES.items():
            path = f"/v1/quarantine/{ids[name]}"
            assert (await clients["operator"].get(f"{path}/body")).content == body
            shown = (await clients["operator"].get(path)).json()
            start = body[: quarantine.MAX_BODY_SHOWN_BYTES]
            assert base64.b64decode(shown["body_base64"]) == start
            assert shown["body_bytes"] == len(body)
            assert shown["body_is_whole"] == (name != "long")
            is_text = name in ("empty", "long")
            assert shown["body_text"] == (start.decode() if is_text else None)


async def test_a_message_is_listed_with_its_reason_and_attempts_and_without_its_body(
    kept: quarantine.Quarantine, opened: Opened
) -> None:
    await put(kept, delivery(b"the body", attempt=4), reason="not what it says")
    async with opened() as clients:
        answer = (await clients["operator"].get("/v1/quarantine")).json()
    (entry,) = answer["entries"]
    assert entry["queue"] == "work"
    assert entry["routing_key"] == "example.thing.made"
    assert (entry["code"], entry["reason"]) == ("example.malformed", "not what it says")
    assert (entry["attempts"], entry["seen"], entry["message_id"]) == (4, 1, "m1")
    assert "the body" not in str(answer)


async def test_the_same_bad_message_twice_is_one_row_seen_twice(
    kept: quarantine.Quarantine,
) -> None:
    await put(kept, delivery(), reason="first")
    await put(kept, delivery(message_id="another id"), reason="second")
    await put(kept, delivery(queue="another queue"))
    await put(kept, delivery(b"another body"))
    rows = await kept.rows()
    assert [row["seen"] for row in rows] == [2, 1, 1]
    assert rows[0]["reason"] == "second"
    assert await kept.count() == 3


@pytest.mark.parametrize(
    "odd",
    [
        {"message_id": "a\0b", "type": "\0", "app_id": "\0", "content_encoding": "\0"},
        {"routing_key": "a\0b", "exchange": "c\0d"},
        {"headers": {"a\0b": "c\0d", "n": [math.nan, math.inf, -math.inf]}},
        {"headers": {"bytes": b"\x00\xff", "time": datetime(2026, 1, 1, tzinfo=UTC)}},
        {"headers": {"surrogate": "\ud800", "deep": {"a": {"b": ["\0"]}}}},
        {"headers": {"big": 2**63, "small": 1e-320, "flag": True, "none": None}},
        {"message_id": "\ud800", "content_type": "x" * 255},
    ],
)
async def test_no_property_of_a_message_keeps_it_out(
    kept: quarantine.Quarantine, odd: dict[str, Any]
) -> None:
    await put(kept, delivery(**odd), reason="because of \0 and \ud800")
    assert await kept.count() == 1


async def test_a_list_is_paged_oldest_first(kept: quarantine.Quarantine, opened: Opened) -> None:
    ids = [await put(kept, delivery(b"%d" % n)) for n in range(5)]
    seen = []
    marker: str | None = "0"
    async with opened() as clients:
        while marker is not None:
            page = await clients["operator"].get(
                "/v1/quarantine", params={"limit": 2, "marker": marker}
            )
            seen += [entry["id"] for entry in page.json()["entries"]]
            marker = page.json()["next_marker"]
    assert seen == ids


async def test_reading_and_replaying_need_an_operator_and_discarding_an_admin(
    kept: quarantine.Quarantine, opened: Opened
) -> None:
    entry = await put(kept, delivery())
    path = f"/v1/quarantine/{entry}"
    async with opened() as clients:
        for role in ("reader", "agent", "one project's admin"):
            for method, where in (
                ("GET", "/v1/quarantine"),
                ("GET", path),
                ("GET", f"{path}/body"),
                ("POST", f"{path}/replay"),
                ("GET", "/quarantine"),
            ):
                assert (await clients[role].request(method, where)).status_code == 403
        assert (await clients["operator"].get(path)).status_code == 200
        assert (await clients["operator"].delete(path)).status_code == 403
        assert (await clients["admin"].delete(path)).status_code == 204
        gone = await clients["admin"].delete(path)
        replayed = await clients["admin"].post(f"{path}/replay")
    assert gone.status_code == replayed.status_code == 404
    assert gone.json()["code"] == "quarantine.not_found"
    assert await kept.count() == 0


async def test_the_page_shows_a_bad_message_without_running_it(
    kept: quarantine.Quarantine, opened: Opened
) -> None:
    await put(kept, delivery(routing_key="<script>"), reason="<img src=x onerror=alert(1)>")
    async with opened() as clients:
        page = (await clients["operator"].get("/quarantine")).text
    assert "1 message<" in page
    assert "<script>" not in page
    assert "<img src=x" not in page
    assert "&lt;img src=x" in page


async def test_a_replayed_message_goes_to_its_queue_alone_as_a_first_attempt(
    kept: quarantine.Quarantine, pool: db.Pool, amqp_url: str
) -> None:
    mended = asyncio.Event()
    handled: list[bus.Delivery] = []
    other: list[bus.Delivery] = []

    async def work(one: bus.Delivery) -> None:
        if not mended.is_set():
            raise bus.Reject("not what it says", code="example.malformed")
        handled.append(one)

    async def count(one: bus.Delivery) -> None:
        other.append(one)

    def subscription(name: str, handler: bus.Handler) -> bus.Subscription:
        queue = bus.Queue(
            name=name, bindings=(bus.Binding(exchange=bus.HOSTLER, routing_key="example.#"),)
        )
        return bus.Subscription(queue=queue, handler=handler, quarantine=kept)

    async def is_kept() -> bool:
        return await kept.count() == 1 and len(other) == 1

    async def is_handled() -> bool:
        return len(handled) == 1

    sent = bus.Message(
        exchange="hostler",
        routing_key="example.thing.made",
        body=b"\x00\xffbad",
        message_id="m1",
        type="example.thing.made",
        app_id="somebody",
        content_encoding="gzip",
        headers={"schema": "1.0", "n": 7},
        timestamp=datetime(2026, 1, 2, tzinfo=UTC),
    )
    async with open_bus(
        amqp_url, subscription("work", work), subscription("other", count)
    ) as opened:
        await opened.publish(sent)
        await eventually(is_kept)
        mended.set()
        await kept.replay(int((await kept.rows())[0]["id"]))
        assert await kept.count() == 0
        await outbox.Relay(pool, opened, CollectorRegistry()).flush()
        await eventually(is_handled)
    assert len(other) == 1
    got = handled[0]
    assert (got.exchange, got.routing_key, got.attempt) == ("hostler", sent.routing_key, 1)
    assert (got.body, got.headers) == (sent.body, sent.headers)
    for name in ("message_id", "type", "app_id", "content_type", "content_encoding", "timestamp"):
        assert getattr(got, name) == getattr(sent, name)


async def test_a_replay_to_a_queue_that_is_gone_waits_in_the_outbox(
    kept: quarantine.Quarantine, pool: db.Pool, amqp_url: str
) -> None:
    await kept.replay(await put(kept, delivery(queue="gone")))
    async with open_bus(amqp_url) as opened:
        await outbox.Relay(pool, opened, CollectorRegistry()).flush()
    async with db.connection(pool) as connection:
        assert await connection.fetchval("SELECT body FROM outbox") == b"bad"


async def test_of_two_replays_at_once_one_finds_the_row(
    kept: quarantine.Quarantine, pool: db.Pool
) -> None:
    entry = await put(kept, delivery())
    outcomes = await asyncio.gather(
        *(kept.replay(entry) for _ in range(4)), return_exceptions=True
    )
    assert sum(outcome is None for outcome in outcomes) == 1
    async with db.connection(pool) as connection:
        assert await connection.fetchval("SELECT count(*) FROM outbox") == 1
