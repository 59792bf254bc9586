"""Price books, costs, budgets and groups of projects over a real ledger, through the API."""

import asyncio
import json
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any

import aio_pika
import asyncpg
import pytest
from typer.testing import CliRunner

from hostler_common import client, db, errors, testing
from hostler_common.testing import RunningService
from hostler_usage.__main__ import main
from hostler_usage.history.ledger_testing import brief_instance, brief_volume
from hostler_usage.money.budget import Subject
from hostler_usage.money.budget_messages import crossing_message
from hostler_usage.money.price_store import Crossing, PriceStore
from hostler_usage.testing import LARGE, InstanceLife, Step

DAY = datetime(2026, 5, 8, tzinfo=UTC)
HOUR = timedelta(hours=1)
WINDOW = {"start": "2026-05-08T00:00:00Z", "end": "2026-05-09T00:00:00Z"}
RunUsage = Callable[..., AbstractAsyncContextManager[RunningService]]
Publish = Callable[..., Awaitable[None]]
Settled = Callable[[RunningService, int], Awaitable[dict[str, Any]]]
RunPriced = Callable[..., AbstractAsyncContextManager[RunningService]]


LIVES = (
    brief_instance(1, "p1", DAY),
    brief_instance(2, "p1", DAY + 24 * HOUR),
    brief_instance(3, "p2", DAY),
    brief_volume("p2", DAY),
)
MESSAGES = [m for life in LIVES for m in life.messages()]
FREE = ["vcpu_hours", "ram_mb_hours", "local_gb_hours", "fixed_ip_hours", "volume_hours"]
BOOK: dict[str, Any] = {
    "currency": "EUR",
    "public": True,
    "free": FREE,
    "prices": [
        {
            "name": "large",
            "measure": "instance_hours",
            "match": {"flavor": "m1.large"},
            "price": "0.08",
            "state_class_factors": {"stopped": "0.5"},
        },
        {"name": "other", "measure": "instance_hours", "price": "0.02"},
        {"name": "disk", "measure": "volume_gb_hours", "price": "0.0005"},
    ],
}
TIERED: dict[str, Any] = {
    "currency": "EUR",
    "free": [*FREE, "volume_gb_hours"],
    "prices": [
        {
            "name": "hours",
            "measure": "instance_hours",
            "tiers": {"steps": [{"up_to": 5, "price": 1}, {"price": "0.1"}]},
        }
    ],
}
ALWAYS = {"from": "2026-05-01", "until": "2099-01-01"}


@pytest.fixture
def run_priced(run_told: RunUsage) -> RunPriced:
    """The service with all lives folded, and a book to price them by."""

    @asynccontextmanager
    async def run(**overrides: Any) -> AsyncIterator[RunningService]:
        is_guarded = overrides.get("auth_mode") == "token"
        async with (
            run_told(MESSAGES, budget_seconds=0.2, **overrides) as service,
            client.open_api(service.url, token="admin" if is_guarded else None) as admin,
        ):
            await admin.put("/v1/price-books/default", BOOK)
            yield service

    return run


async def costs(api: client.Api, **params: Any) -> dict[str, str]:
    """What each group costs; groups as their values with slashes between."""
    answer = await api.get("/v1/costs", **{**WINDOW, **params})
    return {
        "/".join(name or "-" for name in row["group"].values()): row["cost"]
        for row in answer["costs"]
    }


# --- price books


async def test_every_change_of_a_book_is_a_new_version_and_none_is_lost(
    run_usage: RunUsage,
) -> None:
    async with run_usage() as service:
        api = service.api
        first = await api.put("/v1/price-books/default", BOOK)
        assert (first["version"], first["document"]) == (1, BOOK)
        assert await api.put("/v1/price-books/default", BOOK) == first  # says what it said
        second = await api.put("/v1/price-books/default?replaces=1", {**BOOK, "currency": "USD"})
        assert second["version"] == 2
        with pytest.raises(errors.Conflict) as caught:
            await api.put("/v1/price-books/default?replaces=1", BOOK)
        assert caught.value.code == "usage.price_book.changed"
        assert await api.get("/v1/price-books/default") == second
        assert await api.get("/v1/price-books/default", version=1) == first
        assert (await api.get("/v1/price-books"))["price_books"] == [second]
        page = await api.get("/v1/price-books/default/versions", limit=1)
        assert (page["price_books"], page["next_marker"]) == ([second], "2")
        page = await api.get("/v1/price-books/default/versions", limit=1, marker=2)
        assert page["price_books"] == [first]
        with pytest.raises(errors.NotFound):
            await api.get("/v1/price-books/default", version=3)


async def test_writers_of_one_book_at_the_same_time_each_make_a_version(
    run_usage: RunUsage,
) -> None:
    async with run_usage() as service:
        made = await asyncio.gather(
            *(
                service.api.put("/v1/price-books/default", {**BOOK, "currency": f"X{c}X"})
                for c in "ABCDEFGH"
            )
        )
        assert sorted(one["version"] for one in made) == [1, 2, 3, 4, 5, 6, 7, 8]


def put_text(url: str, text: str, media_type: str) -> dict[str, Any]:
    request = urllib.request.Request(
        url, text.encode(), {"Content-Type": media_type}, method="PUT"
    )
    with urllib.request.urlopen(request) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


async def test_prices_stay_exact_from_yaml_and_json(run_usage: RunUsage) -> None:
    yaml = """
        currency: NOK
        prices:
          - {name: a, measure: instance_hours, price: 0.100000000000001,
             match: {region: NO, zone: "010"}, from: 2026-01-01}
    """
    number = """{"currency": "NOK", "prices": [{"name": "a", "measure": "instance_hours",
        "price": 0.100000000000001, "from": "2026-01-01",
        "match": {"region": "NO", "zone": "010"}}]}"""
    async with run_usage() as service:
        url = f"{service.url}/v1/price-books/exact"
        first = await asyncio.to_thread(put_text, url, yaml, "application/yaml")
        assert first["document"]["prices"][0]["price"] == "0.100000000000001"
        assert first["document"]["prices"][0]["match"] == {"region": "NO", "zone": "010"}
        again = await asyncio.to_thread(put_text, url, number, "application/json; charset=utf-8")
        assert again == first


async def test_a_bad_book_is_refused_whole_with_the_path_of_every_fault(
    run_usage: RunUsage,
) -> None:
    bad = {
        "currency": "EUR",
        "prices": [
            {"name": "a", "measure": "llama_hours", "price": "much"},
            {"name": "b", "measure": "instance_hours", "price": 1, "match": {"flavour": "x"}},
        ],
    }
    async with run_usage() as service:
        with pytest.raises(errors.Invalid) as caught:
            await service.api.put("/v1/price-books/default", bad)
        assert caught.value.code == "usage.price_book.invalid"
        found = caught.value.fields["errors"]
        assert isinstance(found, list)
        assert [fault["path"] for fault in found] == [
            "prices[0].price",
            "prices[0].measure",
            "prices[1].match.flavour",
        ]
        assert (await service.api.get("/v1/price-books"))["price_books"] == []


# --- costs


async def test_costs_are_those_of_the_usage(run_priced: RunPriced) -> None:
    async with run_priced() as service:
        api = service.api
        # 2 h small, 1 h large, 2 h large and stopped; and 10 GB for an hour
        assert await costs(api, group_by="project") == {"p1": "0.20", "p2": "0.20"}
        answer = await api.get("/v1/costs", **WINDOW, group_by="project")
        row = answer["costs"][1]
        assert row["cost_exact"] == "41/200"
        assert row["charges"] == [
            {
                "price": "disk",
                "measure": "volume_gb_hours",
                "quantity": "10.000000",
                "cost": "0.00",
            },
            {
                "price": "large",
                "measure": "instance_hours",
                "quantity": "2.000000",
                "cost": "0.16",
            },
            {
                "price": "other",
                "measure": "instance_hours",
                "quantity": "2.000000",
                "cost": "0.04",
            },
        ]
        # rounded once: the rows' cents do not add up to the total's
        assert answer["total"]["cost"] == "0.40"
        assert answer["total"]["cost_exact"] == "81/200"
        assert answer["price_book"] == {"name": "default", "version": 1, "currency": "EUR"}
        assert answer["unfolded_resources"] == 0
        assert await costs(api, group_by="type,flavor") == {
            "instance/m1.large": "0.32",
            "instance/m1.small": "0.08",
            "volume/-": "0.00",
        }
        two_days = {"end": "2026-05-10T00:00:00Z"}
        assert await costs(api, group_by="day", project_id="p1", **two_days) == {
            "2026-05-08": "0.20",
            "2026-05-09": "0.20",
        }
        assert await costs(api, group_by="day", time_zone="Asia/Tokyo", project_id="p1") == {
            "2026-05-08": "0.20"
        }
        assert await costs(api, resource_type="volume", group_by="type") == {"volume": "0.00"}
        assert await costs(api) == {"": "0.40"}


async def test_pages_of_costs_hold_each_row_once(run_priced: RunPriced) -> None:
    async with run_priced() as service:
        seen, marker = [], None
        while True:
            page = await service.api.get(
                "/v1/costs", **WINDOW, group_by="resource,flavor", limit=2, marker=marker
            )
            seen += [tuple(row["group"].values()) for row in page["costs"]]
            assert page["total"]["cost_exact"] == "81/200"
            marker = page["next_marker"]
            if marker is None:
                break
        assert len(seen) == len(set(seen)) == 5


async def test_what_has_no_price_is_listed_and_never_zero_in_silence(
    run_priced: RunPriced,
) -> None:
    partial = {
        **BOOK,
        "free": [],
        "prices": [{**BOOK["prices"][0], "until": "2026-05-08T03:30:00Z"}],
    }
    async with run_priced() as service:
        await service.api.put("/v1/price-books/partial", partial)
        answer = await service.api.get(
            "/v1/costs", **WINDOW, group_by="project", price_book="partial"
        )
        p1, p2 = answer["costs"]
        assert p1["cost"] == "0.04"
        unpriced = {one["measure"]: one for one in p1["unpriced"]}
        assert unpriced["instance_hours"] == {
            "measure": "instance_hours",
            "amount": 16_200_000_000,
            "hours": 4.5,
        }
        assert unpriced["vcpu_hours"]["hours"] == 14.0
        assert "volume_gb_hours" in {one["measure"] for one in p2["unpriced"]}
        total = {one["measure"]: one["amount"] for one in answer["total"]["unpriced"]}
        assert total["instance_hours"] == 2 * 16_200_000_000


async def test_two_books_stand_beside_each_other(run_priced: RunPriced) -> None:
    dearer = {**BOOK, "prices": [{**price, "price": "1"} for price in BOOK["prices"]]}
    async with run_priced() as service:
        api = service.api
        await api.put("/v1/price-books/default", dearer)
        answer = await api.get(
            "/v1/costs",
            **WINDOW,
            group_by="project",
            price_book="default@1",
            compare="default",
        )
        assert (answer["price_book"]["version"], answer["compared_book"]["version"]) == (1, 2)
        assert [
            (row["cost"], row["compared"]["cost"], row["difference"]) for row in answer["costs"]
        ] == [("0.20", "4.00", "3.80"), ("0.20", "14.00", "13.80")]  # 13.795
        same = await api.get("/v1/costs", **WINDOW, group_by="resource,flavor", compare="default")
        assert {row["difference"] for row in same["costs"]} == {"0.00"}
        await api.put("/v1/price-books/other", {**BOOK, "currency": "USD"})
        with pytest.raises(errors.Invalid) as caught:
            await api.get("/v1/costs", **WINDOW, compare="other")
        assert caught.value.code == "usage.costs.currencies_differ"


async def test_tiers_know_the_month_before_the_window_and_all_of_the_project(
    run_priced: RunPriced,
) -> None:
    async with run_priced() as service:
        api = service.api
        await api.put("/v1/price-books/tiered", TIERED)
        tiered = {"price_book": "tiered", "project_id": "p1"}
        month = {"start": "2026-05-01T00:00:00Z", "end": "2026-06-01T00:00:00Z"}
        assert await costs(api, **tiered, **month, group_by="day") == {
            "2026-05-08": "5.00",
            "2026-05-09": "0.50",
        }
        later = {"start": "2026-05-09T00:00:00Z", "end": "2026-05-10T00:00:00Z"}
        assert await costs(api, **tiered, **later) == {"": "0.50"}
        # what is left out of an answer still moves the tiers
        assert await costs(api, **tiered, **later, resource_id=LIVES[1].instance_id) == {
            "": "0.50"
        }
        parts = Fraction(0)
        for start, end in (
            ("01", "08T02:34:56.789012"),
            ("08T02:34:56.789012", "09"),
            ("09", "31"),
        ):
            answer = await api.get(
                "/v1/costs",
                start=f"2026-05-{start}{'' if 'T' in start else 'T00:00:00'}Z",
                end=f"2026-05-{end}{'' if 'T' in end else 'T00:00:00'}Z",
                **tiered,
            )
            parts += Fraction(answer["total"]["cost_exact"])
        assert parts == Fraction("5.5")


async def test_a_price_that_changes_within_the_window_is_charged_on_both_sides(
    run_priced: RunPriced,
) -> None:
    changing = {
        "currency": "EUR",
        "free": [*FREE, "volume_gb_hours"],
        "prices": [
            {
                "name": "h",
                "measure": "instance_hours",
                "price": 1,
                "until": "2026-05-08T02:30:00Z",
            },
            {
                "name": "h",
                "measure": "instance_hours",
                "price": 10,
                "from": "2026-05-08T02:30:00Z",
            },
        ],
    }
    async with run_priced() as service:
        await service.api.put("/v1/price-books/changing", changing)
        found = await costs(service.api, price_book="changing", project_id="p1")
        assert found == {"": "36.50"}


async def test_costs_follow_a_project_from_group_to_group(run_priced: RunPriced) -> None:
    async with run_priced() as service:
        api = service.api
        memberships = [
            {"group": "research", "valid_until": "2026-05-08T04:00:00Z"},
            {"group": "sales", "valid_from": "2026-05-08T05:00:00Z"},
        ]
        await api.put("/v1/project-groups/cost_center/p1", {"memberships": memberships})
        found = await costs(api, group_by="group:cost_center", project_id="p1")
        assert found == {"research": "0.12", "-": "0.04", "sales": "0.04"}
        listed = await api.get("/v1/project-groups", kind="cost_center")
        assert [(one["group"], one["valid_until"]) for one in listed["project_groups"]] == [
            ("research", "2026-05-08T04:00:00Z"),
            ("sales", None),
        ]


async def test_tiers_stand_where_they_stood_when_a_project_changed_its_group(
    run_priced: RunPriced,
) -> None:
    """Five hours at 1 in the first group, five at 0.1 in the second: not the mean in both."""
    moved = "2026-05-08T23:00:00Z"
    async with run_priced() as service:
        api = service.api
        await api.put("/v1/price-books/tiered", TIERED)
        memberships = [
            {"group": "research", "valid_until": moved},
            {"group": "sales", "valid_from": moved},
        ]
        await api.put("/v1/project-groups/cost_center/p1", {"memberships": memberships})
        found = await costs(
            api,
            end="2026-05-10T00:00:00Z",
            group_by="group:cost_center",
            project_id="p1",
            price_book="tiered",
        )
        assert found == {"research": "5.00", "sales": "0.50"}


BAD_QUESTIONS = {
    "group_by=colour": "usage.group_by.unknown",
    "group_by=group:": "usage.group_by.unknown",
    "group_by=group:no\0": "usage.group_by.unknown",
    "group_by=hour": "usage.group_by.unknown",
    "group_by=day&time_zone=Europe": "usage.group_by.unknown",
    "price_book=nobody": "usage.price_book.not_found",
    "price_book=default@9": "usage.price_book.not_found",
    "price_book=../x": "request.invalid",
    "price_book=default@0": "request.invalid",
    "start=2026-05-09T00:00:00Z": "usage.costs.window_invalid",
    "start=1999-05-09T00:00:00Z": "usage.costs.window_invalid",
    "start=0001-01-01T00:00:00%2B01:00": "usage.costs.window_invalid",
    "start=2000-05-09T00:00:00Z&group_by=day": "usage.costs.window_invalid",
    "group_by=project&marker=!!": "usage.marker.invalid",
    "marker=W10": "usage.marker.invalid",
    "group_by=project&marker=WzFd": "usage.marker.invalid",
}


async def test_a_bad_question_is_a_problem_with_a_stable_code(run_usage: RunUsage) -> None:
    answers = {}
    async with run_usage() as service:
        await service.api.put("/v1/price-books/default", BOOK)
        for query in BAD_QUESTIONS:
            given = dict(part.split("=", 1) for part in query.replace("%2B", "+").split("&"))
            with pytest.raises(errors.HostlerError) as caught:
                await service.api.get("/v1/costs", **{**WINDOW, **given})
            answers[query] = caught.value.code
    assert answers == BAD_QUESTIONS


# --- budgets


def budget(amount: object, **change: Any) -> dict[str, Any]:
    return {
        "subject": {"projects": ["p1"]},
        "limit": {"amount": amount, "measure": "instance_hours"},
        "period": ALWAYS,
        **change,
    }


async def test_a_budget_says_how_far_it_is_used_up(run_priced: RunPriced) -> None:
    group = {"group": {"kind": "cost_center", "name": "research"}}
    async with run_priced() as service:
        api = service.api
        await api.put(
            "/v1/project-groups/cost_center/p2",
            {"memberships": [{"group": "research", "valid_from": "2026-05-08T03:30:00Z"}]},
        )
        await api.put("/v1/budgets/hours", budget(16))
        money = {"amount": "1.00", "price_book": "default"}
        await api.put("/v1/budgets/money", budget(0, limit=money))
        await api.put("/v1/budgets/research", budget("2.5", subject=group))
        user = (await api.get("/v1/usage", **WINDOW, group_by="user"))["usage"][0]["group"]["user"]
        await api.put("/v1/budgets/user", budget(5, subject={"user": user}))
        listed = (await api.get("/v1/budgets"))["budgets"]
        states = {
            row["name"]: (
                row["state"]["unit"],
                row["state"]["consumed"],
                row["state"]["left"],
                row["state"]["consumed_percent"],
                row["state"]["forecast"],
            )
            for row in listed
        }
        assert states == {
            "hours": ("instance_hours", "10.000000", "6.000000", "62.50", "10.000000"),
            "money": ("EUR", "0.40", "0.60", "40.00", "0.40"),
            "research": ("instance_hours", "2.500000", "0.000000", "100.00", "2.500000"),
            "user": ("instance_hours", "15.000000", "-10.000000", "300.00", "15.000000"),
        }
        await api.delete("/v1/budgets/user")
        with pytest.raises(errors.NotFound):
            await api.get("/v1/budgets/user")


async def test_the_month_at_hand_counts_and_its_use_is_forecast(
    run_usage: RunUsage, publish: Publish, settled: Settled
) -> None:
    now = datetime.now(UTC).replace(microsecond=0)
    life = InstanceLife(
        instance_id=LIVES[0].instance_id,
        project_id="p1",
        steps=(Step(at=now - 40 * 24 * HOUR, action="create", flavor=LARGE),),
    )
    async with run_usage() as service:
        await publish([message.body() for message in life.messages()])
        await settled(service, len(life.messages()))
        row = await service.api.put("/v1/budgets/month", budget(10_000, period="month"))
        state = row["state"]
        begin, end, as_of = (
            datetime.fromisoformat(state[name]) for name in ("period_start", "period_end", "as_of")
        )
        assert begin <= as_of < end
        assert abs(float(state["consumed"]) - (as_of - begin) / HOUR) < 0.001
        assert abs(float(state["forecast"]) - (end - begin) / HOUR) < 0.001


@asynccontextmanager
async def events_of(url: str, key: str) -> AsyncIterator[aio_pika.abc.AbstractQueue]:
    async with await aio_pika.connect(url) as connection, connection.channel() as channel:
        queue = await channel.declare_queue(exclusive=True)
        await queue.bind(await channel.get_exchange("hostler"), key)
        yield queue


async def received(queue: aio_pika.abc.AbstractQueue, count: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    async def enough() -> bool:
        message = await queue.get(fail=False, no_ack=True)
        if message is not None:
            found.append(json.loads(message.body))
        return len(found) >= count

    await testing.eventually(enough)
    return found


async def test_each_threshold_is_told_of_once(
    run_priced: RunPriced, amqp_url: str, database_url: str
) -> None:
    async with run_priced() as service, events_of(amqp_url, "usage.budget.#") as queue:
        await service.api.put("/v1/budgets/hours", budget(12, thresholds=[50, 80, 100]))
        told = await received(queue, 2)
        assert [one["threshold_percent"] for one in told] == [50, 80]
        assert told[0] == {
            "budget": "hours",
            "threshold_percent": 50,
            "period_start": "2026-05-01T00:00:00Z",
            "period_end": "2099-01-01T00:00:00Z",
            "crossed_at": told[0]["crossed_at"],
            "unit": "instance_hours",
            "limit": "12.000000",
            "consumed": "10.000000",
            "forecast": "10.000000",
            "project_ids": ["p1"],
        }
        state = (await service.api.get("/v1/budgets/hours"))["state"]
        assert [one["threshold_percent"] for one in state["crossings"]] == [50, 80]
        # the thresholds are looked at again and again; only the next one is news
        await service.api.put("/v1/budgets/hours", budget(10, thresholds=[50, 80, 100]))
        assert [one["threshold_percent"] for one in await received(queue, 1)] == [100]
        connection = await asyncpg.connect(database_url)
        rows = await connection.fetch("SELECT threshold FROM usage.budget_crossing ORDER BY 1")
        await connection.close()
        assert [row["threshold"] for row in rows] == [50, 80, 100]
        assert await queue.get(fail=False) is None


async def test_a_threshold_is_news_again_once_a_budget_was_raised_and_reached_anew(
    run_priced: RunPriced, amqp_url: str, publish: Publish, settled: Settled
) -> None:
    async with run_priced() as service, events_of(amqp_url, "usage.budget.#") as queue:
        await service.api.put("/v1/budgets/hours", budget(10, thresholds=[50, 100]))
        told = await received(queue, 2)
        assert [one["threshold_percent"] for one in told] == [50, 100]
        await service.api.put("/v1/budgets/hours", budget(15, thresholds=[50, 100]))

        async def reached() -> list[int]:
            state = (await service.api.get("/v1/budgets/hours"))["state"]
            return [one["threshold_percent"] for one in state["crossings"]]

        async def is_forgotten() -> bool:
            return await reached() == [50]

        await testing.eventually(is_forgotten)
        late = brief_instance(4, "p1", DAY + 48 * HOUR).messages()
        await publish([message.body() for message in late])
        await settled(service, len(MESSAGES) + len(late))
        (again,) = await received(queue, 1)
        assert (again["threshold_percent"], again["limit"]) == (100, "15.000000")
        assert await reached() == [50, 100]


async def test_a_budget_that_cannot_be_reckoned_says_why_and_stops_nobody(
    run_priced: RunPriced, amqp_url: str
) -> None:
    tiers = {**TIERED["prices"][0]["tiers"], "period": "day"}
    daily = {**TIERED, "prices": [{**TIERED["prices"][0], "tiers": tiers}]}
    async with run_priced() as service, events_of(amqp_url, "usage.budget.#") as queue:
        api = service.api
        await api.put("/v1/price-books/daily", daily)
        limit = {"amount": 1, "price_book": "daily"}
        years = {"from": "2020-01-01", "until": "2099-01-01"}
        long = await api.put("/v1/budgets/a-long", budget(0, limit=limit, period=years))
        assert long["state"] is None
        assert "500 at most" in long["problem"]
        # the jobs of budgets go on, and the process with them
        await api.put("/v1/budgets/hours", budget(10, thresholds=[100]))
        assert [one["budget"] for one in await received(queue, 1)] == ["hours"]
        found = (await api.get("/v1/budgets"))["budgets"]
        assert [(one["name"], one["state"] is None) for one in found] == [
            ("a-long", True),
            ("hours", False),
        ]
        answer = await api.post(
            "/v1/budgets/check", {"project_id": "p1", "what": {"instance_hours": "0.1"}}
        )
        unknown = answer["budgets"][0]
        assert (unknown["name"], unknown["allowed"], unknown["left"]) == ("a-long", False, None)
        assert unknown["problem"] == long["problem"]


async def test_a_book_that_goes_by_what_is_told_no_longer_stops_no_other_budget(
    run_priced: RunPriced, amqp_url: str, database_url: str
) -> None:
    (hours,) = TIERED["prices"]
    steps = {"period": "month", **hours["tiers"]}
    racked = {**TIERED, "prices": [{**hours, "tiers": steps, "match": {"rack": "r1"}}]}
    async with run_priced() as service, events_of(amqp_url, "usage.budget.#") as queue:
        api = service.api
        async with db.open_pool(database_url, schema="usage") as pool:
            # as of the time when the mapping had racks
            await PriceStore(pool=pool).put_book("racked", racked, by="test", replaces=None)
        limit = {"amount": 1, "price_book": "racked"}
        unknown = await api.put("/v1/budgets/a-racked", budget(0, limit=limit))
        assert unknown["state"] is None
        assert "price book racked: usage cannot be grouped by rack" in unknown["problem"]
        await api.put("/v1/budgets/hours", budget(10, thresholds=[100]))
        assert [one["budget"] for one in await received(queue, 1)] == ["hours"]
        found = (await api.get("/v1/budgets"))["budgets"]
        assert [one["state"] is None for one in found] == [True, False]
        answer = await api.post(
            "/v1/budgets/check", {"project_id": "p1", "what": {"instance_hours": "0.1"}}
        )
        checked = answer["budgets"][0]
        assert (checked["name"], checked["allowed"], checked["asked"]) == ("a-racked", False, None)
        assert checked["problem"] == unknown["problem"]


async def test_of_replicas_that_notice_a_crossing_at_once_one_tells_of_it(
    run_usage: RunUsage, amqp_url: str, database_url: str
) -> None:
    crossing = Crossing(
        budget="hours",
        period_start=DAY,
        period_end=DAY + HOUR,
        threshold=50,
        crossed_at=DAY,
        consumed="6",
        limit="12",
    )
    gone = replace(crossing, budget="gone")
    async with (
        run_usage() as service,
        events_of(amqp_url, "usage.budget.#") as queue,
        db.open_pool(database_url, schema="usage") as pool,
    ):
        await service.api.put("/v1/budgets/hours", budget(12))
        store = PriceStore(pool=pool)

        def record(one: Crossing) -> Awaitable[bool]:
            message = crossing_message(one, Subject(user="u"), unit="instance_hours", forecast="7")
            return store.record_crossing(one, message)

        assert await record(gone) is False
        assert sorted(await asyncio.gather(*(record(crossing) for _ in range(6)))) == [
            *[False] * 5,
            True,
        ]
        assert await record(replace(crossing, threshold=80)) is True
        before = replace(crossing, period_start=DAY - HOUR, period_end=DAY)
        assert await record(before) is True
        told = await received(queue, 3)
        assert [one["threshold_percent"] for one in told] == [50, 80, 50]
        # of the periods that are asked for, no others
        found = await store.crossings([("hours", DAY), ("gone", DAY - HOUR)])
        assert found == [crossing, replace(crossing, threshold=80)]
        assert await store.crossings([("hours", DAY - HOUR)]) == [before]
        assert await queue.get(fail=False) is None


async def test_a_check_says_what_is_left_and_which_budget_refuses(run_priced: RunPriced) -> None:
    async with run_priced() as service:
        api = service.api
        await api.put("/v1/budgets/hours", budget(12))
        money = budget(0, limit={"amount": "0.50", "price_book": "default"})
        await api.put("/v1/budgets/money", money)
        await api.put("/v1/budgets/others", budget(0, subject={"projects": ["p9"]}))
        group = {"group": {"kind": "domain", "name": "later"}}
        await api.put("/v1/budgets/later", budget(0, subject=group))
        await api.put(
            "/v1/project-groups/domain/p1",
            {"memberships": [{"group": "later", "valid_from": "2098-01-01T00:00:00Z"}]},
        )

        async def check(**body: Any) -> tuple[bool, dict[str, tuple[Any, ...]]]:
            answer = await api.post("/v1/budgets/check", {"project_id": "p1", **body})
            return answer["allowed"], {
                row["name"]: (row["allowed"], row["asked"], row["left"])
                for row in answer["budgets"]
            }

        assert await check(what={"instance_hours": 2}, attributes={"flavor": "m1.small"}) == (
            True,
            {"hours": (True, "2.000000", "2.000000"), "money": (True, "0.04", "0.10")},
        )
        assert await check(what={"instance_hours": 2}, attributes={"flavor": "m1.large"}) == (
            False,
            {"hours": (True, "2.000000", "2.000000"), "money": (False, "0.16", "0.10")},
        )
        assert await check(what={"instance_hours": "2.000001"}) == (
            False,
            {"hours": (False, "2.000001", "2.000000"), "money": (True, "0.04", "0.10")},
        )
        assert await check(project_id="p7", what={"instance_hours": 10**6}) == (True, {})
        for bad in ({"llama_hours": 1}, {"instance_hours": -1}, {"instance_hours": "1e5"}):
            with pytest.raises(errors.Invalid) as caught:
                await check(what=bad)
            assert caught.value.code == "usage.budget.amounts_invalid"
        with pytest.raises(errors.Invalid):
            await check(what={"volume_gb_hours": 1}, attributes={"size_gb": "0"})


async def test_a_check_asks_at_the_tier_the_project_stands_in(
    run_usage: RunUsage, publish: Publish, settled: Settled
) -> None:
    now = datetime.now(UTC).replace(microsecond=0)
    life = InstanceLife(
        instance_id=LIVES[0].instance_id,
        project_id="p1",
        steps=(Step(at=now - 40 * 24 * HOUR, action="create", flavor=LARGE),),
    )
    by_day = {"period": "month", "steps": [{"up_to": "0.000001", "price": 1000}, {"price": 1}]}
    book = {**TIERED, "prices": [{**TIERED["prices"][0], "tiers": by_day}]}
    async with run_usage() as service:
        await publish([message.body() for message in life.messages()])
        await settled(service, len(life.messages()))
        await service.api.put("/v1/price-books/tiered", book)
        money = budget(0, limit={"amount": 10**9, "price_book": "tiered"}, period="month")
        await service.api.put("/v1/budgets/money", money)
        answer = await service.api.post(
            "/v1/budgets/check", {"project_id": "p1", "what": {"instance_hours": 7}}
        )
        assert [one["asked"] for one in answer["budgets"]] == ["7.00"]
        assert answer["budgets"][0]["unpriced"] == []


async def test_a_bad_budget_is_refused_whole(run_usage: RunUsage) -> None:
    async with run_usage() as service:
        with pytest.raises(errors.Invalid) as caught:
            await service.api.put("/v1/budgets/b", budget("much", thresholds=[0]))
        assert caught.value.code == "usage.budget.invalid"
        with pytest.raises(errors.NotFound) as missing:
            await service.api.put(
                "/v1/budgets/b", budget(1, limit={"amount": 1, "price_book": "nobody"})
            )
        assert missing.value.code == "usage.price_book.not_found"
        assert (await service.api.get("/v1/budgets"))["budgets"] == []


# --- groups of projects


async def test_a_project_is_in_one_group_of_a_kind_at_a_time(
    run_usage: RunUsage, database_url: str
) -> None:
    path = "/v1/project-groups/cost_center/p1"
    async with run_usage() as service:
        api = service.api
        first = {"group": "a", "valid_from": "2026-01-01T00:00:00Z"}
        kept = await api.put(path, {"memberships": [first]})
        overlapping = [{"group": "a"}, {"group": "b", "valid_from": "2026-01-01T00:00:00Z"}]
        with pytest.raises(errors.Conflict) as caught:
            await api.put(path, {"memberships": overlapping})
        assert caught.value.code == "usage.project_group.overlap"
        with pytest.raises(errors.Invalid):
            await api.put(
                path, {"memberships": [{**first, "valid_until": "2025-01-01T00:00:00Z"}]}
            )
        assert await api.get("/v1/project-groups") == kept
        connection = await asyncpg.connect(database_url)
        with pytest.raises(asyncpg.ExclusionViolationError):
            await connection.execute(
                "INSERT INTO usage.project_group VALUES"
                " ('cost_center', 'b', 'p1', '2026-02-01Z', NULL)"
            )
        await connection.close()
        assert (await api.put(path, {"memberships": []}))["project_groups"] == []
        for project in ("p3", "p1", "p2"):
            await api.put(f"/v1/project-groups/domain/{project}", {"memberships": [first]})
        page = await api.get("/v1/project-groups", limit=2)
        assert [one["project_id"] for one in page["project_groups"]] == ["p1", "p2"]
        page = await api.get("/v1/project-groups", limit=2, marker=page["next_marker"])
        assert [one["project_id"] for one in page["project_groups"]] == ["p3"]
        at = {"at": "2025-12-31T00:00:00Z"}
        assert (await api.get("/v1/project-groups", **at))["project_groups"] == []


# --- who may


async def test_a_project_sees_its_own_costs_prices_and_budgets_alone(
    run_priced: RunPriced, tokens: Callable[..., Path]
) -> None:
    callers = {
        "admin": ("admin", "*"),
        "alice": ("reader", "p1"),
        "bound": ("admin", "p1"),
        "reader": ("reader", "*"),
    }
    special = {**BOOK["prices"][1], "name": "deal", "price": "0.01", "match": {"project": "p2"}}
    group = {"group": {"kind": "cost_center", "name": "research"}}
    async with run_priced(auth_mode="token", auth_tokens_file=tokens(**callers)) as service:
        async with client.open_api(service.url, token="admin") as admin:
            await admin.put(
                "/v1/price-books/default", {**BOOK, "prices": [special, *BOOK["prices"]]}
            )
            await admin.put("/v1/price-books/secret", {**BOOK, "public": False})
            await admin.put("/v1/budgets/own", budget(12))
            await admin.put("/v1/budgets/theirs", budget(1, subject={"projects": ["p2"]}))
            await admin.put("/v1/budgets/both", budget(11, subject={"projects": ["p1", "p2"]}))
            await admin.put("/v1/budgets/group", budget(30, subject=group))
            for project in ("p1", "p2"):
                await admin.put(
                    f"/v1/project-groups/cost_center/{project}",
                    {"memberships": [{"group": "research"}]},
                )
            assert [b["name"] for b in (await admin.get("/v1/budgets"))["budgets"]] == [
                "both",
                "group",
                "own",
                "theirs",
            ]
        async with client.open_api(service.url, token="alice") as alice:
            assert await costs(alice, group_by="project") == {"p1": "0.20"}
            assert await costs(alice, group_by="project", project_id="p2") == {}
            assert await costs(alice, group_by="group:cost_center") == {"research": "0.20"}
            shown = await alice.get("/v1/price-books/default")
            assert [price["name"] for price in shown["document"]["prices"]] == [
                "large",
                "other",
                "disk",
            ]
            assert shown["created_by"] is None
            names = [one["name"] for one in (await alice.get("/v1/price-books"))["price_books"]]
            assert names == ["default"]
            for refused in (
                alice.get("/v1/price-books/secret"),
                alice.get("/v1/price-books/default/versions"),
                alice.get("/v1/costs", **WINDOW, price_book="secret"),
                alice.get("/v1/costs", **WINDOW, compare="secret"),
                alice.get("/v1/budgets/theirs"),
                alice.get("/v1/budgets/both"),
                alice.post(
                    "/v1/budgets/check", {"project_id": "p2", "what": {"instance_hours": 1}}
                ),
            ):
                with pytest.raises(errors.NotFound):
                    await refused
            assert [b["name"] for b in (await alice.get("/v1/budgets"))["budgets"]] == ["own"]
            answer = await alice.post(
                "/v1/budgets/check", {"project_id": "p1", "what": {"instance_hours": 1}}
            )
            assert answer["allowed"] is False  # by the budget of both projects, which is not shown
            assert [(one["name"], one["allowed"], one["left"]) for one in answer["budgets"]] == [
                (None, False, None),
                (None, True, None),
                ("own", True, "2.000000"),
            ]
            groups = (await alice.get("/v1/project-groups"))["project_groups"]
            assert [one["project_id"] for one in groups] == ["p1"]
        for name in ("alice", "bound", "reader"):
            async with client.open_api(service.url, token=name) as caller:
                for refused in (
                    caller.put("/v1/price-books/default", BOOK),
                    caller.put("/v1/budgets/own", budget(99)),
                    caller.delete("/v1/budgets/own"),
                    caller.put("/v1/project-groups/domain/p1", {"memberships": []}),
                ):
                    with pytest.raises(errors.Forbidden):
                        await refused


# --- the command line


async def test_the_command_line_prices_usage_and_checks_budgets(
    run_priced: RunPriced, tmp_path: Path
) -> None:
    book, own = tmp_path / "book.yaml", tmp_path / "budget.json"
    book.write_text("currency: EUR\nprices:\n  - {name: h, measure: instance_hours, price: 1.5}\n")
    own.write_text(json.dumps(budget(12)))
    async with run_priced() as service:

        def run(*arguments: str, code: int = 0) -> str:
            result = CliRunner().invoke(main, [*arguments, "--url", service.url])
            assert result.exit_code == code, result.output
            return result.output

        def work() -> None:
            window = ("--start", "2026-05-08", "--end", "2026-05-09")
            checked = CliRunner().invoke(main, ["prices", "check", str(book)])
            assert checked.exit_code == 0, checked.output
            assert "flat is at version 1" in run("prices", "put", "flat", str(book))
            assert '"price": "1.5"' in run("prices", "show", "flat")
            assert "flat" in run("prices", "list")
            table = run("prices", "costs", *window, "--compare", "flat")
            assert "7.30" in table
            assert "vcpu_hours" not in table
            answer = json.loads(run("prices", "costs", *window, "--book", "flat", "--json"))
            assert answer["total"]["cost"] == "15.00"
            assert "hours is at version 1" in run("budgets", "put", "hours", str(own))
            assert "83.33" in run("budgets", "list")
            assert json.loads(run("budgets", "show", "hours"))["state"]["left"] == "2.000000"
            check = ("budgets", "check", "--project", "p1", "--attribute", "flavor=m1.small")
            assert "yes" in run(*check, "instance_hours=2")
            assert "no" in run(*check, "instance_hours=3", code=1)
            run("groups", "put", "domain", "p1", "d1,,2026-05-08", "d2,2026-05-08")
            assert "2026-05-08T00:00:00Z" in run("groups", "list", "--kind", "domain")
            assert "is deleted" in run("budgets", "delete", "hours")
            book.write_text("currency: EUR\nprices: [{name: h, price: 1.5}]\n")
            refused = CliRunner().invoke(main, ["prices", "check", str(book)])
            assert refused.exit_code == 1
            assert "prices[0].measure: is missing" in refused.output

        await asyncio.to_thread(work)
