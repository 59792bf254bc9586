"""Tables as Parquet files, written as they come: needs the extra `hostler-usage[parquet]`.

Integers and decimals are decimals of 38 digits (integers of the ledger pass 64 bits), so that
nothing is lost; a value beyond that is an error and never a rounded number.
"""

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final

from hostler_usage.exporting.export import PLACES, Column, Kind, Row, Value, text

if TYPE_CHECKING:
    from types import ModuleType

DIGITS: Final = 38
SCALE: Final = PLACES  # of most decimals; 20 digits are left in front of the point
ROWS_A_GROUP: Final = 10_000


class PyarrowMissing(Exception):
    """pyarrow is not installed."""

    def __init__(self) -> None:
        super().__init__("Parquet needs pyarrow: install the extra hostler-usage[parquet]")


class Parquet:
    """The Parquet file of a table, in row groups of `ROWS_A_GROUP`.

    `batch` and `end` take processor time: call them where nothing else waits.

    Raises:
        PyarrowMissing: pyarrow is not installed.
        ValueError: a number has more digits than the file can hold.
    """

    media_type = "application/vnd.apache.parquet"

    def __init__(
        self,
        columns: Sequence[Column],
        *,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        arrow, parquet = _pyarrow()
        self._arrow = arrow
        self._columns = columns
        self._schema = arrow.schema(
            [arrow.field(column.name, self._type(column)) for column in columns],
            metadata=dict(metadata or {}),
        )
        self._sink = _Sink()
        self._writer = parquet.ParquetWriter(self._sink, self._schema, compression="zstd")
        self._waiting: list[Row] = []

    def batch(self, rows: Sequence[Row]) -> bytes:
        """The row groups that these rows fill."""
        self._waiting += rows
        while len(self._waiting) >= ROWS_A_GROUP:
            self._write(self._waiting[:ROWS_A_GROUP])
            del self._waiting[:ROWS_A_GROUP]
        return self._sink.take()

    def end(self) -> bytes:
        """The last row group and the footer."""
        if self._waiting:
            self._write(self._waiting)
        self._writer.close()
        return self._sink.take()

    def _write(self, rows: Sequence[Row]) -> None:
        arrays = [
            self._array(column, [row[n] for row in rows]) for n, column in enumerate(self._columns)
        ]
        self._writer.write_table(self._arrow.Table.from_arrays(arrays, schema=self._schema))

    def _array(self, column: Column, values: list[Value]) -> Any:  # noqa: ANN401  a pyarrow.Array
        try:
            return self._arrow.array(
                [self._plain(column.kind, value) for value in values], self._type(column)
            )
        except self._arrow.ArrowInvalid as exc:
            raise ValueError(f"{column.name} holds a number beyond {DIGITS} digits") from exc

    def _plain(self, kind: Kind, value: Value) -> object:
        match kind:
            case Kind.INTEGER | Kind.DECIMAL if isinstance(value, int | Decimal):
                return Decimal(value)
            case Kind.JSON if value is not None:
                return text(kind, value)
            case _:
                return value

    def _type(self, column: Column) -> Any:  # noqa: ANN401  a pyarrow.DataType
        arrow = self._arrow
        match column.kind:
            case Kind.INTEGER:
                return arrow.decimal128(DIGITS, 0)
            case Kind.DECIMAL:
                return arrow.decimal128(DIGITS, column.places)
            case Kind.BOOLEAN:
                return arrow.bool_()
            case Kind.TIME:
                return arrow.timestamp("us", tz="UTC")
            case _:
                return arrow.string()


def _pyarrow() -> tuple["ModuleType", "ModuleType"]:
    try:
        import pyarrow  # type: ignore[import-untyped]  # pyarrow has no types
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError as exc:
        raise PyarrowMissing from exc
    return pyarrow, pyarrow.parquet


class _Sink:
    """The file that pyarrow writes to: what it has written is taken away piece by piece."""

    closed = False

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._written = 0

    def write(self, data: bytes) -> int:
        piece = bytes(data)
        self._pieces.append(piece)
        self._written += len(piece)
        return len(piece)

    def tell(self) -> int:
        return self._written

    def flush(self) -> None: ...

    def close(self) -> None: ...

    def take(self) -> bytes:
        taken = b"".join(self._pieces)
        self._pieces.clear()
        return taken
