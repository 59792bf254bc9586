"""The projects that there is anything of, in order, and no more of them than a page needs.

From each project it goes straight to the next one in an index, whatever there is of it.
"""

from collections.abc import AsyncGenerator, Sequence
from typing import Final

from hostler_common import db

_OF: Final = (
    "WITH RECURSIVE known (project_id) AS ("
    "(SELECT project_id FROM {table} WHERE project_id {{}} $1 ORDER BY project_id LIMIT 1)"
    " UNION ALL SELECT (SELECT d.project_id FROM {table} AS d"
    " WHERE d.project_id > known.project_id ORDER BY d.project_id LIMIT 1)"
    " FROM known WHERE known.project_id IS NOT NULL)"
    " SELECT project_id FROM known WHERE project_id IS NOT NULL LIMIT $2"
)
_SUMMED: Final = _OF.format(table="usage_day")
# one of whose days none has ended is in no sum yet; where it is not known, its name is empty, as in the sums
_ANY: Final = (
    f"SELECT project_id FROM (({_SUMMED})"  # noqa: S608  constants of this module
    f" UNION ({_OF.format(table='usage_interval')})"
    f" UNION ({_OF.format(table='usage_amount')})"
    " UNION (SELECT '' WHERE '' {} $1 AND"
    "  (EXISTS (SELECT FROM usage_interval WHERE project_id IS NULL)"
    "   OR EXISTS (SELECT FROM usage_amount WHERE project_id IS NULL)))"
    ") AS known ORDER BY project_id LIMIT $2"
)
_GIVEN: Final = (
    "SELECT project_id FROM unnest($3::text[]) AS given (project_id) WHERE project_id {} $1"
    " ORDER BY project_id LIMIT $2"
)


async def projects_from(
    connection: db.Connection,
    first: str,
    number: int,
    *,
    among: Sequence[str] | None,
    are_summed: bool,
) -> AsyncGenerator[list[str]]:
    """So many projects from `first` on, then twice as many, and so on until there are no more.

    They are `among` these, or all there are. Those that only the facts know are left out where
    `are_summed`. A project that is not known is called "".
    """
    known = _SUMMED if are_summed else _ANY
    given: list[Sequence[str]] = []
    if among is not None:
        known, given = _GIVEN, [among]
    compared, beyond = ">=", first
    while rows := await connection.fetch(known.replace("{}", compared), beyond, number, *given):
        names = [row[0] for row in rows]
        yield names
        if len(names) < number:
            return
        # there was less of these than was hoped for: of the next there may be as little
        compared, beyond, number = ">", names[-1], 2 * number
