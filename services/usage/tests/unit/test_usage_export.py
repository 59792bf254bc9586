"""Tables leave the service as text and Parquet, and come back as exactly the same values."""

import builtins
import csv
import io
import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pyarrow.parquet  # type: ignore[import-untyped]  # pyarrow has no types
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostler_usage.exporting import export
from hostler_usage.exporting.export import Column, Csv, Kind, Ndjson
from hostler_usage.exporting.export_parquet import (
    DIGITS,
    ROWS_A_GROUP,
    SCALE,
    Parquet,
    PyarrowMissing,
)

COLUMNS = (
    Column("name", Kind.TEXT),
    Column("amount", Kind.INTEGER),
    Column("hours", Kind.DECIMAL),
    Column("at", Kind.TIME),
    Column("is", Kind.BOOLEAN),
    Column("cited", Kind.JSON),
)
LARGEST = 10**DIGITS - 1
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
rows = st.tuples(
    texts | st.none(),
    st.integers(-LARGEST, LARGEST) | st.none(),
    st.decimals(
        allow_nan=False, allow_infinity=False, places=6, min_value=-(10**18), max_value=10**18
    )
    | st.none(),
    st.datetimes(timezones=st.just(UTC)) | st.none(),
    st.booleans() | st.none(),
    st.lists(st.dictionaries(texts, texts | st.integers() | st.none(), max_size=3), max_size=3)
    | st.none(),
)
tables = st.lists(rows, max_size=12)


def batches(encoder: export.Encoder, table: Sequence[Any], size: int) -> bytes:
    """The file, written so many rows at a time."""
    pieces = [encoder.batch(table[n : n + size]) for n in range(0, len(table), size)]
    return b"".join([*pieces, encoder.end()])


def read(kind: Kind, said: str, *, guard: bool) -> Any:
    """What a cell of CSV says."""
    match kind:
        case Kind.INTEGER:
            return int(said)
        case Kind.DECIMAL:
            return Decimal(said)
        case Kind.TIME:
            return datetime.fromisoformat(said)
        case Kind.BOOLEAN:
            return {"true": True, "false": False}[said]
        case Kind.JSON:
            return json.loads(said)
        case _:
            return export.unguarded(said) if guard else said


def nothing_or_empty(value: object) -> object:
    """csv.reader tells no empty field from a quoted one: both are nothing to it."""
    return value or None if isinstance(value, str) else value


@given(tables, st.booleans(), st.integers(1, 5))
def test_csv_reads_back_as_the_same_values(table: list[Any], guard: bool, size: int) -> None:
    data = batches(Csv(COLUMNS, guard=guard), table, size).decode()
    head, *lines = csv.reader(io.StringIO(data, newline=""), strict=True)
    assert head == [column.name for column in COLUMNS]
    found = [
        tuple(
            read(column.kind, cell, guard=guard) if cell else None
            for column, cell in zip(COLUMNS, line, strict=True)
        )
        for line in lines
    ]
    assert found == [tuple(nothing_or_empty(value) for value in row) for row in table]


@given(tables, st.integers(1, 5))
def test_ndjson_reads_back_as_the_same_values(table: list[Any], size: int) -> None:
    data = batches(Ndjson(COLUMNS), table, size).decode()
    found = []
    for line in data.split("\n")[:-1]:
        said = json.loads(line)
        found.append(
            (
                said["name"],
                said["amount"],
                None if said["hours"] is None else Decimal(said["hours"]),
                None if said["at"] is None else datetime.fromisoformat(said["at"]),
                said["is"],
                said["cited"],
            )
        )
    assert found == [tuple(row) for row in table]


@given(tables)
def test_parquet_reads_back_as_the_same_values(table: list[Any]) -> None:
    data = batches(Parquet(COLUMNS), table, 5)
    found = pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
    assert [
        (*(row[column.name] for column in COLUMNS[:-1]), row["cited"] and json.loads(row["cited"]))
        for row in found
    ] == [tuple(row) for row in table]


def test_parquet_is_written_in_row_groups_as_rows_come() -> None:
    table = [("a", n, None, None, None, None) for n in range(2 * ROWS_A_GROUP + 1)]
    encoder = Parquet(COLUMNS)
    sizes = [len(encoder.batch(table[n : n + 1000])) for n in range(0, len(table), 1000)]
    data = encoder.end()
    # a group is written when it is full: between, only the header of four bytes
    assert [n for n, size in enumerate(sizes) if size > 4] == [9, 19]
    assert len(data) > 0


@pytest.mark.parametrize(
    "value",
    [10**DIGITS, -(10**DIGITS), Decimal(10) ** (DIGITS - SCALE), Decimal(1).scaleb(-SCALE - 1)],
)
def test_parquet_refuses_a_number_it_would_have_to_round(value: int | Decimal) -> None:
    kind = Kind.INTEGER if isinstance(value, int) else Kind.DECIMAL
    encoder = Parquet([Column("n", kind)])
    with pytest.raises(ValueError, match="n holds a number beyond"):
        batches(encoder, [(value,)], 1)


def test_parquet_holds_the_hours_of_the_largest_quantity_there_is() -> None:
    (hours,) = (column for column in export.usage_columns([]) if column.name == "hours")
    of_a_century = Decimal(2**53 * 24 * 36525).scaleb(9) + Decimal("0.000001")
    data = batches(Parquet([hours]), [(of_a_century,)], 1)
    assert pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist() == [{"hours": of_a_century}]


def test_without_pyarrow_parquet_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def no_pyarrow(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", no_pyarrow)
    with pytest.raises(PyarrowMissing, match=r"hostler-usage\[parquet\]"):
        Parquet(COLUMNS)


@pytest.mark.parametrize(
    ("given_text", "cell"),
    [
        ("plain", "plain"),
        ('say "hi", twice', '"say ""hi"", twice"'),
        ("two\nlines", '"two\nlines"'),
        (" spaced ", '" spaced "'),
        ("", '""'),
        (None, ""),
        ("=1+1", "'=1+1"),
        ("+49", "'+49"),
        ("-1", "'-1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", "'\t=1"),
        ("\r=1", '"\'\r=1"'),
        ("'=1", "''=1"),
        ("'quoted", "'quoted"),
        ("a=1", "a=1"),
    ],
)
def test_cells_are_quoted_by_rfc_4180_and_no_text_is_a_formula(
    given_text: str | None, cell: str
) -> None:
    data = batches(Csv([Column("name", Kind.TEXT)], guard=True), [(given_text,)], 1)
    assert data.decode() == f"name\r\n{cell}\r\n"


@given(texts)
def test_a_guard_can_be_undone_and_leaves_no_formula(text: str) -> None:
    guarded = export.guarded(text)
    assert export.unguarded(guarded) == text
    assert not guarded.startswith(("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠"))  # noqa: RUF001


def test_numbers_are_never_guarded_nor_shown_in_scientific_notation() -> None:
    columns = [Column("n", Kind.INTEGER), Column("d", Kind.DECIMAL)]
    table = [(-1, Decimal("-1E+3")), (10**30, Decimal("1E-7")), (0, Decimal("-0.00"))]
    assert batches(Csv(columns, guard=True), table, 3).decode() == (
        "n,d\r\n-1,-1000.0\r\n1000000000000000000000000000000,0.0000001\r\n0,0.0\r\n"
    )


def test_a_table_without_rows_still_has_its_header() -> None:
    assert batches(Csv(COLUMNS, guard=True), [], 1) == b"name,amount,hours,at,is,cited\r\n"
    assert batches(Ndjson(COLUMNS), [], 1) == b""
    table = pyarrow.parquet.read_table(io.BytesIO(batches(Parquet(COLUMNS), [], 1)))
    assert table.column_names == [column.name for column in COLUMNS]
    assert table.num_rows == 0


def test_usage_says_what_is_held_in_hours_and_what_moved_in_units() -> None:
    start = datetime(2026, 5, 8, tzinfo=UTC)
    common: dict[str, Any] = {
        "start": start,
        "end": start + timedelta(days=1),
        "group": {"project": "p1", "flavor": None},
        "resources": 2,
    }
    held = export.UsageLine(
        **common,
        measure="vcpu_hours",
        unit="vCPU",
        is_held=True,
        amount=5_400_000_001,
        hours=Decimal("1.5"),
    )
    moved = export.UsageLine(
        **common, measure="bytes", unit="B", is_held=False, amount=7, hours=None
    )
    encoder = Csv(export.usage_columns(["project", "flavor"]), guard=True)
    assert batches(encoder, [export.usage_row(held), export.usage_row(moved)], 2).decode() == (
        "start,end,project,flavor,resources,measure,unit,unit_microseconds,hours,amount\r\n"
        "2026-05-08T00:00:00Z,2026-05-09T00:00:00Z,p1,,2,vcpu_hours,vCPU,5400000001,1.5,\r\n"
        "2026-05-08T00:00:00Z,2026-05-09T00:00:00Z,p1,,2,bytes,B,,,7\r\n"
    )


@pytest.mark.parametrize(
    ("resource_type", "quantity", "unit"),
    [
        ("instance", None, "Instance"),
        ("floating_ip", None, "Floating IP"),
        ("instance", "vcpus", "vCPU"),
        ("instance", "memory_mb", "MiB"),
        ("volume", "size_gb", "GiB"),
        ("image", "size_bytes", "B"),
        ("instance", "fixed_ips", "Fixed IP"),
        ("volume", "provisioned_iops", "IOPS"),
        ("volume", "volume_read_operations", "Operation"),
        ("node", "leased", "Node"),
        ("instance", "cpu_time_ns", "Nanosecond"),
        ("instance", "gpus", "GPU"),
    ],
)
def test_units_follow_from_what_is_measured(
    resource_type: str, quantity: str | None, unit: str
) -> None:
    assert export.unit(resource_type, quantity) == unit
