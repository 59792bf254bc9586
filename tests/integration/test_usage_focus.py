"""Files of the FOCUS export pass the FinOps Foundation's own validator, which finds what is wrong with a bad one.

focus-validator 2.2.1 wants Python 3.12 (`^3.12`, and numpy 1, which no later Python has): one is looked
for on the machine. Nothing is downloaded while it runs: it is told not to fetch newer rules, and
checks by those in its package (model 1.2.0.1, the rules of FOCUS 1.2).
"""

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from hostler_common import db
from hostler_usage.exporting import export_store, exports, focus, focus_pricing
from hostler_usage.exporting.export import Csv, Encoder, Row
from hostler_usage.exporting.export_parquet import Parquet
from hostler_usage.history.measures import Window
from hostler_usage.history.report_store import ReportStore, UsageFilter
from hostler_usage.money import price_book
from hostler_usage.reading import mapping_file

PEERS = Path(__file__).parent / "peers"
DAY = datetime(2026, 5, 31, tzinfo=UTC)
# what the export supports of what the specification asks for under conditions
ALWAYS = (
    "ACCOUNT_NAMING_SUPPORTED",
    "AVAILABILITY_ZONE_SUPPORTED",
    "BILLING_BASED_ON_PROVISIONED_RESOURCES_SUPPORTED",
    "MULTIPLE_BILLING_ACCOUNT_TYPES_SUPPORTED",
    "MULTIPLE_SUB_ACCOUNT_TYPES_SUPPORTED",
    "REGION_SUPPORTED",
    "RESOURCE_TYPE_ASSIGNMENT_SUPPORTED",
    "SUB_ACCOUNT_SUPPORTED",
    "TAGGING_SUPPORTED",
    "USAGE_MEASUREMENT_SUPPORTED",
)
WITH_A_BOOK = (
    *ALWAYS,
    "MULTIPLE_PRICING_CATEGORIES_SUPPORTED",
    "NEGOTIATED_PRICING_SUPPORTED",
    "PUBLIC_PRICE_LIST_SUPPORTED",
    "UNIT_PRICING_SUPPORTED",
)
# one half of "null without an invoice, or not null with one": the validator cannot know which holds, lists the half
# that does not, and takes the rule itself (InvoiceId-C-003-C) as kept. There are no invoices here.
NEVER_INVOICED = {"InvoiceId-C-005-C"}


def python_3_12() -> str:
    """An interpreter that runs and is Python 3.12: on the path, of pyenv, or of uv, which fetches one if need be."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    found = [shutil.which("python3.12") or ""]
    found += sorted(str(path) for path in pyenv.glob("versions/3.12*/bin/python3.12"))
    for candidate in filter(None, found):
        if said([candidate, "-c", "import sys; print(sys.version_info[:2])"]) == "(3, 12)":
            return candidate
    uv = str(Path(sys.executable).parent / "uv")
    python = said([uv, "python", "find", "--offline", "3.12"])
    if not python:
        said([uv, "python", "install", "--quiet", "3.12"])
        python = said([uv, "python", "find", "--offline", "3.12"])
    assert python, "focus-validator needs Python 3.12: install one, and run this again"
    return python


def said(argv: list[str]) -> str:
    """What the program prints; nothing where it fails, or is not there."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


@pytest.fixture(scope="session")
def validator() -> Path:
    """The environment that has focus-validator."""
    built = subprocess.run(
        [python_3_12(), str(PEERS / "build.py"), "focus"],
        check=True,
        capture_output=True,
        text=True,
    )
    return Path(built.stdout.strip())


def broken_rules(environment: Path, file: Path, criteria: Iterable[str]) -> set[str]:
    """The rules that the validator finds broken in a file."""
    report = file.with_name(f"{file.name}.xml")
    # it reads its list of currencies by a path from where it stands
    packages = environment / "lib" / "python3.12" / "site-packages"
    done = subprocess.run(
        [
            str(environment / "bin" / "focus-validator"),
            *("--data-file", str(file), "--block-download", "--validate-version", "1.2.0.1"),
            *("--applicability-criteria", ",".join(criteria)),
            *("--output-type", "unittest", "--output-destination", str(report)),
        ],
        cwd=packages,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    cases = list(ET.parse(report).getroot().iter("testcase"))
    assert len(cases) > 500
    checked = [case for case in cases if case.find("skipped") is None]
    assert len(checked) > 150
    return {
        str(case.get("name")).partition(" ")[0]
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    }


# --- what is exported: every kind of resource, over the end of a month

# (only ASCII: the validator takes other text for broken, though the specification wants all of Unicode)
HELD: list[tuple[str, str, str | None, str, dict[str, Any]]] = [
    (
        "instance",
        "i-1",
        "p1",
        "running",
        {
            "vcpus": 2,
            "memory_mb": 4096,
            "disk_gb": 40,
            "flavor": "m1",
            "zone": "nova",
            "fixed_ips": 1,
        },
    ),
    ("instance", "i-2", "p2", "stopped", {"vcpus": 3, "memory_mb": 2048, "flavor": 'large, "x"'}),
    (
        "volume",
        "v-1",
        "p1",
        "in_use",
        {"size_gb": 7, "volume_type": "ssd", "provisioned_iops": 300},
    ),
    ("snapshot", "s-1", "p1", "available", {"size_gb": 7}),
    ("backup", "b-1", "p1", "available", {"size_gb": 7}),
    ("image", "g-1", None, "active", {"size_bytes": 2_147_483_648}),
    ("network", "n-1", "p2", "active", {}),
    ("floating_ip", "f-1", "p2", "associated", {"address": "192.0.2.1"}),
    ("node", "bm-1", "p2", "leased", {"leased": 1}),
]
MOVED = [
    ("instance", "i-1", "p1", "cpu_time_ns", 123_456_789),
    ("instance", "i-1", "p1", "bandwidth_out_bytes", 10**13 + 1),
    ("volume", "v-1", "p1", "volume_read_operations", 77),
]
BOOK = {
    "currency": "EUR",
    "free": ["network_hours"],
    "prices": [
        {
            "name": "vm",
            "measure": "instance_hours",
            "price": "0.012",
            "state_class_factors": {"stopped": "0.5"},
            "rounding": {"to": "hour"},
        },
        {"name": "cpu", "measure": "vcpu_hours", "price": "0.0033333333333"},
        {"name": "ram", "measure": "ram_mb_hours", "per": 1024, "price": "0.005"},
        {"name": "disk", "measure": "volume_gb_hours", "price": "0.0001"},
        {
            "name": "traffic",
            "measure": "bandwidth_out_bytes",
            "per": 1_000_000_000,
            "tiers": {"steps": [{"up_to": 100, "price": 0}, {"price": "0.05"}]},
        },
    ],
    "discounts": [{"name": "own", "percent": 10, "match": {"project": "p1"}}],
}


async def fill(pool: db.Pool) -> None:
    begin, end = DAY - timedelta(hours=3), DAY + timedelta(days=1, hours=7, seconds=1)
    async with db.connection(pool) as connection:
        for resource_type, resource_id, project, state_class, attributes in HELD:
            await connection.execute(
                "INSERT INTO usage_interval VALUES ('RegionOne', $1, $2, $3, $4, $5, 'u1', $6, $7,"
                " '[]', '[]', 'events')",
                *(resource_type, resource_id, begin, end, project, state_class, attributes),
            )
        for resource_type, resource_id, project, counter, amount in MOVED:
            await connection.execute(
                "INSERT INTO usage_amount VALUES ('RegionOne', $1, $2, $3, '', $4, $5, $6, '[]')",
                *(resource_type, resource_id, counter, DAY, amount, project),
            )


async def rows_of(pool: db.Pool, pricing: focus_pricing.Pricing | None) -> list[Row]:
    """The rows of the export of three days, and of a correction."""
    store = export_store.ExportStore(
        reports=ReportStore(pool=pool, mapping=mapping_file.packaged())
    )
    asked = Window(
        start=DAY - timedelta(days=1), end=DAY + timedelta(days=2), as_of=datetime.now(UTC)
    )
    issuer, found = focus.Issuer(), []
    async with store.snapshot() as snapshot:
        charges = exports.focus_charges(snapshot, asked, UsageFilter(), pricing, "EUR")
        async for batch in charges:
            found += [focus.row(charge, issuer, priced=pricing is not None) for charge in batch]
        async for lines in snapshot.usage(asked, focus.GROUPS, UsageFilter(project_id="p1")):
            late = focus.charge(lines[0], currency="EUR", corrected_in=DAY + timedelta(days=40))
            found.append(focus.row(late, issuer, priced=pricing is not None))
    return found


def written(encoder: Encoder, rows: list[Row], file: Path) -> Path:
    file.write_bytes(encoder.batch(rows) + encoder.end())
    return file


async def test_what_is_exported_passes_the_foundation_s_validator(
    database_url: str, validator: Path, tmp_path: Path
) -> None:
    # no service runs: what is put into the ledger by hand is in no sums of days that it keeps
    await db.migrate(database_url, schema="usage", package="hostler_usage")
    async with db.open_pool(database_url, schema="usage", max_size=2) as pool:
        await fill(pool)
        plain = await rows_of(pool, None)
        pricing = focus_pricing.Pricing(
            book=price_book.price_book(BOOK), measures=mapping_file.packaged().measures
        )
        priced = await rows_of(pool, pricing)
    assert len(plain) == len(priced) > 50
    columns, priced_columns = focus.columns(priced=False), focus.columns(priced=True)
    found = {}
    for name, encoder, rows, criteria in (
        ("plain.csv", Csv(columns, guard=False), plain, ALWAYS),
        ("priced.csv", Csv(priced_columns, guard=False), priced, WITH_A_BOOK),
        ("plain.parquet", Parquet(columns), plain, ALWAYS),
        ("priced.parquet", Parquet(priced_columns), priced, WITH_A_BOOK),
    ):
        file = written(encoder, rows, tmp_path / name)
        found[name] = await asyncio.to_thread(broken_rules, validator, file, criteria)
    assert found == dict.fromkeys(found, NEVER_INVOICED)


def test_the_validator_finds_what_is_wrong(validator: Path, tmp_path: Path) -> None:
    columns = focus.columns(priced=False)
    names = [column.name for column in columns]
    line = {
        "BilledCost": None,
        "ChargeCategory": "Use",
        "ServiceSubcategory": "Virtual Machines",
        "ServiceCategory": "Storage",
        "BillingCurrency": "euro",
    }
    file = written(
        Csv(columns, guard=False), [tuple(line.get(name) for name in names)], tmp_path / "bad.csv"
    )
    broken = broken_rules(validator, file, ALWAYS)
    assert {
        "BilledCost-C-003-M",
        "ChargeCategory-C-003-M",
        "ServiceSubcategory-C-004-M",
        "BillingCurrency-C-003-M",
        "ChargePeriodStart-C-003-M",
    } <= broken
