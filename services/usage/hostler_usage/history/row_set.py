"""The rows of some resources in one table are exactly these: what differs is written, the rest not touched."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import orjson

from hostler_common import db
from hostler_usage.reading.statement import ResourceKey, ResourceType

Row = tuple[object, ...]


def key_columns(keys: Sequence[ResourceKey]) -> tuple[list[str], list[str], list[str]]:
    """Keys as the three arrays that statements unnest."""
    return (
        [key.region for key in keys],
        [str(key.resource_type) for key in keys],
        [key.resource_id for key in keys],
    )


def key_of(row: Row) -> ResourceKey:
    """The resource a row belongs to: its first three columns."""
    region, resource_type, resource_id = row[:3]
    return ResourceKey(
        region=str(region),
        resource_type=ResourceType(str(resource_type)),
        resource_id=str(resource_id),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """The rows that were deleted, and those that were inserted."""

    removed: Sequence[Row]
    added: Sequence[Row]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSet:
    """A table whose key begins with region, resource_type and resource_id.

    `columns` are names and types in the table's order, the first `key_length` of them its key;
    `condition` restricts it to the rows that belong to the set.
    """

    table: str
    columns: tuple[tuple[str, str], ...]
    key_length: int
    condition: str = "TRUE"

    async def replace(
        self, connection: db.Connection, keys: Sequence[ResourceKey], wanted: Iterable[Row]
    ) -> Change:
        """The rows of `keys` are the `wanted` ones afterwards. Runs in the caller's transaction."""
        rows = {row[: self.key_length]: row for row in wanted}
        names = ", ".join(f"t.{name}" for name, _ in self.columns)
        found = await connection.fetch(
            f"SELECT {names} FROM unnest($1::text[], $2::text[], $3::text[])"  # noqa: S608  constants of the set
            "  AS k (region, resource_type, resource_id)"
            f" JOIN {self.table} t USING (region, resource_type, resource_id)"
            f" WHERE {self.condition}",
            *key_columns(keys),
        )
        present = {row[: self.key_length]: row for row in (tuple(record) for record in found)}
        removed = [row for key, row in present.items() if rows.get(key) != row]
        added = [row for key, row in rows.items() if present.get(key) != row]
        await self._delete(connection, removed)
        await self.insert(connection, added)
        return Change(removed=removed, added=added)

    async def _delete(self, connection: db.Connection, rows: Sequence[Row]) -> None:
        if not rows:
            return
        key = self.columns[: self.key_length]
        names = ", ".join(name for name, _ in key)
        await connection.execute(
            f"DELETE FROM {self.table} WHERE ({names}) IN (SELECT * FROM unnest({_places(key)}))",  # noqa: S608  constants of the set
            *zip(*(row[: self.key_length] for row in rows), strict=True),
        )

    async def insert(self, connection: db.Connection, rows: Sequence[Row]) -> None:
        """The rows are there; none of their keys was."""
        if not rows:
            return
        names = ", ".join(name for name, _ in self.columns)
        values = ", ".join(
            f"{name}::jsonb" if kind == "jsonb" else name for name, kind in self.columns
        )
        is_json = [kind == "jsonb" for _, kind in self.columns]
        texts = [
            [
                orjson.dumps(value).decode() if is_text else value
                for value, is_text in zip(row, is_json, strict=True)
            ]
            for row in rows
        ]
        await connection.execute(
            f"INSERT INTO {self.table} ({names}) SELECT {values}"  # noqa: S608  constants of the set
            f" FROM unnest({_places(self.columns)}) AS row ({names})",
            *zip(*texts, strict=True),
        )


def _places(columns: Iterable[tuple[str, str]]) -> str:
    return ", ".join(
        f"${number}::{'text' if kind == 'jsonb' else kind}[]"
        for number, (_, kind) in enumerate(columns, start=1)
    )
