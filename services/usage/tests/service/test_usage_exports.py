"""Exports of a real ledger: whole, exact, of one moment, for those who may see them."""

import asyncio
import csv
import hashlib
import http.client
import io
import json
import tracemalloc
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import asyncpg
import pyarrow.parquet  # type: ignore[import-untyped]  # pyarrow has no types
import pytest
from typer.testing import CliRunner

from hostler_common import client, db, errors, testing
from hostler_common.testing import RunningService
from hostler_usage.__main__ import main
from hostler_usage.exporting import export_store, focus
from hostler_usage.exporting.export_store import ExportStore
from hostler_usage.exporting.exports import MOST_AT_ONCE, focus_charges
from hostler_usage.exporting.focus_pricing import Pricing
from hostler_usage.history import report_store
from hostler_usage.history.measures import Window
from hostler_usage.history.report_store import ReportStore, UsageFilter
from hostler_usage.money.price_book import price_book
from hostler_usage.reading import mapping_file
from hostler_usage.testing import LARGE, SMALL, InstanceLife, Step, VolumeLife, VolumeStep

DAY = datetime(2026, 5, 8, tzinfo=UTC)
HOUR = timedelta(hours=1)
WINDOW = {"start": "2026-05-08T00:00:00Z", "end": "2026-05-10T00:00:00Z"}
ROWS = 30_000
RunUsage = Callable[..., AbstractAsyncContextManager[RunningService]]
Publish = Callable[..., Awaitable[None]]
Settled = Callable[[RunningService, int], Awaitable[dict[str, Any]]]
Loaded = Callable[..., AbstractAsyncContextManager[RunningService]]


def instance(number: int, project: str) -> InstanceLife:
    return InstanceLife(
        instance_id=f"00000000-0000-4000-8000-{number:012}",
        project_id=project,
        steps=(
            Step(at=DAY + HOUR, action="create", flavor=SMALL),
            Step(at=DAY + 3 * HOUR, action="resize", flavor=LARGE),
            Step(at=DAY + 4 * HOUR, action="stop"),
            Step(at=DAY + 26 * HOUR, action="delete"),
        ),
    )


LIVES = (
    instance(1, "p1"),
    instance(2, "=cmd()"),
    VolumeLife(
        volume_id="00000000-0000-4000-9000-000000000001",
        project_id="p1",
        steps=(
            VolumeStep(at=DAY, action="create", size_gb=10),
            VolumeStep(at=DAY + HOUR, action="delete"),
        ),
    ),
)
MESSAGES = [message for life in LIVES for message in life.messages()]


@pytest.fixture
def loaded(run_usage: RunUsage, publish: Publish, settled: Settled) -> Loaded:
    """The service with all lives folded."""

    @asynccontextmanager
    async def run(**settings: Any) -> AsyncIterator[RunningService]:
        async with run_usage(**settings) as service:
            await publish([message.body() for message in MESSAGES])
            token = "admin" if settings else None
            async with client.open_api(service.url, token=token) as api:
                whole = RunningService(
                    url=service.url, api=api, settings=service.settings, stop=service.stop
                )
                await settled(whole, len(MESSAGES))
            yield service

    return run


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))


@contextmanager
def opened(service: RunningService, path: str, **parameters: str) -> Iterator[Any]:
    """The answer, not read yet."""
    url = f"{service.url}{path}?{urlencode(parameters)}"
    with urllib.request.urlopen(url, timeout=60) as answer:
        yield answer


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


async def fetched(service: RunningService, path: str, **parameters: str) -> bytes:
    def read() -> bytes:
        with opened(service, path, **parameters) as answer:
            data: bytes = answer.read()
            return data

    return await asyncio.to_thread(read)


async def fill(url: str, rows: int) -> None:
    """So many intervals of as many resources are in the ledger."""
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(
            "INSERT INTO usage.usage_interval SELECT 'RegionOne', 'volume', 'v' || n, $2::timestamptz,"
            " $2::timestamptz + '1 hour'::interval,"
            " 'p' || n % 3, NULL, 'available', '{\"size_gb\": 1}', '[]', '[]', 'events'"
            " FROM generate_series(1, $1) AS n",
            rows,
            DAY,
        )
    finally:
        await connection.close()


async def test_csv_says_what_the_api_says_to_the_microsecond(loaded: Loaded) -> None:
    async with loaded() as service:
        groups = "project,flavor,state_class"
        rows = table(await service.api.get("/v1/exports/usage.csv", **WINDOW, group_by=groups))
        answer = await service.api.get("/v1/usage", **WINDOW, group_by=groups)
    expected = {
        (
            *(f"'{name}" if name == "=cmd()" else name or "" for name in row["group"].values()),
            measure,
        ): amount
        for row in answer["usage"]
        for measure, amount in row["unit_microseconds"].items()
        if amount
    }
    found = {
        (row["project"], row["flavor"], row["state_class"], row["measure"]): int(
            row["unit_microseconds"]
        )
        for row in rows
    }
    assert found == expected
    assert len(rows) == len(found) > 8
    for row in rows:
        exact = Fraction(int(row["unit_microseconds"]), 3_600_000_000)
        assert abs(Fraction(Decimal(row["hours"])) - exact) <= Fraction(1, 2 * 10**6)
        assert (row["start"], row["end"]) == (WINDOW["start"], WINDOW["end"])


async def test_ndjson_and_parquet_say_what_csv_says(loaded: Loaded) -> None:
    async with loaded() as service:
        asked = {**WINDOW, "group_by": "project,resource"}
        text = await service.api.get("/v1/exports/usage.csv", **asked, guard="false")
        lines = await service.api.get("/v1/exports/usage.ndjson", **asked)
        data = await fetched(service, "/v1/exports/usage.parquet", **asked)
    keys = ("project", "resource", "measure", "unit")
    from_csv = [
        (*(row[key] for key in keys), int(row["unit_microseconds"]), Decimal(row["hours"]))
        for row in table(text)
    ]
    from_ndjson = [
        (*(row[key] for key in keys), row["unit_microseconds"], Decimal(row["hours"]))
        for row in map(json.loads, lines.splitlines())
    ]
    from_parquet = [
        (*(row[key] for key in keys), int(row["unit_microseconds"]), row["hours"])
        for row in pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
    ]
    assert from_csv == from_ndjson == from_parquet
    assert len(from_csv) > 8
    assert "=cmd()" in {row[0] for row in from_csv}


async def test_pages_and_batches_make_no_difference(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with loaded() as service:
        paths = ("/v1/exports/usage.csv", "/v1/exports/intervals.csv")
        asked = {**WINDOW, "group_by": "resource,flavor"}
        whole = [await service.api.get(path, **asked) for path in paths]
        monkeypatch.setattr(report_store, "ROWS_A_BATCH", 2)
        monkeypatch.setattr(export_store, "ROWS_A_BATCH", 1)
        assert [await service.api.get(path, **asked) for path in paths] == whole


async def test_intervals_lead_to_the_bodies_they_rest_on(loaded: Loaded) -> None:
    bodies = {message.message_id: message.body() for message in MESSAGES}
    async with loaded() as service:
        lines = await service.api.get("/v1/exports/intervals.ndjson", **WINDOW)
        intervals = [json.loads(line) for line in lines.splitlines()]
        assert {item["resource_id"] for item in intervals} == {
            *(f"00000000-0000-4000-8000-{n:012}" for n in (1, 2)),
            "00000000-0000-4000-9000-000000000001",
        }
        cited = [one for item in intervals for one in item["opened_by"] + item["closed_by"]]
        assert len(cited) >= 2 * len(intervals)
        for one in cited:
            body = await service.api.get(f"/v1/events/{one['event_id']}/body")
            assert body.encode() == bodies[one["message_id"]]
        rows = table(await service.api.get("/v1/exports/intervals.csv", **WINDOW))
        assert [json.loads(row["opened_by"]) for row in rows] == [
            item["opened_by"] for item in intervals
        ]
        assert [(row["start"], row["end"]) for row in rows] == [
            (item["start"], item["end"]) for item in intervals
        ]


async def test_a_reader_of_one_project_exports_that_project_alone(
    loaded: Loaded, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    lines = [
        f"{name}:{role}:{projects}:{hashlib.sha256(name.encode()).hexdigest()}"
        for name, role, projects in (("admin", "admin", "*"), ("alice", "reader", "p1"))
    ]
    tokens.write_text("\n".join(lines))
    async with loaded(auth_mode="token", auth_tokens_file=tokens) as service:
        async with client.open_api(service.url, token="alice") as alice:
            asked = {**WINDOW, "group_by": "project"}
            rows = table(await alice.get("/v1/exports/usage.csv", **asked))
            assert {row["project"] for row in rows} == {"p1"}
            rows = table(await alice.get("/v1/exports/intervals.csv", **WINDOW))
            assert {row["project_id"] for row in rows} == {"p1"}
            rows = table(await alice.get("/v1/exports/focus.csv", **WINDOW))
            assert {row["SubAccountId"] for row in rows} == {"p1"}
            for name in ("usage", "intervals", "focus"):
                path = f"/v1/exports/{name}.csv"
                assert table(await alice.get(path, **asked, project_id="=cmd()")) == []
        async with client.open_api(service.url) as nobody:
            for name in ("usage", "intervals", "focus"):
                with pytest.raises(errors.Unauthenticated):
                    await nobody.get(f"/v1/exports/{name}.csv", **WINDOW)


async def test_focus_rows_are_days_of_resources_and_sum_to_the_usage(loaded: Loaded) -> None:
    async with loaded() as service:
        rows = table(await service.api.get("/v1/exports/focus.csv", **WINDOW))
        usage = await service.api.get("/v1/usage", **WINDOW, group_by="project")
        data = await fetched(service, "/v1/exports/focus.parquet", **WINDOW)
    sums: dict[tuple[str, str], Decimal] = {}
    for row in rows:
        key = (row["SubAccountId"], row["SkuMeter"])
        sums[key] = sums.get(key, Decimal(0)) + Decimal(row["ConsumedQuantity"])
        assert row["ChargePeriodStart"] in ("2026-05-08T00:00:00Z", "2026-05-09T00:00:00Z")
        assert (row["BilledCost"], row["BillingCurrency"]) == ("0.0", "USD")
    expected = {
        (row["group"]["project"], measure): Fraction(amount, 3_600_000_000)
        for row in usage["usage"]
        for measure, amount in row["unit_microseconds"].items()
        if amount
    }
    assert sums.keys() == expected.keys()
    for key, quantity in sums.items():
        assert abs(Fraction(quantity) - expected[key]) < Fraction(1, 10**15)
    assert pyarrow.parquet.read_table(io.BytesIO(data)).num_rows == len(rows)


FLAT = {
    "currency": "EUR",
    "prices": [
        {
            "name": "running",
            "measure": "instance_hours",
            "match": {"state_class": "running"},
            "price": 2,
        },
        {"name": "rest", "measure": "instance_hours", "price": 1},
        {"name": "disk", "measure": "volume_gb_hours", "price": "0.1"},
    ],
}
TIERED = {
    "currency": "EUR",
    "prices": [
        {
            "name": "hour",
            "measure": "instance_hours",
            "tiers": {"scope": ["project"], "steps": [{"up_to": 20, "price": 1}, {"price": 3}]},
        }
    ],
}


@pytest.mark.parametrize(
    ("document", "start", "costs"),
    [
        # each ran 3 hours and was stopped 22 of them; a volume of 10 GB was there an hour
        (FLAT, DAY, {"p1": Fraction(2 * 3 + 22 + 1), "=cmd()": Fraction(2 * 3 + 22)}),
        (FLAT, DAY + 24 * HOUR, {"p1": Fraction(2), "=cmd()": Fraction(2)}),
        (TIERED, DAY, {"p1": Fraction(20 + 3 * 5), "=cmd()": Fraction(20 + 3 * 5)}),
        # the first 20 hours were used before the window: what is left is dear
        (TIERED, DAY + 24 * HOUR, {"p1": Fraction(6), "=cmd()": Fraction(6)}),
    ],
)
async def test_charges_by_a_price_book_add_up_to_what_the_book_asks(
    loaded: Loaded,
    database_url: str,
    document: dict[str, Any],
    start: datetime,
    costs: dict[str, Fraction],
) -> None:
    async with loaded(), db.open_pool(database_url, schema="usage", max_size=2) as pool:
        store = ExportStore(reports=ReportStore(pool=pool, mapping=mapping_file.packaged()))
        pricing = Pricing(book=price_book(document), measures=store.measures)
        asked = Window(start=start, end=DAY + 48 * HOUR, as_of=datetime.now(UTC))
        found: dict[str, Fraction] = {}
        async with store.snapshot() as snapshot:
            async for batch in focus_charges(snapshot, asked, UsageFilter(), pricing, "USD"):
                for charge in batch:
                    assert start <= charge.start < charge.end <= asked.end
                    focus.row(charge, focus.Issuer(), priced=True)
                    if charge.price is not None:
                        assert charge.currency == "EUR"
                        key = charge.project_id or ""
                        found[key] = found.get(key, Fraction(0)) + charge.price.cost
    assert found == costs


async def test_an_export_is_of_one_moment(loaded: Loaded, database_url: str) -> None:
    async with loaded() as service:
        await fill(database_url, ROWS)

        def read() -> bytes:
            with opened(service, "/v1/exports/intervals.ndjson", **WINDOW) as answer:
                first: bytes = answer.read(1000)
                asyncio.run(deleted())
                return first + bytes(answer.read())

        async def deleted() -> None:
            connection = await asyncpg.connect(database_url)
            await connection.execute("DELETE FROM usage.usage_interval")
            await connection.close()

        before = (await asyncio.to_thread(read)).splitlines()
        assert sum(json.loads(line)["resource_id"].startswith("v") for line in before) == ROWS
        assert await service.api.get("/v1/exports/intervals.ndjson", **WINDOW) is None


async def test_pages_of_usage_are_of_one_moment(
    loaded: Loaded, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_store, "ROWS_A_BATCH", 1)
    async with loaded(), db.open_pool(database_url, schema="usage", max_size=2) as pool:
        store = ExportStore(reports=ReportStore(pool=pool, mapping=mapping_file.packaged()))
        asked = Window(start=DAY, end=DAY + 48 * HOUR, as_of=datetime.now(UTC))
        async with store.snapshot() as snapshot, store.snapshot() as later:
            first = [b async for b in snapshot.usage(asked, ["resource"], UsageFilter())]
            batches = later.usage(asked, ["resource"], UsageFilter())
            second = [await anext(batches)]
            connection = await asyncpg.connect(database_url)
            await connection.execute("DELETE FROM usage.usage_interval")
            await connection.close()
            second += [batch async for batch in batches]
    assert second == first
    assert len([batch for batch in first if batch]) == len(LIVES)


async def test_an_export_that_cannot_be_finished_does_not_look_whole(
    loaded: Loaded, database_url: str
) -> None:
    async with loaded() as service:
        await fill(database_url, ROWS)

        async def cut() -> None:
            connection = await asyncpg.connect(database_url)
            await connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE state = 'idle in transaction' AND datname = current_database()"
            )
            await connection.close()

        def read() -> None:
            with opened(service, "/v1/exports/intervals.ndjson", **WINDOW) as answer:
                answer.read(1000)
                asyncio.run(cut())
                with pytest.raises((http.client.IncompleteRead, ConnectionError)):
                    answer.read()

        await asyncio.to_thread(read)
        lines = await service.api.get("/v1/exports/intervals.ndjson", **WINDOW)
        assert len(lines.splitlines()) > ROWS


async def test_memory_does_not_grow_with_the_rows(loaded: Loaded, database_url: str) -> None:
    async with loaded() as service:
        await fill(database_url, ROWS)

        def read(**parameters: str) -> int:
            size = 0
            with opened(service, "/v1/exports/intervals.csv", **WINDOW, **parameters) as answer:
                while chunk := answer.read(1 << 16):
                    size += len(chunk)
            return size

        async def peak(**parameters: str) -> tuple[int, int]:
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            size = await asyncio.to_thread(read, **parameters)
            return size, tracemalloc.get_traced_memory()[1] - before

        tracemalloc.start()
        try:
            await peak(project_id="p1")  # what is loaded once is loaded
            some, of_some = await peak(project_id="p1")
            many, of_many = await peak()
        finally:
            tracemalloc.stop()
        assert many > 2.5 * some
        # whoever gathers rows holds more than a byte for each byte of them
        assert of_many - of_some < 0.3 * (many - some), (of_some, of_many, some, many)


async def test_few_exports_are_written_at_once_and_one_given_up_makes_room(
    loaded: Loaded, database_url: str
) -> None:
    async with loaded() as service:
        await fill(database_url, ROWS)

        def begun() -> http.client.HTTPConnection:
            connection = http.client.HTTPConnection(
                service.url.removeprefix("http://"), timeout=60
            )
            connection.request("GET", f"/v1/exports/intervals.ndjson?{urlencode(WINDOW)}")
            assert connection.getresponse().read(100)
            return connection

        connections = [await asyncio.to_thread(begun) for _ in range(MOST_AT_ONCE)]
        with pytest.raises(errors.TooMany) as caught:
            await service.api.get("/v1/exports/usage.csv", **WINDOW)
        assert caught.value.code == "usage.export.busy"
        for connection in connections:
            connection.close()

        async def room() -> bool:
            try:
                await service.api.get("/v1/exports/usage.csv", **WINDOW)
            except errors.TooMany:
                return False
            return True

        await testing.eventually(room)


BAD_REQUESTS = {
    "/v1/exports/usage.csv?": "request.invalid",
    "/v1/exports/usage.xlsx?start=2026-05-08T00:00:00Z&end=2026-05-09T00:00:00Z": "request.invalid",
    "/v1/exports/focus.ndjson?start=2026-05-08T00:00:00Z&end=2026-05-09T00:00:00Z": "request.invalid",
    "/v1/exports/usage.csv?start=2026-05-08T00:00:00Z&end=2026-05-08T00:00:00Z": "usage.window.invalid",
    "/v1/exports/usage.csv?start=0001-01-01T00:00:00%2B14:00&end=2026-05-08T00:00:00Z": (
        "usage.window.invalid"
    ),
    "/v1/exports/focus.csv?start=2026-05-08T00:00:00.5Z&end=2026-05-09T00:00:00Z": (
        "usage.window.invalid"
    ),
    "/v1/exports/focus.csv?start=2020-05-08T00:00:00Z&end=2026-05-09T00:00:00Z": (
        "usage.window.invalid"
    ),
    "/v1/exports/usage.csv?start=2026-05-08T00:00:00Z&end=2026-05-09T00:00:00Z&group_by=colour": (
        "usage.group_by.unknown"
    ),
    "/v1/exports/focus.csv?start=2026-05-08T00:00:00Z&end=2026-05-09T00:00:00Z&price_book=none": (
        "usage.price_book.not_found"
    ),
    "/v1/exports/usage.csv?start=2026-05-08T00:00:00Z&end=2026-05-09T00:00:00Z&project_id=a%00": (
        "request.invalid"
    ),
}


async def test_what_cannot_be_meant_is_refused_before_the_first_byte(run_usage: RunUsage) -> None:
    async with run_usage() as service:

        def code(request: str) -> str:
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(f"{service.url}{request}", timeout=60)
            with caught.value as answer:
                return str(json.loads(answer.read())["code"])

        answers = {request: await asyncio.to_thread(code, request) for request in BAD_REQUESTS}
    assert answers == BAD_REQUESTS


async def test_a_window_in_which_nothing_was_is_a_table_without_rows(run_usage: RunUsage) -> None:
    async with run_usage() as service:
        for name in ("usage", "intervals", "focus"):
            for window in (
                WINDOW,
                {"start": "2099-01-01T00:00:00Z", "end": "2099-02-01T00:00:00Z"},
            ):
                text = await service.api.get(f"/v1/exports/{name}.csv", **window)
                assert text.endswith("\r\n")
                assert table(text) == []


async def test_the_command_line_writes_a_whole_file_or_none(
    loaded: Loaded, tmp_path: Path
) -> None:
    async with loaded() as service:

        def run(*arguments: str) -> Any:
            return CliRunner().invoke(main, ["export", *arguments, "--url", service.url])

        window = ("--start", "2026-05-08", "--end", "2026-05-10")
        file = tmp_path / "usage.parquet"
        done = await asyncio.to_thread(
            run, "usage", "-o", str(file), *window, "--group-by", "project"
        )
        assert done.exit_code == 0, done.output
        assert "bytes written" in done.stderr
        assert done.stdout == ""
        assert pyarrow.parquet.read_table(file).num_rows > 4
        for what in ("usage", "intervals", "focus"):
            printed = await asyncio.to_thread(run, what, *window)
            assert printed.exit_code == 0, printed.output
            expected = await service.api.get(f"/v1/exports/{what}.csv", **WINDOW)
            assert printed.stdout_bytes.decode() == expected
        bad = tmp_path / "bad.csv"
        refused = await asyncio.to_thread(
            run, "usage", "-o", str(bad), *window, "--group-by", "colour"
        )
        assert refused.exit_code == 1
        assert "usage.group_by.unknown" in refused.stderr
        assert names(tmp_path) == ["usage.parquet"]
