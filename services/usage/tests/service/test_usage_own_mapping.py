"""A file of an operator's own, given to the service: what it meters, and that a wrong one is not begun with."""

import json
from pathlib import Path
from typing import Any

import pytest

from hostler_usage.reading.mapping_file import MappingInvalid
from hostler_usage.service_testing import RunUsage

MANILA = """
version: 1
resources:
  share:
    attributes: {project: {}, size_gb: {kind: whole}, state: {}}
    states: {available: [available], error: [error]}
    edges: {launch: [create.end], change: [extend.end, shrink.end], end: [delete.end]}
    bodies:
      manila:
        events: share.
        id: share_id
        attributes: {project: project_id, size_gb: size, state: status}
measures:
  share_gb_hours: {resource: share, attribute: size_gb}
"""
SHARES = [
    {
        "message_id": f"m{number}",
        "event_type": f"share.{event}",
        "timestamp": f"2026-05-08 0{number}:00:00",
        "payload": {"share_id": "s", "project_id": "p1", "size": size, "status": "available"},
    }
    for number, (event, size) in enumerate(
        (("create.end", 5), ("extend.end", 8), ("delete.end", 8))
    )
]


async def test_shares_of_manila_are_metered_by_a_file_alone(
    run_usage: RunUsage, publish: Any, settled: Any, tmp_path: Path
) -> None:
    file = tmp_path / "manila.yaml"
    file.write_text(MANILA)
    source = {"name": "cloud", "region": "r1", "exchanges": ["manila"]}
    async with run_usage(mapping_file=file, sources=[source]) as service:
        bodies = [json.dumps(message).encode() for message in SHARES]
        await publish(bodies, exchange="manila")
        (row,) = (await settled(service, len(SHARES)))["usage"]
        assert (row["group"], row["hours"]) == ({"project": "p1"}, {"share_gb_hours": 13.0})


async def test_the_service_does_not_begin_with_a_wrong_mapping_and_says_where_it_is_wrong(
    run_usage: RunUsage, tmp_path: Path
) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(MANILA.replace("attribute: size_gb", "attribute: colour"))
    with pytest.raises(MappingInvalid, match=r"measures\.share_gb_hours"):
        async with run_usage(mapping_file=file):
            pass
