"""What is known of the resources that are held now: their state and since when, and what they moved."""

import base64
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any, Final

import asyncpg

from hostler_common import db
from hostler_usage.exporting.export import CitedMessage
from hostler_usage.exporting.idle import Counted, Held, Thresholds
from hostler_usage.history.paging import BadMarker, visible_projects
from hostler_usage.history.report_store import UsageFilter

TYPES: Final = ("instance", "volume", "snapshot", "backup", "image", "floating_ip")
"""The types of resources that `idle.judge` has something to say of."""

# the run of intervals with the present state class, and the first message that says so
_HELD: Final = """
SELECT i.region, i.resource_type, i.resource_id, i.project_id, i.user_id, i.state_class, i.attributes,
       run.starts_at AS since, run.opened_by,
       (SELECT min(starts_at) FROM usage_interval
         WHERE (resource_id, resource_type, region) = (i.resource_id, i.resource_type, i.region)
       ) AS born
  FROM usage_interval AS i
 CROSS JOIN LATERAL (
       SELECT starts_at, opened_by FROM usage_interval
        WHERE (resource_id, resource_type, region) = (i.resource_id, i.resource_type, i.region)
          AND starts_at > coalesce((
              SELECT max(starts_at) FROM usage_interval AS other
               WHERE (resource_id, resource_type, region) = (i.resource_id, i.resource_type, i.region)
                 AND other.state_class <> i.state_class), '-infinity')
        ORDER BY starts_at LIMIT 1) AS run
 WHERE i.ends_at IS NULL AND i.resource_type = ANY($1)
   AND ($2::text[] IS NULL OR i.project_id = ANY($2))
   AND ($3::text IS NULL OR i.region = $3)
   AND ($4::text IS NULL OR (i.resource_id, i.resource_type, i.region) > ($4, $5, $6))
 ORDER BY i.resource_id, i.resource_type, i.region LIMIT $7
"""
# one row a counter: labels are summed, a rate is what was added between two samples. Images count all their life.
_MOVED: Final = """
WITH wanted AS (
    SELECT * FROM unnest($1::text[], $2::text[], $3::text[]) AS k (resource_id, resource_type, region)
), moved AS (
    SELECT resource_id, resource_type, region, counter, at, sum(amount) AS amount
      FROM usage_amount JOIN wanted USING (resource_id, resource_type, region)
     WHERE (at > $4 OR resource_type = 'image') AND at <= $5
     GROUP BY resource_id, resource_type, region, counter, at
), paced AS (
    SELECT *, extract(epoch FROM at - lag(at) OVER (
        PARTITION BY resource_id, resource_type, region, counter ORDER BY at)) AS seconds
      FROM moved
)
SELECT resource_id, resource_type, region, counter, count(*) AS samples, min(at) AS first_at, max(at) AS last_at,
       sum(amount) AS total,
       percentile_disc(0.95) WITHIN GROUP (ORDER BY amount / nullif(seconds, 0)) AS p95
  FROM paced GROUP BY resource_id, resource_type, region, counter
"""
# a counter that stands still leaves no amount: that it was read is known from the messages themselves
_READ: Final = """
SELECT resource_id, region, min(event_time) AS first_at, max(event_time) AS last_at FROM raw_event
 WHERE resource_type = 'volume' AND resource_id = ANY($1) AND event_type = 'volume.usage'
   AND event_time > $2 AND event_time <= $3
 GROUP BY resource_id, region
"""
_VOLUMES: Final = """
SELECT resource_id, region, CASE WHEN bool_or(ends_at IS NULL) THEN NULL ELSE max(ends_at) END AS gone_at
  FROM usage_interval WHERE resource_type = 'volume' AND resource_id = ANY($1)
 GROUP BY resource_id, region
"""
_IMAGES: Final = """
SELECT DISTINCT attributes->>'image' AS image, region FROM usage_interval
 WHERE resource_type = 'instance' AND (ends_at IS NULL OR ends_at > $2) AND attributes->>'image' = ANY($1)
"""
_SENT: Final = """
SELECT r.region FROM unnest($1::text[]) AS r (region)
 WHERE EXISTS (SELECT FROM usage_amount AS a WHERE a.region = r.region AND a.resource_type = 'image'
                  AND a.counter = 'image_sent_bytes' AND a.at > $2)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A resource that is held now, whose it is, and the messages its state rests on."""

    region: str
    resource_id: str
    project_id: str | None
    user_id: str | None
    held: Held
    opened_by: Sequence[CitedMessage]

    @property
    def marker(self) -> str:
        """Where the list goes on after this one."""
        parts = [self.resource_id, self.held.resource_type, self.region]
        return base64.urlsafe_b64encode(json.dumps(parts).encode()).decode().rstrip("=")


async def candidates(
    connection: db.Connection,
    where: UsageFilter,
    limits: Thresholds,
    *,
    now: datetime,
    limit: int,
    marker: str | None,
) -> list[Candidate]:
    """A page of the resources that are held now, in order of their ids.

    Raises:
        BadMarker: the marker is not of this list.
    """
    types = [where.resource_type] if where.resource_type is not None else list(TYPES)
    after = (None, None, None) if marker is None else marked_parts(marker)
    projects = visible_projects(where.scope)
    if where.project_id is not None:
        is_allowed = projects is None or where.project_id in projects
        projects = [where.project_id] if is_allowed else []
    rows = await connection.fetch(_HELD, types, projects, where.region, *after, limit)
    known = await _knowledge(connection, rows, limits, now)
    return [
        Candidate(
            region=row["region"],
            resource_id=row["resource_id"],
            project_id=row["project_id"],
            user_id=row["user_id"],
            held=known.held(row),
            opened_by=[CitedMessage(**item) for item in row["opened_by"]],
        )
        for row in rows
    ]


_Key = tuple[str, str]  # an id, in a region


@dataclass(frozen=True, slots=True, kw_only=True)
class _Knowledge:
    moved: Mapping[tuple[str, str, str], Mapping[str, Counted]]
    read: Mapping[_Key, tuple[datetime, datetime]]
    volumes: Mapping[_Key, datetime | None]
    images: frozenset[_Key]
    reporting: frozenset[str]

    def held(self, row: asyncpg.Record) -> Held:
        region, kind = row["region"], row["resource_type"]
        attributes: Mapping[str, Any] = row["attributes"]
        source = (attributes.get("volume") or "", region)
        return Held(
            resource_type=kind,
            state_class=row["state_class"],
            born=row["born"],
            since=row["since"],
            attributes=attributes,
            activity=self.moved.get((row["resource_id"], kind, region), {}),
            read=self.read.get((row["resource_id"], region)) if kind == "volume" else None,
            is_source_known=source in self.volumes,
            source_gone_at=self.volumes.get(source),
            is_wanted=kind == "image" and (row["resource_id"], region) in self.images,
            are_uses_reported=region in self.reporting,
        )


async def _knowledge(
    connection: db.Connection, rows: Sequence[asyncpg.Record], limits: Thresholds, now: datetime
) -> _Knowledge:
    begin = now - timedelta(days=limits.inactive_days)
    used_from = now - timedelta(days=limits.unused_days)
    ids: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        ids[row["resource_type"]].append(row["resource_id"])
    moved: dict[tuple[str, str, str], dict[str, Counted]] = defaultdict(dict)
    keys = [[row[n] for row in rows] for n in ("resource_id", "resource_type", "region")]
    for row in await connection.fetch(_MOVED, *keys, begin, now):
        moved[row["resource_id"], row["resource_type"], row["region"]][row["counter"]] = Counted(
            samples=row["samples"],
            first_at=row["first_at"],
            last_at=row["last_at"],
            total=int(row["total"]),
            p95_per_second=_fraction(row["p95"]),
        )
    read = await connection.fetch(_READ, ids["volume"], begin, now) if ids["volume"] else []
    sources = [
        row["attributes"].get("volume") for row in rows if row["resource_type"] == "snapshot"
    ]
    volumes = await connection.fetch(_VOLUMES, [one for one in sources if one]) if sources else []
    images, regions = [], []
    if ids["image"]:
        images = await connection.fetch(_IMAGES, ids["image"], used_from)
        regions = await connection.fetch(_SENT, sorted({row["region"] for row in rows}), used_from)
    return _Knowledge(
        moved=moved,
        read={
            (row["resource_id"], row["region"]): (row["first_at"], row["last_at"]) for row in read
        },
        volumes={(row["resource_id"], row["region"]): row["gone_at"] for row in volumes},
        images=frozenset((row["image"], row["region"]) for row in images),
        reporting=frozenset(row["region"] for row in regions),
    )


def _fraction(value: Decimal | None) -> Fraction | None:
    return None if value is None else Fraction(value)


def marked_parts(marker: str) -> tuple[str, ...]:
    """The id, type and region that a marker was made of."""
    try:
        found = json.loads(base64.urlsafe_b64decode(marker + "=" * (-len(marker) % 4)))
    except (ValueError, RecursionError) as exc:
        raise BadMarker("the marker is not one of this list's") from exc
    if (
        not isinstance(found, list)
        or len(found) != 3
        or not all(isinstance(part, str) and "\0" not in part for part in found)
    ):
        raise BadMarker("the marker is not one of this list's")
    return tuple(found)
