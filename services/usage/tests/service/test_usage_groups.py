"""Usage by dated groups of projects: a project that changes its group is split at the instant."""

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from hostler_common import client, db, errors
from hostler_common.testing import RunningService
from hostler_usage.history.groups_testing import ALL, KINDS, MAY, PROJECTS, memberships
from hostler_usage.history.ledger_testing import Ledger
from hostler_usage.history.measures import Window
from hostler_usage.history.report_store import ReportStore, UsageFilter
from hostler_usage.history.rollup_store import RollupStore
from hostler_usage.history.usage_row import UsageRow
from hostler_usage.money.budget import Membership
from hostler_usage.money.price_store import PriceStore
from hostler_usage.reading.mapping_file import packaged
from hostler_usage.testing import SMALL, InstanceLife, Step

DAY, HOUR = timedelta(days=1), timedelta(hours=1)
RunTold = Callable[..., AbstractAsyncContextManager[RunningService]]
Usage = Counter[tuple[str | None, ...]]


async def all_pages(
    reports: ReportStore,
    window: Window,
    groups: Sequence[str],
    where: UsageFilter,
    limit: int,
    zone: str,
) -> list[UsageRow]:
    rows: list[UsageRow] = []
    marker = None
    while True:
        page, marker = await reports.usage(
            window, groups, where, limit=limit, marker=marker, time_zone=zone
        )
        rows += page
        if marker is None:
            return rows


async def by_hand(
    reports: ReportStore,
    window: Window,
    groups: Sequence[str],
    where: UsageFilter,
    found: Sequence[Membership],
    zone: str,
) -> Usage:
    """The same from usage by project, asked for between every two moments at which a group changes."""
    edges = {window.start, window.end}
    for one in found:
        edges |= {edge for edge in (one.start, one.end) if edge is not None}
    inside = sorted(edge for edge in edges if window.start <= edge <= window.end)
    asked = ["project", *(name for name in groups if not name.startswith("group:"))]
    total: Usage = Counter()
    for start, end in pairwise(inside):
        part = Window(start=start, end=end, as_of=window.as_of)
        for row in await all_pages(reports, part, list(dict.fromkeys(asked)), where, 1000, zone):
            key: list[str | None] = []
            for name in groups:
                if not name.startswith("group:"):
                    key.append(row.group[name])
                    continue
                key.append(
                    next(
                        (
                            one.group
                            for one in found
                            if (one.kind, one.project)
                            == (name.removeprefix("group:"), row.group["project"])
                            and one.start <= start
                            and (one.end is None or end <= one.end)
                        ),
                        None,
                    )
                )
            for measure, amount in row.amounts.items():
                total[(*key, measure)] += amount
    return total


GROUPS: tuple[list[str], ...] = (
    ["group:domain"],
    ["group:cost_centre", "group:domain"],
    ["day", "group:domain"],
    ["group:domain", "type", "month"],
    ["group:domain", "project"],
    ["group:domain", "flavor", "hour"],
    ["group:nobody_has_one"],
)


@pytest.mark.parametrize("seed", range(4))
async def test_usage_of_groups_is_what_their_projects_used_while_they_were_in_them(
    pool: db.Pool, seed: int
) -> None:
    chance = random.Random(seed)
    ledger = Ledger(pool)
    await ledger.told(ALL)
    found = memberships(chance)
    prices = PriceStore(pool=pool)
    for kind in KINDS:
        for project in PROJECTS:
            own = [one for one in found if (one.kind, one.project) == (kind, project)]
            await prices.put_memberships(kind, project, own)
    reports = ledger.reports
    # first from the facts, then from sums of whole days where there are some
    for summed_until in (None, MAY + 6 * DAY + HOUR):
        if summed_until is not None:
            await RollupStore(pool=pool, mapping=packaged()).advance(summed_until)
        for groups in GROUPS:
            first = MAY + chance.randrange(48) * HOUR
            window = Window(
                start=first,
                end=first + chance.randrange(1, 7 * 24) * HOUR,
                as_of=MAY + 6 * DAY + 5 * HOUR,
            )
            where = chance.choice(
                (
                    UsageFilter(),
                    UsageFilter(resource_type="instance"),
                    UsageFilter(scope=frozenset({"p1", "p3"})),
                    UsageFilter(project_id="p0", region="r1"),
                )
            )
            zone = chance.choice(("UTC", "Asia/Kathmandu"))
            rows = await all_pages(reports, window, groups, where, chance.choice((1, 1000)), zone)
            usage: Usage = Counter()
            for row in rows:
                assert row.amounts
                for measure, amount in row.amounts.items():
                    usage[(*row.group.values(), measure)] += amount
            assert usage == await by_hand(reports, window, groups, where, found, zone), groups


async def test_whole_days_of_groups_are_answered_from_the_sums_and_split_days_from_the_facts(
    pool: db.Pool,
) -> None:
    """Where the facts of other days are gone the answer is the same: nothing else was read."""
    ledger = Ledger(pool)
    await ledger.told(ALL)
    await RollupStore(pool=pool, mapping=packaged()).advance(MAY + 9 * DAY)
    noon = MAY + 2 * DAY + 12 * HOUR
    await PriceStore(pool=pool).put_memberships(
        "domain",
        "p1",
        [
            Membership(kind="domain", group="a", project="p1", start=MAY - DAY, end=noon),
            Membership(kind="domain", group="b", project="p1", start=noon, end=None),
        ],
    )
    reports = ledger.reports
    window = Window(start=MAY, end=MAY + 7 * DAY, as_of=MAY + 9 * DAY)

    async def asked() -> list[tuple[str | None, dict[str, int]]]:
        rows, _ = await reports.usage(window, ["group:domain"], UsageFilter(), limit=10)
        assert [row.resources for row in rows] == [None] * 3
        return [(row.group["group:domain"], dict(row.amounts)) for row in rows]

    before = await asked()
    assert [name for name, _ in before] == [None, "a", "b"]
    whole, _ = await reports.usage(window, [], UsageFilter(), limit=1)
    assert sum((Counter(amounts) for _, amounts in before), Counter()) == whole[0].amounts
    async with db.connection(pool) as connection:
        for table, column in (("usage_interval", "starts_at"), ("usage_amount", "at")):
            await connection.execute(f"DELETE FROM {table} WHERE project_id <> 'p1'")
            await connection.execute(f"DELETE FROM {table} WHERE {column} >= $1", MAY + 3 * DAY)
    assert await asked() == before


LIFE = InstanceLife(
    instance_id="00000000-0000-4000-8000-000000000001",
    project_id="p1",
    steps=(
        Step(at=MAY + 4 * DAY, action="create", flavor=SMALL),
        Step(at=MAY + 4 * DAY + 6 * HOUR, action="delete"),
    ),
)
OTHER = replace(LIFE, instance_id="00000000-0000-4000-8000-000000000002", project_id="p2")
WINDOW = {"start": "2026-05-08T00:00:00Z", "end": "2026-05-09T00:00:00Z"}


async def by_group(api: client.Api, **params: Any) -> dict[str | None, float]:
    answer = await api.get("/v1/usage", **{**WINDOW, "group_by": "group:cost_centre", **params})
    return {
        row["group"]["group:cost_centre"]: row["hours"]["instance_hours"]
        for row in answer["usage"]
    }


async def test_a_project_that_changes_its_group_is_split_at_the_instant(
    run_told: RunTold, tokens: Callable[..., Path]
) -> None:
    messages = LIFE.messages() + OTHER.messages()
    callers = {"admin": ("admin", "*"), "alice": ("reader", "p1")}
    async with (
        run_told(messages, auth_mode="token", auth_tokens_file=tokens(**callers)) as service,
        client.open_api(service.url, token="admin") as admin,
        client.open_api(service.url, token="alice") as alice,
    ):
        assert await by_group(admin) == {None: 12.0}
        for project, moves in (
            (
                "p1",
                [
                    {"group": "research", "valid_until": "2026-05-08T02:00:00Z"},
                    {"group": "sales", "valid_from": "2026-05-08T02:30:00Z"},
                ],
            ),
            ("p2", [{"group": "research"}]),
        ):
            await admin.put(f"/v1/project-groups/cost_centre/{project}", {"memberships": moves})
        assert await by_group(admin) == {None: 0.5, "research": 8.0, "sales": 3.5}
        assert await by_group(admin, project_id="p2") == {"research": 6.0}
        assert await by_group(alice) == {None: 0.5, "research": 2.0, "sales": 3.5}
        assert await by_group(alice, project_id="p2") == {}
        exported = await admin.get(
            "/v1/exports/usage.ndjson", **WINDOW, group_by="group:cost_centre"
        )
        lines = [json.loads(line) for line in exported.splitlines()]
        assert {
            line["group:cost_centre"]: float(line["hours"])
            for line in lines
            if line["measure"] == "instance_hours"
        } == await by_group(admin)
        explained = await admin.get(
            "/v1/usage/explain",
            **WINDOW,
            measure="instance_hours",
            **{"group:cost_centre": "research"},
        )
        assert (explained["hours"], explained["resources"]) == (8.0, 2)
        for bad in ("group:", "group:Domain", "group:a b", "group:a\0", "group:x' OR true --"):
            with pytest.raises(errors.Invalid) as caught:
                await admin.get("/v1/usage", **WINDOW, group_by=bad)
            assert caught.value.code == "usage.group_by.unknown"
