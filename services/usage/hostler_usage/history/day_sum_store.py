"""Usage that the sums of whole days answer alone, read in the order of its groups and no further than a page goes.

The key of `usage_day` begins with the project and then the day. Where a page's first group is one of these, so many
of them are looked at as the page is likely to need, and more while it is not full: what it costs grows with its
rows, not with the projects behind them nor with the years before.

A group comes from the database as two texts: the names of its sums, and the sums. Most groups of an answer have the
same names, which are then read once, and all sums of a batch are one piece of JSON. A row a sum, or a column a
measure, would cost both sides several times as much.
"""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from functools import cache
from typing import Final

import asyncpg

from hostler_common import db
from hostler_usage.history.paging import BadMarker, Conditions
from hostler_usage.reading.mapping import Measure

_COLUMN: Final = {
    "project": "project_id",
    "region": "region",
    "type": "resource_type",
    "day": "day",
    "month": "date_trunc('month', day::timestamp)::date",
}
GROUPS: Final = frozenset(_COLUMN)
"""What sums of whole days can be grouped by; by `SLICE` as well, where they have `edges`."""
SLICE: Final = "slice"
"""Which of the slices between the edges it is of, counted from one."""
BUCKETS: Final = frozenset({"day", "month"})
"""Those of them that are times."""
_ROWS_A_PART: Final = 3000  # so many are read while the database finds the next
_ROWS_A_BATCH: Final = 1000
_READING_SECONDS: Final = 600.0  # until the first rows come everything has been grouped
# from each project straight to the next one, whatever there is of it
_PROJECTS: Final = (
    "WITH RECURSIVE known (project_id) AS ("
    "(SELECT project_id FROM usage_day WHERE project_id {} $1 ORDER BY project_id LIMIT 1)"
    " UNION ALL SELECT (SELECT d.project_id FROM usage_day AS d"
    " WHERE d.project_id > known.project_id ORDER BY d.project_id LIMIT 1)"
    " FROM known WHERE known.project_id IS NOT NULL)"
    " SELECT project_id FROM known WHERE project_id IS NOT NULL LIMIT $2"
)
_GIVEN: Final = (
    "SELECT project_id FROM unnest($3::text[]) AS given (project_id) WHERE project_id {} $1"
    " ORDER BY project_id LIMIT $2"
)
# both go over the same rows in the same order
_SUMS: Final = "string_agg(resource_type || '/' || measure, ','), string_agg(amount::text, ',')"

Value = str | date
"""What a group is told apart by, as the database has it."""

Summed = tuple[dict[str, str | None], dict[str, int]]
"""A group, and the sums of those measures that anything was used of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DaySums:
    """The usage of the UTC days `[first, until)`, all of which are summed up; None does not restrict.

    `groups` are some of `GROUPS`, at most one of them of time. Usage that is not grouped is one row,
    whatever there is. `edges` are the first day, those that the slices after the first begin with, and
    the day behind the last.
    """

    first: date
    until: date
    groups: Sequence[str]
    measures: Sequence[Measure]
    projects: Sequence[str] | None = None
    region: str | None = None
    resource_type: str | None = None
    edges: Sequence[date] = ()

    async def page(
        self, connection: db.Connection, after: Sequence[str] | None, limit: int
    ) -> tuple[list[Summed], bool]:
        """At most `limit` groups in order, those behind the group `after`, and whether there are more.

        Raises:
            BadMarker: there can be no such group.
        """
        last = None if after is None else self._values(after)
        found: list[Summed] = []
        async with aclosing(self._batches(connection, last, limit + 1)) as batches:
            rows = await anext(batches, None)
            while rows is not None:
                # the database goes on meanwhile, and others are served
                read, following = await asyncio.gather(
                    asyncio.to_thread(self._read, rows),
                    anext(batches, None),
                    return_exceptions=True,  # both are over, or closing would meet what still runs
                )
                if isinstance(read, BaseException):
                    raise read
                if isinstance(following, BaseException):
                    raise following
                found += read
                rows = following
        return found[:limit], len(found) > limit

    async def all(self, connection: db.Connection) -> AsyncGenerator[list[Summed]]:
        """All groups in order, in batches; runs in the caller's transaction."""
        query, values = self._statement(None)
        cursor = await connection.cursor(query, *values)
        while rows := await cursor.fetch(_ROWS_A_BATCH, timeout=_READING_SECONDS):
            yield self._read(rows)

    async def _batches(
        self, connection: db.Connection, last: Sequence[Value] | None, limit: int
    ) -> AsyncGenerator[list[asyncpg.Record]]:
        """At most `limit` rows, one for each group behind `last`."""
        async with aclosing(self._statements(connection, last, limit)) as statements:
            async for query, values in statements:
                rows = await connection.fetch(f"{query} LIMIT ${len(values) + 1}", *values, limit)
                yield rows
                limit -= len(rows)
                if not limit:
                    return

    async def _statements(
        self, connection: db.Connection, last: Sequence[Value] | None, limit: int
    ) -> AsyncGenerator[tuple[str, Sequence[object]]]:
        """What asks for some of the first group after the other, from those of `last` on."""
        match self.groups[0] if self.groups else None:
            case "project":
                known, given = _PROJECTS, []
                if self.projects is not None:
                    known, given = _GIVEN, [self.projects]
                number = -(-limit // self._most_a_project)
                at_once = -(-_ROWS_A_PART // self._most_a_project)
                compared, beyond = ">=", "" if last is None else last[0]
                while rows := await connection.fetch(
                    known.format(compared), beyond, number, *given
                ):
                    names = [row[0] for row in rows]
                    for first in range(0, len(names), at_once):
                        yield self._of_projects(names[first : first + at_once], last)
                    if len(names) < number:
                        return
                    # there was less of these: of the next there may be as little
                    compared, beyond, number = ">", names[-1], 2 * number
            case "day":
                begin, days = self.first, 1
                if last is not None and isinstance(last[0], date):
                    begin = max(begin, last[0])
                while begin < self.until:
                    until = min(begin + timedelta(days=days), self.until)
                    yield replace(self, first=begin, until=until)._statement(last)
                    begin, days = until, 2 * days
            case _:
                yield self._statement(last)

    @property
    def _most_a_project(self) -> int:
        """How many groups a project has at most, where it has one region and one type of resources."""
        if "day" in self.groups:
            return (self.until - self.first).days
        if "month" in self.groups:
            return 12 * (self.until.year - self.first.year) + 12
        return 1

    def _statement(self, last: Sequence[Value] | None) -> tuple[str, Sequence[object]]:
        """What asks for the groups behind `last`, in order."""
        conditions = self._conditions()
        conditions.add("project_id = ANY({})", self.projects)
        if last is not None:
            columns = ", ".join(self._column(name) for name in self.groups)
            conditions.add(f"({columns}) > ({', '.join('{}' for _ in last)})", *last)
        query = self._select(self.groups, conditions.also)
        order = ", ".join(str(n + 1) for n in range(len(self.groups)))
        return query + (f" ORDER BY {order}" if order else ""), conditions.values

    def _of_projects(
        self, names: Sequence[str], last: Sequence[Value] | None
    ) -> tuple[str, Sequence[object]]:
        """The same of projects in this order, each of which is looked up by itself.

        Asked for all of them at once, the planner likes to read the days of all projects there are.
        """
        conditions, rest = self._conditions(), self.groups[1:]
        selected = self._select(
            rest, f" AND project_id = asked.project_id{conditions.also}", is_one_project=True
        )
        if not rest:
            selected += " HAVING count(*) > 0"
        values = Conditions(*conditions.values)
        place = values.value(names)
        if last is not None:
            keys = ", ".join(("asked.project_id", *(f"key_{n}" for n in range(len(rest)))))
            values.add(f"({keys}) > ({', '.join('{}' for _ in last)})", *last)
        order = ", ".join(("place", *(f"key_{n}" for n in range(len(rest)))))
        return (
            f"SELECT asked.project_id, sums.* FROM unnest({place}::text[])"  # noqa: S608  constants of this module
            f" WITH ORDINALITY AS asked (project_id, place) CROSS JOIN LATERAL ({selected}) AS sums"
            f" {values.clause} ORDER BY {order}"
        ), values.values

    def _conditions(self) -> Conditions:
        conditions = Conditions()
        conditions.add("region = {}", self.region)
        conditions.add("resource_type = {}", self.resource_type)
        return conditions

    def _select(
        self, groups: Sequence[str], conditions: str, *, is_one_project: bool = False
    ) -> str:
        """What each group is told apart by, the names of its sums, and the sums."""
        # the days are spelled out: a plan for any days would think them few
        cells = (
            f"usage_day WHERE day >= DATE '{self.first}' AND day < DATE '{self.until}'"
            f" AND amount <> 0{conditions}"
        )
        keys = [f"{self._column(name)} AS key_{n}" for n, name in enumerate(groups)]
        if "day" not in groups or not (is_one_project or "project" in groups):
            # else hardly any two would be of one sum: a group is the table's key but for region and type
            grouped = ", ".join(str(n + 1) for n in range(len(keys) + 2))
            cells = (
                f"(SELECT {', '.join([*keys, 'resource_type', 'measure'])}, sum(amount) AS amount"  # noqa: S608  constants of this module
                f" FROM {cells} GROUP BY {grouped}) AS cells"
            )
            keys = [f"key_{n}" for n in range(len(keys))]
        grouped = ", ".join(str(n + 1) for n in range(len(keys)))
        return f"SELECT {', '.join([*keys, _SUMS])} FROM {cells}" + (  # noqa: S608  constants of this module
            f" GROUP BY {grouped}" if grouped else ""
        )

    def _column(self, group: str) -> str:
        if group != SLICE:
            return _COLUMN[group]
        edges = ", ".join(f"'{edge}'" for edge in self.edges)
        return f"width_bucket(day, ARRAY[{edges}]::date[])"

    def _read(self, rows: Sequence[asyncpg.Record]) -> list[Summed]:
        known = {f"{item.resource_type}/{item.name}": item.name for item in self.measures}

        @cache
        def measures_of(text: str | None) -> tuple[list[str], bool]:
            """The measures, empty where one is not known any more, and whether each is known and there once."""
            names = [known.get(name, "") for name in text.split(",")] if text else []
            return names, "" not in names and len(set(names)) == len(names)

        def amounts(text: str | None, sums: Sequence[int]) -> dict[str, int]:
            names, are_clear = measures_of(text)
            if are_clear and 0 not in sums:
                return dict(zip(names, sums, strict=True))
            counted: Counter[str] = Counter()
            for name, amount in zip(names, sums, strict=True):
                counted[name] += amount
            return {name: amount for name, amount in counted.items() if name and amount}

        place = len(self.groups)
        # what is not grouped has its row even if there is nothing: its texts are null
        texts = [row[place + 1] or "" for row in rows]
        numbers = json.loads(f"[[{'],['.join(texts)}]]") if texts else []
        shown = [_shown(name, [row[n] for row in rows]) for n, name in enumerate(self.groups)]
        keys = zip(*shown, strict=True) if shown else [()] * len(rows)
        return [
            (dict(zip(self.groups, key, strict=True)), amounts(row[place], sums))
            for row, key, sums in zip(rows, keys, numbers, strict=True)
        ]

    def _values(self, after: Sequence[str]) -> list[Value]:
        """A group that a marker names as the database has it."""
        try:
            return [
                datetime.fromisoformat(text).date() if name in BUCKETS else text
                for name, text in zip(self.groups, after, strict=True)
            ]
        except ValueError as exc:
            raise BadMarker("the marker is not one of this list's") from exc


def _shown(group: str, values: Sequence[Value]) -> list[str | None]:
    """What a group is called in each of some rows."""
    if group in BUCKETS:
        spelled = {day: f"{day}T00:00:00" for day in set(values)}
        return [spelled[day] for day in values]
    return [str(value) or None for value in values]
