"""Price books, budgets and dated groups of projects, in SQL.

Documents are stored as they were given, without loss; what they mean is `price_book`'s and
`budget`'s. Which of them a caller may see is a condition inside the statement.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import asyncpg

from hostler_common import db, errors, outbox
from hostler_common.bus import Message
from hostler_usage.history.paging import Scope, visible_projects
from hostler_usage.money.budget import Membership


class PriceBookNotFound(errors.NotFound):
    """There is no such price book, or no such version, or none for the caller."""

    code = "usage.price_book.not_found"


class PriceBookChanged(errors.Conflict):
    """The book's version is not the one that was to be replaced."""

    code = "usage.price_book.changed"


class BudgetNotFound(errors.NotFound):
    """There is no such budget, or none that the caller may see."""

    code = "usage.budget.not_found"


class BudgetChanged(errors.Conflict):
    """The budget's version is not the one that was to be replaced."""

    code = "usage.budget.changed"


class MembershipsOverlap(errors.Conflict):
    """The project would be in two groups of a kind at a time."""

    code = "usage.project_group.overlap"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBook:
    """A version of a price book."""

    name: str
    version: int
    document: Mapping[str, Any]
    created_at: datetime
    created_by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBudget:
    """A budget as it is now."""

    name: str
    version: int
    document: Mapping[str, Any]
    updated_at: datetime
    updated_by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Audience:
    """Whose a budget is, for the statements that look for it."""

    projects: Sequence[str] | None
    user: str | None
    group_kind: str | None
    group: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """That a budget reached a threshold in a period; amounts as they are shown."""

    budget: str
    period_start: datetime
    period_end: datetime
    threshold: int
    crossed_at: datetime
    consumed: str
    limit: str


_BOOK: Final = "name, version, document, created_at, created_by"
_BUDGET: Final = "name, version, document, updated_at, updated_by"
# a budget of several projects, and of a group, is for those who may see all of them
_VISIBLE: Final = (
    "($1::text[] IS NULL OR projects <@ $1 OR (group_kind IS NOT NULL"
    " AND EXISTS (SELECT FROM project_group AS g WHERE (g.kind, g.name) = (group_kind, group_name))"
    " AND NOT EXISTS (SELECT FROM project_group AS g WHERE (g.kind, g.name) ="
    " (group_kind, group_name) AND g.project_id <> ALL ($1))))"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceStore:
    """All reading and writing of them."""

    pool: db.Pool

    # --- price books

    async def put_book(
        self, name: str, document: Mapping[str, Any], *, by: str, replaces: int | None
    ) -> StoredBook:
        """The newest version of the book says this: a new one, unless it said so already.

        Raises:
            PriceBookChanged: its newest version is not `replaces` (0: there is none yet).
            DatabaseUnavailable: the database is away.
        """
        async with db.transaction(self.pool) as connection:
            await _one_at_a_time(connection, f"price_book {name}")
            row = await connection.fetchrow(
                f"SELECT {_BOOK} FROM price_book WHERE name = $1"  # noqa: S608  a constant
                " ORDER BY version DESC LIMIT 1",
                name,
            )
            version = 0 if row is None else row["version"]
            if replaces not in (None, version):
                raise PriceBookChanged(f"the newest version of {name} is {version}")
            if row is None or row["document"] != document:
                row = await connection.fetchrow(
                    "INSERT INTO price_book (name, version, document, created_by)"  # noqa: S608  a constant
                    f" VALUES ($1, $2, $3, $4) RETURNING {_BOOK}",
                    name,
                    version + 1,
                    document,
                    by,
                )
        assert row is not None
        return StoredBook(**dict(row))

    async def book(self, name: str, version: int | None = None) -> StoredBook:
        """A version of a book; the newest one, where none is named.

        Raises:
            PriceBookNotFound: there is none.
            DatabaseUnavailable: the database is away.
        """
        async with db.connection(self.pool) as connection:
            row = await connection.fetchrow(
                f"SELECT {_BOOK} FROM price_book WHERE name = $1"  # noqa: S608  a constant
                " AND ($2::integer IS NULL OR version = $2) ORDER BY version DESC LIMIT 1",
                name,
                version,
            )
        if row is None:
            raise PriceBookNotFound(
                f"there is no price book {name}" + (f", version {version}" if version else "")
            )
        return StoredBook(**dict(row))

    async def books(
        self, *, public_only: bool, limit: int, marker: str | None
    ) -> tuple[list[StoredBook], str | None]:
        """A page of the books' newest versions, by name, and the marker of the next page.

        Raises:
            DatabaseUnavailable: the database is away.
        """
        async with db.connection(self.pool) as connection:
            rows = await connection.fetch(
                f"SELECT * FROM (SELECT DISTINCT ON (name) {_BOOK} FROM price_book"  # noqa: S608  a constant
                " WHERE name > $1 ORDER BY name, version DESC) AS newest"
                " WHERE NOT $2 OR document->'public' = 'true' ORDER BY name LIMIT $3",
                marker or "",
                public_only,
                limit,
            )
        found = [StoredBook(**dict(row)) for row in rows]
        return found, found[-1].name if len(found) == limit else None

    async def versions(
        self, name: str, *, limit: int, before: int | None
    ) -> tuple[list[StoredBook], int | None]:
        """A page of a book's versions, newest first, and the one that the next page is before.

        Raises:
            PriceBookNotFound: there is no such book.
            DatabaseUnavailable: the database is away.
        """
        async with db.connection(self.pool) as connection:
            rows = await connection.fetch(
                f"SELECT {_BOOK} FROM price_book WHERE name = $1"  # noqa: S608  a constant
                " AND ($2::integer IS NULL OR version < $2) ORDER BY version DESC LIMIT $3",
                name,
                before,
                limit,
            )
        if not rows and before is None:
            raise PriceBookNotFound(f"there is no price book {name}")
        found = [StoredBook(**dict(row)) for row in rows]
        return found, found[-1].version if len(found) == limit else None

    # --- budgets

    async def put_budget(
        self,
        name: str,
        document: Mapping[str, Any],
        audience: Audience,
        *,
        by: str,
        replaces: int | None,
    ) -> StoredBudget:
        """The budget is as the document says; its version grows, if that is news.

        Raises:
            BudgetChanged: its version is not `replaces` (0: there is none yet).
            DatabaseUnavailable: the database is away.
        """
        async with db.transaction(self.pool) as connection:
            await _one_at_a_time(connection, f"budget {name}")
            row = await connection.fetchrow(
                f"SELECT {_BUDGET} FROM budget WHERE name = $1",  # noqa: S608  a constant
                name,
            )
            version = 0 if row is None else row["version"]
            if replaces not in (None, version):
                raise BudgetChanged(f"the version of {name} is {version}")
            if row is None or row["document"] != document:
                row = await connection.fetchrow(
                    "INSERT INTO budget (name, version, document, projects, user_id,"  # noqa: S608  a constant
                    " group_kind, group_name, updated_by) VALUES ($1, $2, $3, $4, $5, $6, $7, $8)"
                    " ON CONFLICT (name) DO UPDATE SET version = $2, document = $3, projects = $4,"
                    " user_id = $5, group_kind = $6, group_name = $7, updated_by = $8,"
                    f" updated_at = now() RETURNING {_BUDGET}",
                    name,
                    version + 1,
                    document,
                    audience.projects,
                    audience.user,
                    audience.group_kind,
                    audience.group,
                    by,
                )
        assert row is not None
        return StoredBudget(**dict(row))

    async def delete_budget(self, name: str) -> None:
        """There is no such budget, and nothing is known of what it reached.

        Raises:
            BudgetNotFound: there was none.
            DatabaseUnavailable: the database is away.
        """
        async with db.connection(self.pool) as connection:
            gone = await connection.fetchval(
                "DELETE FROM budget WHERE name = $1 RETURNING name", name
            )
        if gone is None:
            raise BudgetNotFound(f"there is no budget {name}")

    async def budget(self, name: str, *, scope: Scope) -> StoredBudget:
        """One budget.

        Raises:
            BudgetNotFound: there is none that the caller may see.
            DatabaseUnavailable: the database is away.
        """
        async with db.connection(self.pool) as connection:
            row = await connection.fetchrow(
                f"SELECT {_BUDGET} FROM budget WHERE {_VISIBLE} AND name = $2",  # noqa: S608  constants
                visible_projects(scope),
                name,
            )
        if row is None:
            raise BudgetNotFound(f"there is no budget {name}")
        return StoredBudget(**dict(row))

    async def budgets(
        self, *, scope: Scope, limit: int, marker: str | None = None
    ) -> tuple[list[StoredBudget], str | None]:
        """A page of budgets, by name, and the marker of the next page.

        Raises:
            DatabaseUnavailable: the database is away.
        """
        async with db.connection(self.pool) as connection:
            rows = await connection.fetch(
                f"SELECT {_BUDGET} FROM budget WHERE {_VISIBLE} AND name > $2"  # noqa: S608  constants
                " ORDER BY name LIMIT $3",
                visible_projects(scope),
                marker or "",
                limit,
            )
        found = [StoredBudget(**dict(row)) for row in rows]
        return found, found[-1].name if len(found) == limit else None

    async def budgets_of(
        self, project: str, user: str | None, at: datetime
    ) -> list[tuple[StoredBudget, bool]]:
        """The budgets that use by this project and user at that moment counts in, by name.

        With each, whether all it counts is the project's own: others tell of other projects.

        Raises:
            DatabaseUnavailable: the database is away.
        """
        async with db.connection(self.pool) as connection:
            rows = await connection.fetch(
                f"SELECT {_BUDGET}, projects IS NOT DISTINCT FROM ARRAY[$1] AS is_own FROM budget"  # noqa: S608  a constant
                " WHERE $1 = ANY (projects) OR user_id = $2 OR EXISTS (SELECT FROM project_group"
                " AS g WHERE (g.kind, g.name, g.project_id) = (group_kind, group_name, $1)"
                " AND g.valid_from <= $3 AND (g.valid_until IS NULL OR g.valid_until > $3))"
                " ORDER BY name",
                project,
                user,
                at,
            )
        return [
            (StoredBudget(**{name: row[name] for name in _BUDGET.split(", ")}), row["is_own"])
            for row in rows
        ]

    async def crossings(self, periods: Iterable[tuple[str, datetime]]) -> list[Crossing]:
        """What was reached in these periods, each a budget's name and a start; least thresholds first.

        Raises:
            DatabaseUnavailable: the database is away.
        """
        wanted = list(periods)
        async with db.connection(self.pool) as connection:
            rows = await connection.fetch(
                "SELECT budget, period_start, period_end, threshold, crossed_at, consumed,"
                " limit_amount AS limit FROM budget_crossing WHERE (budget, period_start)"
                " IN (SELECT * FROM unnest($1::text[], $2::timestamptz[])) ORDER BY threshold",
                [name for name, _ in wanted],
                [start for _, start in wanted],
            )
        return [Crossing(**dict(row)) for row in rows]

    async def record_crossing(self, crossing: Crossing, message: Message) -> bool:
        """The crossing is known, and `message` will be published: both at once, and only once.

        False where it was known, or the budget is gone.

        Raises:
            DatabaseUnavailable: the database is away.
        """
        async with db.transaction(self.pool) as connection:
            try:
                is_new = await connection.fetchval(
                    "INSERT INTO budget_crossing (budget, period_start, period_end, threshold,"
                    " crossed_at, consumed, limit_amount) VALUES ($1, $2, $3, $4, $5, $6, $7)"
                    " ON CONFLICT DO NOTHING RETURNING true",
                    crossing.budget,
                    crossing.period_start,
                    crossing.period_end,
                    crossing.threshold,
                    crossing.crossed_at,
                    crossing.consumed,
                    crossing.limit,
                )
                if is_new:
                    await outbox.add(connection, [message])
            except asyncpg.ForeignKeyViolationError:
                return False
        return bool(is_new)

    async def forget_crossing(self, crossing: Crossing) -> None:
        """It is not known any more, unless it was recorded anew meanwhile.

        Raises:
            DatabaseUnavailable: nothing was changed.
        """
        async with db.connection(self.pool) as connection:
            await connection.execute(
                "DELETE FROM budget_crossing"
                " WHERE (budget, period_start, threshold, crossed_at) = ($1, $2, $3, $4)",
                crossing.budget,
                crossing.period_start,
                crossing.threshold,
                crossing.crossed_at,
            )

    # --- groups of projects

    async def put_memberships(
        self, kind: str, project: str, memberships: Iterable[Membership]
    ) -> None:
        """The project was and is in these groups of the kind, and in no others.

        Raises:
            MembershipsOverlap: two of them have a moment in common.
            DatabaseUnavailable: the database is away.
        """
        rows = [(kind, one.group, project, one.start, one.end) for one in memberships]
        async with db.transaction(self.pool) as connection:
            await _one_at_a_time(connection, f"project_group {kind} {project}")
            await connection.execute(
                "DELETE FROM project_group WHERE (kind, project_id) = ($1, $2)", kind, project
            )
            try:
                await connection.executemany(
                    "INSERT INTO project_group (kind, name, project_id, valid_from, valid_until)"
                    " VALUES ($1, $2, $3, $4, $5)",
                    rows,
                )
            except (asyncpg.ExclusionViolationError, asyncpg.UniqueViolationError) as exc:
                raise MembershipsOverlap(
                    f"{project} would be in two groups of kind {kind} at a time"
                ) from exc

    async def memberships(
        self,
        *,
        scope: Scope = None,
        kind: str | None = None,
        group: str | None = None,
        project: str | None = None,
        at: datetime | None = None,
        limit: int | None = None,
        after: Sequence[object] | None = None,
    ) -> list[Membership]:
        """Memberships in order of kind, project and time, those `after` one; None does not restrict.

        Raises:
            DatabaseUnavailable: the database is away.
        """
        async with db.connection(self.pool) as connection:
            rows = await connection.fetch(
                "SELECT kind, name, project_id, valid_from, valid_until FROM project_group"
                " WHERE ($1::text[] IS NULL OR project_id = ANY ($1))"
                " AND ($2::text IS NULL OR kind = $2) AND ($3::text IS NULL OR name = $3)"
                " AND ($4::text IS NULL OR project_id = $4) AND ($5::timestamptz IS NULL"
                " OR (valid_from <= $5 AND (valid_until IS NULL OR valid_until > $5)))"
                " AND ($6::text IS NULL OR (kind, project_id, valid_from) > ($6, $7, $8))"
                " ORDER BY kind, project_id, valid_from LIMIT $9",
                visible_projects(scope),
                kind,
                group,
                project,
                at,
                *(after or (None, None, None)),
                limit,
            )
        return [
            Membership(
                kind=row["kind"],
                group=row["name"],
                project=row["project_id"],
                start=row["valid_from"],
                end=row["valid_until"],
            )
            for row in rows
        ]

    async def membership_edges(self, kinds: Sequence[str], *, scope: Scope) -> set[datetime]:
        """The moments at which a project of the scope changes its group of one of the kinds.

        Raises:
            DatabaseUnavailable: the database is away.
        """
        if not kinds:
            return set()
        async with db.connection(self.pool) as connection:
            rows = await connection.fetch(
                "SELECT DISTINCT edge FROM project_group,"
                " unnest(ARRAY[valid_from, valid_until]) AS edge"
                " WHERE kind = ANY ($2) AND edge IS NOT NULL"
                " AND ($1::text[] IS NULL OR project_id = ANY ($1))",
                visible_projects(scope),
                list(kinds),
            )
        return {row["edge"] for row in rows}


async def _one_at_a_time(connection: db.Connection, what: str) -> None:
    """Until the transaction ends, whoever else writes this waits."""
    await connection.execute("SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", what)
