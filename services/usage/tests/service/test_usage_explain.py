"""Every number of usage leads to parts that add up to it exactly, and to the messages behind them."""

import asyncio
import base64
import gzip
import json
import random
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from hostler_common import client, db, errors
from hostler_usage.explaining import explain, explain_api, explain_cli
from hostler_usage.explaining.explain import HeldPart
from hostler_usage.explaining.explain_store import ExplainStore, Explanation, Question
from hostler_usage.history.ledger_testing import Ledger, event, instance, with_bandwidth
from hostler_usage.history.measures import Window
from hostler_usage.history.paging import Scope
from hostler_usage.history.report_store import UsageFilter
from hostler_usage.history.rollup_store import RollupStore
from hostler_usage.money.budget import Membership
from hostler_usage.money.price_store import PriceStore
from hostler_usage.reading.event import Origin
from hostler_usage.reading.mapping_file import packaged
from hostler_usage.reading.normalise import Normaliser
from hostler_usage.testing import (
    LARGE,
    SMALL,
    Message,
    Step,
    VolumeLife,
    VolumeStep,
)

MARCH = datetime(2026, 3, 1, tzinfo=UTC)
DAY, HOUR = timedelta(days=1), timedelta(hours=1)
ORIGIN = Origin("cloud", "nova", "notifications.info", "application/json", "")
NORMALISER = Normaliser(packaged())
MEASURES = {item.name: item for item in packaged().measures}
ZONES = ("UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe")
GROUPS: tuple[list[str], ...] = (
    [],
    ["project"],
    ["resource", "state_class"],
    ["project", "flavor", "day"],
    ["type", "region", "hour"],
    ["volume_type", "month"],
    ["label", "day"],
    ["user", "image", "host"],
    ["group:domain"],
    ["group:domain", "resource", "day"],
)


def world(chance: random.Random) -> list[Message]:
    """Random lives around the nights on which clocks are set."""
    messages: list[Message] = []
    for number in range(6):
        born = MARCH + chance.randrange(28 * 24 * 60) * timedelta(minutes=1)
        born += timedelta(microseconds=chance.randrange(1_000_000))
        steps = [Step(at=born, action="create", flavor=SMALL)]
        for action in chance.sample(("resize", "stop", "rebuild", "delete"), 3):
            moment = steps[-1].at + chance.randrange(1, 90) * HOUR
            steps.append(Step(at=moment, action=action, flavor=LARGE))  # type: ignore[arg-type]
            if action == "delete":
                break
        life = instance(number, *steps, project=f"p{number % 2}")
        until = born + 20 * HOUR if number % 2 else None
        messages += with_bandwidth(life.messages(audits_until=until))
    for number in range(2):
        born = MARCH + chance.randrange(28 * 24) * HOUR
        messages += VolumeLife(
            volume_id=f"00000000-0000-4000-9000-{number:012}",
            project_id=f"p{number}",
            steps=(
                VolumeStep(at=born, action="create", size_gb=10),
                VolumeStep(at=born + 100 * HOUR, action="transfer", project_id="p9"),
            ),
        ).messages()
    return messages


class Explained(Ledger):
    """A ledger that is asked for what its numbers are made of."""

    def __init__(self, pool: db.Pool) -> None:
        super().__init__(pool)
        self.explanations = ExplainStore(pool=pool, mapping=packaged())

    async def explained(self, question: Question, limit: int) -> list[Explanation]:
        """All pages."""
        pages = []
        marker = None
        while True:
            page = await self.explanations.explain(question, limit=limit, marker=marker)
            pages.append(page)
            marker = page.next_marker
            if marker is None:
                return pages


@pytest.fixture
def ledger(pool: db.Pool) -> Explained:
    return Explained(pool)


@pytest.mark.parametrize("seed", range(5))
async def test_the_parts_of_every_usage_row_add_up_to_it(ledger: Explained, seed: int) -> None:
    chance = random.Random(seed)
    await ledger.told([event(message.body()) for message in world(chance)])
    await RollupStore(pool=ledger.pool, mapping=packaged()).advance(MARCH + 20 * DAY)
    moves = sorted(MARCH + chance.randrange(30 * 24 * 60) * timedelta(minutes=1) for _ in range(4))
    await PriceStore(pool=ledger.pool).put_memberships(
        "domain",
        "p1",
        [  # there and back again, with a time in none
            Membership(kind="domain", group=group, project="p1", start=start, end=end)
            for group, start, end in (
                ("a", MARCH - DAY, moves[0]),
                ("b", moves[0], moves[1]),
                ("a", moves[2], moves[3] + HOUR),
            )
        ],
    )
    seen = 0
    for groups in GROUPS:
        start = MARCH + chance.randrange(20 * 24 * 60) * timedelta(minutes=1)
        end = start + chance.randrange(1, 15 * 24) * HOUR
        window = Window(start=start, end=end, as_of=MARCH + 30 * DAY + timedelta(microseconds=3))
        time_zone = chance.choice(ZONES)
        scope: Scope = chance.choice((None, frozenset({"p1", "p9"})))
        rows, _ = await ledger.reports.usage(
            window, groups, UsageFilter(scope=scope), limit=1000, time_zone=time_zone
        )
        numbers = [(row, name, amount) for row in rows for name, amount in row.amounts.items()]
        for row, name, amount in chance.sample(numbers, min(len(numbers), 12)):
            question = Question(
                measure=name,
                window=window,
                groups={group: value or "" for group, value in row.group.items()},
                scope=scope,
                time_zone=time_zone,
            )
            pages = await ledger.explained(question, limit=chance.choice((1, 3, 1000)))
            parts = [part for page in pages for share in page.shares for part in share.parts]
            assert {page.amount for page in pages} == {amount}
            assert sum(part.amount for part in parts) == amount
            assert {page.parts for page in pages} == {len(parts)}
            by_resource = {
                (share.region, share.resource_type, share.resource_id): share.amount
                for page in pages
                for share in page.shares
            }
            assert sum(by_resource.values()) == amount
            assert {page.resources for page in pages} == {len(by_resource)}
            assert all(part.cited for part in parts)
            for page in pages:
                cited = {
                    item["event_id"]
                    for share in page.shares
                    for p in share.parts
                    for item in p.cited
                }
                assert len(cited) == len(page.events) + len(page.not_shown)
            seen += 1
    assert seen > 30


async def test_an_interval_that_a_group_had_twice_is_two_parts_on_pages_of_their_own(
    ledger: Explained,
) -> None:
    life = instance(1, Step(at=MARCH, action="create", flavor=SMALL))
    await ledger.told(life.messages())
    edges = [MARCH + n * HOUR for n in (-1, 2, 5, 9)]
    await PriceStore(pool=ledger.pool).put_memberships(
        "domain",
        "p1",
        [
            Membership(kind="domain", group=group, project="p1", start=start, end=end)
            for group, start, end in zip("aba", edges, edges[1:], strict=False)
        ],
    )
    question = Question(
        measure="instance_hours",
        window=Window(start=MARCH, end=MARCH + DAY, as_of=MARCH + DAY),
        groups={"group:domain": "a"},
    )
    pages = await ledger.explained(question, limit=1)
    parts = [part for page in pages for share in page.shares for part in share.parts]
    assert [
        (part.counted_from, part.counted_until) for part in parts if isinstance(part, HeldPart)
    ] == [(MARCH, edges[1]), (edges[2], edges[3])]
    assert {page.amount for page in pages} == {6 * 3_600_000_000}


async def test_a_row_with_an_unknown_group_is_explained_by_an_empty_value(
    ledger: Explained,
) -> None:
    life = instance(1, Step(at=MARCH, action="create", flavor=SMALL))
    await ledger.told([event(message.body()) for message in life.messages()])
    window = Window(start=MARCH, end=MARCH + DAY, as_of=MARCH + 9 * DAY)
    question = Question(measure="instance_hours", window=window, groups={"volume_type": ""})
    (page,) = await ledger.explained(question, 100)
    assert page.amount == 24 * 3_600_000_000
    question = replace(question, groups={"volume_type": "ssd"})
    (page,) = await ledger.explained(question, 100)
    assert (page.amount, page.parts, page.shares) == (0, 0, [])


async def test_an_interval_shows_what_is_counted_of_it_and_who_opened_and_closed_it(
    ledger: Explained,
) -> None:
    life = instance(
        1,
        Step(at=MARCH + HOUR, action="create", flavor=SMALL),
        Step(at=MARCH + 5 * HOUR, action="resize", flavor=LARGE),
    )
    await ledger.told([event(message.body()) for message in life.messages()])
    window = Window(start=MARCH + 2 * HOUR, end=MARCH + 7 * HOUR, as_of=MARCH + 9 * DAY)
    (page,) = await ledger.explained(
        Question(measure="vcpu_hours", window=window, groups={"project": "p1"}), 100
    )
    (share,) = page.shares
    first, *between, last = share.parts
    assert isinstance(first, HeldPart)
    assert isinstance(last, HeldPart)
    assert first.start == MARCH + HOUR
    assert (first.counted_from, first.counted_until) == (MARCH + 2 * HOUR, first.end)
    assert first.quantity == 1
    assert (last.end, last.counted_until) == (None, MARCH + 7 * HOUR)
    assert last.quantity == 4
    assert sum(part.amount for part in between) + first.amount + last.amount == page.amount
    assert page.amount == (3 * 1 + 2 * 4) * 3_600_000_000
    assert first.closed_by
    shown = {row["message_id"]: row["event_type"] for row in page.events}
    assert {shown[item["message_id"]] for item in first.closed_by} <= {
        "compute.instance.finish_resize.end",
        "instance.resize_finish.end",
        "compute.instance.update",
        "instance.update",
    }


async def test_bodies_beyond_the_budget_are_left_out_and_the_rest_is_there(
    ledger: Explained, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = instance(
        1,
        Step(at=MARCH, action="create", flavor=SMALL),
        Step(at=MARCH + HOUR, action="stop"),
    )
    bodies = [message.body() for message in life.messages()]
    await ledger.told([event(body) for body in bodies])
    window = Window(start=MARCH, end=MARCH + DAY, as_of=MARCH + DAY)
    question = Question(measure="instance_hours", window=window, groups={})
    (page,) = await ledger.explained(question, 100)
    assert set(page.bodies.values()) <= set(bodies)
    assert len(page.bodies) == len(page.events) > 1
    budget = page.events[0]["body_bytes"]
    monkeypatch.setattr(explain, "affordable", lambda sizes: _affordable(sizes, budget))
    (page,) = await ledger.explained(question, 100)
    assert len(page.bodies) == 1


_affordable = explain.affordable


async def test_messages_that_are_dropped_are_named_as_not_shown(ledger: Explained) -> None:
    life = instance(1, Step(at=MARCH, action="create", flavor=SMALL))
    await ledger.told([event(message.body()) for message in life.messages()])
    window = Window(start=MARCH, end=MARCH + DAY, as_of=MARCH + DAY)
    question = Question(measure="instance_hours", window=window, groups={})
    (before,) = await ledger.explained(question, 100)
    async with db.connection(ledger.pool) as connection:
        await connection.execute("TRUNCATE raw_event")
    (after,) = await ledger.explained(question, 100)
    assert after.amount == before.amount
    assert after.events == []
    assert len(after.not_shown) == len(before.events)


# --- HTTP and the command

Clients = dict[str, client.Api]
ServePart = Callable[..., AbstractAsyncContextManager[tuple[str, dict[str, client.Api]]]]
Opened = Callable[[], AbstractAsyncContextManager[tuple[str, Clients]]]
ASKED = {"start": "2026-03-01T00:00:00Z", "end": "2026-03-02T00:00:00Z"}


@pytest.fixture
def opened(ledger: Explained, serve_part: ServePart) -> Opened:
    """The API's address and clients of it, by what their token may see."""
    state = {"explanations": ledger.explanations, "reports": ledger.reports}

    def run() -> AbstractAsyncContextManager[tuple[str, Clients]]:
        return serve_part([explain_api.router], state, all=("reader", "*"), p1=("reader", "p1"))

    return run


async def two_projects(ledger: Explained) -> list[bytes]:
    lives = [
        instance(
            number,
            Step(at=MARCH + HOUR, action="create", flavor=SMALL),
            Step(at=MARCH + 5 * HOUR, action="delete"),
            project=project,
        )
        for number, project in enumerate(("p1", "p2"))
    ]
    bodies = [
        message.body()
        for life in lives
        for message in life.messages(audits_until=MARCH + 3 * HOUR)
    ]
    await ledger.told([event(body) for body in bodies])
    return bodies


async def test_one_call_leads_from_a_number_to_the_raw_bodies(
    ledger: Explained, opened: Opened
) -> None:
    bodies = await two_projects(ledger)
    async with opened() as (_, apis):
        answer = await apis["all"].get(
            "/v1/usage/explain", measure="vcpu_hours", project_id="p1", flavor="m1.small", **ASKED
        )
        assert answer["amount"] == 4 * 3_600_000_000
        assert answer["hours"] == 4.0
        assert answer["group"] == {"project": "p1", "flavor": "m1.small"}
        (share,) = answer["shares"]
        assert sum(part["amount"] for part in share["intervals"]) == share["amount"]
        assert {item["status"] for item in share["audits"]} == {"verified"}
        cited = {
            item["event_id"]
            for part in share["intervals"]
            for item in (*part["opened_by"], *part["closed_by"])
        }
        assert {item["id"] for item in answer["events"]} == cited
        for item in answer["events"]:
            assert item["body"]["encoding"] == "utf-8"
            assert item["body"]["text"].encode() in bodies
            said = json.loads(json.loads(item["body"]["text"])["oslo.message"])
            assert said["message_id"] == item["message_id"]


async def test_a_body_that_is_no_text_is_shown_in_base64(
    ledger: Explained, opened: Opened
) -> None:
    life = instance(1, Step(at=MARCH, action="create", flavor=SMALL))
    packed = [gzip.compress(message.body()) for message in life.messages()]
    await ledger.told([event(body, "gzip") for body in packed])
    async with opened() as (_, apis):
        answer = await apis["all"].get("/v1/usage/explain", measure="instance_hours", **ASKED)
        assert answer["events"]
        for item in answer["events"]:
            assert item["body"]["encoding"] == "base64"
            assert base64.b64decode(item["body"]["text"]) in packed


async def test_a_project_is_explained_its_own_numbers_without_bodies(
    ledger: Explained, opened: Opened
) -> None:
    await two_projects(ledger)
    async with opened() as (_, apis):
        asked: dict[str, Any] = {"measure": "instance_hours", **ASKED}
        every = await apis["all"].get("/v1/usage/explain", **asked)
        own = await apis["p1"].get("/v1/usage/explain", **asked)
        assert (every["amount"], every["resources"]) == (2 * own["amount"], 2)
        assert own["resources"] == 1
        assert own["events"]
        assert all(item["body"] is None for item in own["events"])
        assert {item["project_id"] for item in own["events"]} == {"p1"}
        assert "p2" not in json.dumps(own)
        other = await apis["p1"].get("/v1/usage/explain", project_id="p2", **asked)
        assert (other["amount"], other["shares"], other["events"]) == (0, [], [])


async def test_a_message_of_another_project_is_cited_and_not_shown(
    ledger: Explained, opened: Opened
) -> None:
    """What ended a volume's time with one project is told by a message of the next one's."""
    volume = VolumeLife(
        volume_id="00000000-0000-4000-9000-000000000001",
        project_id="p1",
        steps=(
            VolumeStep(at=MARCH, action="create", size_gb=10),
            VolumeStep(at=MARCH + HOUR, action="transfer", project_id="p2"),
        ),
    )
    await ledger.told([event(message.body()) for message in volume.messages()])
    async with opened() as (_, apis):
        own = await apis["p1"].get("/v1/usage/explain", measure="volume_hours", **ASKED)
        assert own["amount"] == 3_600_000_000
        (part,) = own["shares"][0]["intervals"]
        assert own["not_shown"] == part["closed_by"] != []
        assert {item["project_id"] for item in own["events"]} == {"p1"}
        every = await apis["all"].get("/v1/usage/explain", measure="volume_hours", **ASKED)
        assert every["not_shown"] == []


async def test_what_cannot_be_asked_is_refused_with_a_code(
    ledger: Explained, opened: Opened
) -> None:
    del ledger
    async with opened() as (_, apis):
        for changes, code in (
            ({"measure": "luck"}, "usage.measure.unknown"),
            ({"color": "red"}, "usage.group_by.unknown"),
            ({"day": "2026-03-01T01:00:00"}, "usage.bucket.invalid"),
            ({"day": "yesterday"}, "usage.bucket.invalid"),
            ({"hour": "2026-03-01T01:00:00Z"}, "usage.bucket.invalid"),
            ({"day": "9999-12-31T00:00:00"}, "usage.bucket.invalid"),
            ({"day": "2026-03-01T00:00:00", "time_zone": "Moon"}, "usage.group_by.unknown"),
            (
                {"day": "2026-03-01T00:00:00", "hour": "2026-03-01T01:00:00"},
                "usage.group_by.unknown",
            ),
            ({"project_id": "p1", "project": "p2"}, "usage.group.invalid"),
            ({"flavor": "x" * 300}, "usage.group.invalid"),
            ({"flavor": "x\0"}, "usage.group.invalid"),
            ({"marker": "%%"}, "usage.marker.invalid"),
            ({"marker": "WyJhIiwiYiIsImMiLCJkIl0"}, "usage.marker.invalid"),
            ({"end": ASKED["start"]}, "usage.window.invalid"),
        ):
            params: dict[str, Any] = {"measure": "instance_hours", **ASKED, **changes}
            with pytest.raises(errors.Invalid) as refused:
                await apis["all"].get("/v1/usage/explain", **params)
            assert refused.value.code == code, changes


async def test_the_command_prints_all_pages_of_an_explanation(
    ledger: Explained, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    await two_projects(ledger)
    monkeypatch.setattr(explain_cli, "_PAGE", 1)
    commands = typer.Typer()
    commands.callback()(lambda: None)
    explain_cli.register(commands)
    async with opened() as (address, apis):
        monkeypatch.setenv("HOSTLER_URL", address)
        token = apis["all"]._http.headers["authorization"].removeprefix("Bearer ")
        monkeypatch.setenv("HOSTLER_TOKEN", token)
        window = ["--start", "2026-03-01", "--end", "2026-03-02"]

        async def run(*arguments: str) -> tuple[int, str]:
            result = await asyncio.to_thread(
                CliRunner().invoke, commands, ["explain", *window, *arguments]
            )
            return result.exit_code, result.output

        code, said = await run("instance_hours", "flavor=m1.small", "--json")
        assert code == 0, said
        answer = json.loads(said[said.index("{\n") :])  # the server logs to stdout, too
        assert len(answer["shares"]) == 2
        parts = [part for share in answer["shares"] for part in share["intervals"]]
        assert sum(part["amount"] for part in parts) == answer["amount"] == 8 * 3_600_000_000
        assert answer["events"][0]["body"]["text"]
        code, said = await run("instance_hours", "project=p1")
        assert code == 0
        assert "1 resources" in said
        assert answer["shares"][0]["intervals"][0]["opened_by"][0]["message_id"] in said
        assert (await run("instance_hours", "nothing"))[0] == 2
