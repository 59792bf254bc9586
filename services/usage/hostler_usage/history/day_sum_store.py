"""Usage by what sums of whole days know, read in the order of its groups and no further than a page goes.

Whole days are answered by their sums. What else a window has, a day that it begins or ends within or that is not
summed up yet, is summed up from the facts of that time alone, in rows of the same shape.

The key of `usage_day` begins with the project and then the day. Where a page's first group is one of these, so many
of them are looked at as the page is likely to need, and more while it is not full: what it costs grows with its
rows, not with the projects behind them nor with the years before.

A group comes from the database as two texts: the names of its sums, and the sums. Most groups of an answer have the
same names, which are then read once, and all sums of a batch are one piece of JSON. A row a sum, or a column a
measure, would cost both sides several times as much.
"""

import asyncio
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from functools import cache
from typing import Final

import asyncpg

from hostler_common import db
from hostler_usage.history import usage_sql
from hostler_usage.history.paging import BadMarker, Conditions
from hostler_usage.history.project_order_store import projects_from
from hostler_usage.history.summed_days import Span
from hostler_usage.history.usage_row import UsageRow
from hostler_usage.reading.mapping import Measure
from hostler_usage.reading.times import MICROSECOND

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
# then whoever else asks has a turn: to read and show these takes about a millisecond
_ROWS_A_TURN: Final = 250
_ROWS_A_BATCH: Final = 1000
_READING_SECONDS: Final = 600.0  # until the first rows come everything has been grouped
# both go over the same rows in the same order
_SUMS: Final = (
    "string_agg(resource_type || '/' || measure, ',') AS names,"
    " string_agg(amount::text, ',') AS sums"
)
_NAMED: Final = "string_agg(of_type || '/' || name, ',') AS names, string_agg(trunc(amount)::text, ',') AS sums"
_DAY: Final = timedelta(days=1)

Value = str | date
"""What a group is told apart by, as the database has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DaySums:
    """The usage of some stretches `[first, until)` of UTC days, all of which are summed up, and of the spans `rest`.

    None does not restrict. `groups` are some of `GROUPS`, at most one of them of time. Usage that is not
    grouped is one row, whatever there is. `edges` are the moments at which the slices begin, and the last
    one ends; none lies within a summed day. No span of `rest` has part in two groups of time, or two slices.
    """

    days: Sequence[tuple[date, date]]
    rest: Sequence[Span]
    groups: Sequence[str]
    measures: Sequence[Measure]
    projects: Sequence[str] | None = None
    region: str | None = None
    resource_type: str | None = None
    edges: Sequence[datetime] = ()

    async def page(
        self,
        connection: db.Connection,
        after: Sequence[str] | None,
        limit: int,
        take: Callable[[list[UsageRow]], None],
    ) -> bool:
        """Whether there are more than `limit` groups behind the group `after`; `take` has been given these, in order.

        It is given some at a time, while the database looks for the next.

        Raises:
            BadMarker: there can be no such group.
        """
        last = None if after is None else self._values(after)
        left = limit
        async with aclosing(self._batches(connection, last, limit + 1)) as batches:
            rows = await anext(batches, None)
            while rows is not None:
                following, failed = await asyncio.gather(
                    anext(batches, None),  # the database is asked before what it said is read
                    self._taken(rows[:left], take),
                    return_exceptions=True,  # both are over, or closing would meet what still runs
                )
                if failed is not None:
                    raise failed
                if isinstance(following, BaseException):
                    raise following
                left -= len(rows)
                rows = following
        return left < 0

    async def _taken(
        self, rows: Sequence[asyncpg.Record], take: Callable[[list[UsageRow]], None]
    ) -> None:
        """`take` has been given these, in turn with whatever else there is to do.

        A thread would wait for the loop, and the loop for the thread, as long as either takes for a turn.
        """
        for first in range(0, len(rows), _ROWS_A_TURN):
            take(self._read(rows[first : first + _ROWS_A_TURN]))
            await asyncio.sleep(0)

    async def all(self, connection: db.Connection) -> AsyncGenerator[list[UsageRow]]:
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
                at_once = -(-_ROWS_A_PART // self._most_a_project)
                known = projects_from(
                    connection,
                    "" if last is None else str(last[0]),
                    -(-limit // self._most_a_project),
                    among=self.projects,
                    are_summed=not self.rest,
                )
                async with aclosing(known) as batches:
                    async for names in batches:
                        for first in range(0, len(names), at_once):
                            yield self._of_projects(names[first : first + at_once], last)
            case "day":
                begin, end = self._reach
                days = 1
                if last is not None and isinstance(last[0], date):
                    begin = max(begin, last[0])
                while begin < end:
                    until = min(begin + timedelta(days=days), end)
                    yield self._within(begin, until)._statement(last)
                    begin, days = until, 2 * days
            case _:
                yield self._statement(last)

    @property
    def _reach(self) -> tuple[date, date]:
        """The first day of which anything may be, and the one behind the last."""
        firsts = [first for first, _ in self.days] + [_day(start) for start, _ in self.rest]
        lasts = [last for _, last in self.days] + [_day(start) + _DAY for start, _ in self.rest]
        return min(firsts), max(lasts)

    def _within(self, first: date, until: date) -> "DaySums":
        """The same of no other days."""
        days = [(max(first, one), min(until, other)) for one, other in self.days]
        return replace(
            self,
            days=[(one, other) for one, other in days if one < other],
            rest=[(start, end) for start, end in self.rest if first <= _day(start) < until],
        )

    @property
    def _most_a_project(self) -> int:
        """How many groups a project has at most, where it has one region and one type of resources."""
        first, until = self._reach
        if "day" in self.groups:
            return (until - first).days
        if "month" in self.groups:
            return 12 * (until.year - first.year) + 12
        return 1

    def _statement(self, last: Sequence[Value] | None) -> tuple[str, Sequence[object]]:
        """What asks for the groups behind `last`, in order."""
        conditions = self._conditions()
        conditions.add("project_id = ANY({})", self.projects)
        clause, values = conditions.also, Conditions(*conditions.values)
        beyond = "" if last is None else f"({', '.join(values.value(part) for part in last)})"

        def behind(columns: Sequence[str]) -> str:
            return f"({', '.join(columns)}) > {beyond}" if beyond else "TRUE"

        selected = []
        if self.days:
            columns = [self._column(name) for name in self.groups]
            selected.append(self._of_days(self.groups, f"{clause} AND {behind(columns)}"))
        if self.rest:
            columns = [_rest_column(name) for name in self.groups]
            selected.append(self._of_rest(self.groups, clause, behind(columns)))
        query = self._together(selected)
        order = ", ".join(str(n + 1) for n in range(len(self.groups)))
        return query + (f" ORDER BY {order}" if order else ""), values.values

    def _of_projects(
        self, names: Sequence[str], last: Sequence[Value] | None
    ) -> tuple[str, Sequence[object]]:
        """The same of projects in this order, each of which is looked up by itself.

        Asked for all of them at once, the planner likes to read the days of all projects there are.
        """
        conditions, rest = self._conditions(), self.groups[1:]
        values = Conditions(*conditions.values)
        asked = (
            f"unnest({values.value(names)}::text[]) WITH ORDINALITY AS asked (project_id, place)"
        )
        keys = ["project_id", *(f"key_{n}" for n in range(len(rest)))]
        selected = []
        if self.days:
            days = self._of_days(
                rest, f" AND project_id = asked.project_id{conditions.also}", is_one_project=True
            )
            if not rest:
                days += " HAVING count(*) > 0"
            selected.append(
                f"SELECT asked.place, asked.project_id, sums.* FROM {asked}"  # noqa: S608  constants of this module
                f" CROSS JOIN LATERAL ({days}) AS sums"
            )
        if self.rest:
            # few rows of each, and found for all at once: to look them up one by one takes longer
            known = f"project_id = ANY({values.value(names)})"
            if "" in names and self.projects is None:
                known = f"({known} OR project_id IS NULL)"
            facts = self._of_rest(self.groups, f"{conditions.also} AND {known}", "TRUE")
            found = ", ".join(f"found.key_{n + 1} AS key_{n}" for n in range(len(rest)))
            selected.append(
                f"SELECT asked.place, asked.project_id{found and f', {found}'}, names, sums"  # noqa: S608  constants of this module
                f" FROM ({facts}) AS found JOIN {asked} ON asked.project_id = found.key_0"
            )
        if last is not None:
            compared = ", ".join(values.value(part) for part in last)
            values.add(f"({', '.join(keys)}) > ({compared})")
        texts = "names, sums"
        if len(selected) > 1 and self._do_meet:
            texts = "string_agg(names, ',') AS names, string_agg(sums, ',') AS sums"
        order = ", ".join(("place", *keys[1:]))
        return (
            f"SELECT {', '.join(keys)}, {texts} FROM ({' UNION ALL '.join(selected)}) AS found"  # noqa: S608  constants of this module
            f" {values.clause}"
            + (f" GROUP BY {order}, project_id" if texts != "names, sums" else "")
            + f" ORDER BY {order}"
        ), values.values

    def _together(self, selected: Sequence[str]) -> str:
        """The groups of all of these, each of them once."""
        united = " UNION ALL ".join(selected)
        if len(selected) == 1 or not self._do_meet:
            return united
        keys = [f"key_{n}" for n in range(len(self.groups))]
        columns = [*keys, "string_agg(names, ',') AS names", "string_agg(sums, ',') AS sums"]
        return f"SELECT {', '.join(columns)} FROM ({united}) AS found" + (  # noqa: S608  constants of this module
            f" GROUP BY {', '.join(keys)}" if keys else ""
        )

    @property
    def _do_meet(self) -> bool:
        """Whether summed days and the rest may be of one group."""
        return "day" not in self.groups

    def _conditions(self) -> Conditions:
        conditions = Conditions()
        conditions.add("region = {}", self.region)
        conditions.add("resource_type = {}", self.resource_type)
        return conditions

    def _of_days(self, groups: Sequence[str], clause: str, *, is_one_project: bool = False) -> str:
        """What each group is told apart by, the names of its sums, and the sums: of whole days."""
        # the days are spelled out: a plan for any days would think them few
        among = " OR ".join(
            f"(day >= DATE '{first}' AND day < DATE '{until}')" for first, until in self.days
        )
        cells = f"usage_day WHERE ({among}) AND amount <> 0{clause}"
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

    def _of_rest(self, groups: Sequence[str], clause: str, behind: str) -> str:
        """The same of the rest: of the facts that meet the clause, those whose groups are `behind` others."""
        facts = " UNION ALL ".join(
            f"SELECT facts.*, {self._part(start)} AS part FROM ("  # noqa: S608  constants of this module
            + usage_sql.facts(
                clause,
                None,
                "",
                start=_spelled(start),
                end=_spelled(end),
                has_states=False,
                is_brief=True,
            )
            + ") AS facts"
            for start, end in self.rest
        )
        columns, named = usage_sql.named(self.measures)
        keys = [f"key_{n}" for n in range(len(groups))]
        selected = [f"{_rest_column(name)} AS key_{n}" for n, name in enumerate(groups)]
        kinds = ", ".join([*keys, "resource_type", "counter"])
        summed = (
            f"SELECT {', '.join([*selected, 'resource_type', 'counter', *columns])}"  # noqa: S608  constants of this module, names of the mapping
            f" FROM ({facts}) AS facts WHERE {behind} GROUP BY {kinds}"
        )
        return f"SELECT {', '.join([*keys, _NAMED])} FROM ({summed}) AS kinds{named}" + (  # noqa: S608  the same
            f" GROUP BY {', '.join(keys)}" if keys else ""
        )

    def _part(self, start: datetime) -> str:
        """The group of time, or the slice, of what is of the span that starts then."""
        day = _day(start)
        if SLICE in self.groups:
            return str(bisect_right(self.edges, start))
        if "month" in self.groups:
            day = day.replace(day=1)
        return f"DATE '{day}'"

    def _column(self, group: str) -> str:
        if group != SLICE:
            return _COLUMN[group]
        # a day is behind an edge if its begin is not before it
        edges = ", ".join(f"'{_day(edge + _DAY - MICROSECOND)}'" for edge in self.edges)
        return f"width_bucket(day, ARRAY[{edges}]::date[])"

    def _read(self, rows: Sequence[asyncpg.Record]) -> list[UsageRow]:
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
            UsageRow(dict(zip(self.groups, key, strict=True)), amounts(row[place], sums), None)
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


def _rest_column(group: str) -> str:
    """What facts of the rest are told apart by."""
    if group in BUCKETS or group == SLICE:
        return "part"
    return "coalesce(project_id, '')" if group == "project" else _COLUMN[group]


def _day(moment: datetime) -> date:
    return moment.astimezone(UTC).date()


def _spelled(moment: datetime) -> str:
    """A moment in a statement: as with days, a plan for any would think what is of it little."""
    return f"TIMESTAMPTZ '{moment.astimezone(UTC).isoformat()}'"
