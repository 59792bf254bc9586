"""docs/usage-seeds.md, run: each event and each field of the first documents does what its table says."""

import re
from datetime import UTC, datetime
from pathlib import Path

import pytest

from hostler_usage.reading.envelope import Notification
from hostler_usage.reading.mapping_file import packaged
from hostler_usage.reading.normalise import Normalised, Normaliser
from hostler_usage.reading.statement import Statement

TEXT = (Path(__file__).parents[4] / "docs" / "usage-seeds.md").read_text(encoding="utf-8")
ROW = re.compile(
    r"^\| (?:(\w+) \| )?`([\w.]+)` \| ([^|]*)\|(?: ([^|]*)\| ([^|]*)\|)?$", re.MULTILINE
)
ROWS = [tuple((cell or "").strip() for cell in row) for row in ROW.findall(TEXT)]
EVENTS = [(event, *cells) for resource, event, *cells in ROWS if not resource]
FIELDS = [(resource, field, cells[0]) for resource, field, *cells in ROWS if resource]

BODIES: dict[str, tuple[str, dict[str, object]]] = {
    "instance": (
        "compute.instance.exists",
        {
            "tenant_id": "p",
            "user_id": "u",
            "instance_id": "i",
            "instance_type": "m1.small",
            "instance_type_id": 2,
            "display_name": "web",
            "created_at": "2026-05-08 10:00:00",
            "launched_at": "2026-05-08 10:01:00",
            "deleted_at": "",
            "image_ref_url": "http://g/images/a",
            "state": "active",
            "state_description": "",
            "memory_mb": 2048,
            "disk_gb": 20,
            "fixed_ips": [],
            "audit_period_beginning": "2026-05-08 11:00:00",
            "audit_period_ending": "2026-05-08 12:00:00",
        },
    ),
    "volume": (
        "volume.exists",
        {
            "tenant_id": "p",
            "user_id": "u",
            "volume_id": "v",
            "volume_type": "ssd",
            "display_name": "data",
            "created_at": "2026-05-08 10:00:00",
            "launched_at": "2026-05-08 10:01:00",
            "status": "available",
            "size": 10,
            "snapshot_id": "",
            "audit_period_begining": "2026-05-08 11:00:00",
            "audit_period_ending": "2026-05-08 12:00:00",
        },
    ),
}
# another value than the body above has, where "x" would not do
OTHER: dict[str, object] = {
    "created_at": "2026-05-08 09:00:00",
    "launched_at": "2026-05-08 10:02:00",
    "deleted_at": "2026-05-08 11:30:00",
    "image_ref_url": "http://g/images/b",
    "image_meta": {"os_distro": "debian"},
    "image_metadata": [{"key": "a", "value": "b"}],
    "fixed_ips": [{"address": "10.0.0.2"}],
    "memory_mb": 4096,
    "disk_gb": 40,
    "size": 20,
    "audit_period_beginning": "2026-05-08 10:00:00",
    "audit_period_begining": "2026-05-08 10:00:00",
    "audit_period_ending": "2026-05-08 13:00:00",
    "bandwidth": {"public": {"bw_in": 1, "bw_out": 2}},
}
NORMALISER = Normaliser(packaged())


def read(event_type: str, payload: dict[str, object]) -> Normalised:
    notification = Notification(
        message_id="m",
        has_own_id=True,
        event_type=event_type,
        publisher_id="",
        priority="INFO",
        timestamp=datetime(2026, 5, 8, 12, tzinfo=UTC),
        payload=payload,
        context_project_id=None,
        request_id="req",
        digest=b"d",
    )
    return NORMALISER.read(notification, region="r1")


def parts(found: Normalised) -> dict[str, object]:
    """Everything that is said, by the name the table calls it."""
    (said,) = found.said
    statement: Statement | None = said.statement
    assert statement is not None
    named = {
        name: getattr(statement, name)
        for name in ("born_at", "ended_at", "period", "task", "failed", "readings")
    }
    return {"id": said.resource.resource_id} | dict(statement.attributes) | named


def test_the_tables_are_whole() -> None:
    assert (len(EVENTS), len(FIELDS)) == (55, 37)


@pytest.mark.parametrize(("event", "resource", "edge", "operation"), EVENTS)
def test_an_event_of_the_seeds_does_what_the_table_says(
    event: str, resource: str, edge: str, operation: str
) -> None:
    rule = packaged().rule_for(event)
    assert rule is not None
    named = f"{rule.action} {rule.phase}" if rule.phase else ""
    assert (rule.resource.name, str(rule.edge), named) == (resource, edge, operation)


@pytest.mark.parametrize(("resource", "field", "changes"), FIELDS)
def test_a_field_of_the_seeds_changes_what_the_table_says(
    resource: str, field: str, changes: str
) -> None:
    event_type, payload = BODIES[resource]
    if field == "audit_period_begining":  # the wiki's spelling, instead of the code's
        payload = {k: v for k, v in payload.items() if k != "audit_period_beginning"}
    before = parts(read(event_type, payload))
    after = parts(read(event_type, payload | {field: OTHER.get(field, "x")}))
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    assert changed == (set() if changes == "kept" else {changes})
