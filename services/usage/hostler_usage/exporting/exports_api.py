"""Whole tables over HTTP: usage, intervals and FOCUS charges as CSV, NDJSON or Parquet.

An answer is written while it is read: memory does not grow with the rows, and an answer that cannot be
finished is cut off (its last chunk is missing), so that half a table never looks whole. What can be
refused is refused before the first byte. In usage and intervals as CSV, text that a spreadsheet
would take for a formula gets an apostrophe (see `export`); `guard=false` leaves text as it is. FOCUS
files are never guarded: the specification wants text as it was.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from datetime import timedelta
from typing import Annotated, Final, Literal

from fastapi import APIRouter, Path, Query
from fastapi.responses import StreamingResponse
from pydantic import AwareDatetime
from starlette.types import Receive, Scope, Send

from hostler_common import auth, errors, http
from hostler_usage.exporting import export, export_parquet, focus
from hostler_usage.exporting.corrections import correction_charges
from hostler_usage.exporting.export_store import Snapshot
from hostler_usage.exporting.exports import MOST_AT_ONCE, Exports, focus_charges
from hostler_usage.history.report_store import UsageFilter
from hostler_usage.windows import WindowInvalid, window

MOST_FOCUS: Final = timedelta(days=400)


class ParquetMissing(errors.Invalid):
    """This installation cannot write Parquet."""

    code = "usage.export.parquet_missing"


class ExportsBusy(errors.TooMany):
    """As many exports are being written as may be at once."""

    code = "usage.export.busy"
    retry_after_seconds = 30


ExportsDep = Annotated[Exports, http.state("exports")]
Name = Annotated[str | None, Query(max_length=255, pattern=r"^[^\x00]*$")]
PriceBookName = Annotated[
    str | None, Query(max_length=255, pattern=r"^[^\x00]*$", description="costs are by this book")
]
Guard = Annotated[
    bool, Query(description="CSV: an apostrophe before text that would be a formula")
]
TextFormat = Annotated[Literal["csv", "ndjson", "parquet"], Path()]
router = APIRouter(
    prefix="/v1/exports", tags=["exports"], dependencies=[auth.require(auth.Role.READER)]
)
_FILES: Final[dict[int | str, dict[str, object]]] = {
    200: {
        "description": "The file, as it is written",
        "content": {
            "text/csv": {},
            "application/x-ndjson": {},
            export_parquet.Parquet.media_type: {},
        },
    }
}


@router.get(
    "/usage.{file_format}",
    operation_id="export_usage",
    response_class=StreamingResponse,
    responses=_FILES,
)
async def export_usage(
    file_format: TextFormat,
    exports: ExportsDep,
    caller: auth.Caller,
    start: AwareDatetime,
    end: AwareDatetime,
    group_by: Annotated[
        list[str] | None, Query(description="project, resource, day, ...: several with commas")
    ] = None,
    project_id: Name = None,
    region: Name = None,
    resource_type: Name = None,
    resource_id: Name = None,
    guard: Guard = True,
) -> StreamingResponse:
    """Usage in a window: a row for each group and each measure it used."""
    asked = window(start, end)
    groups = list(dict.fromkeys(one for text in group_by or [] for one in text.split(",") if one))
    where = _filter(caller, project_id, region, resource_type, resource_id)

    async def rows(snapshot: Snapshot) -> AsyncGenerator[Sequence[export.Row]]:
        async for lines in snapshot.usage(asked, groups, where):
            yield [export.usage_row(line) for line in lines]

    encoder = _encoder(file_format, export.usage_columns(groups), guard=guard)
    return await _file(exports, rows, encoder, f"usage.{file_format}")


@router.get(
    "/intervals.{file_format}",
    operation_id="export_intervals",
    response_class=StreamingResponse,
    responses=_FILES,
)
async def export_intervals(
    file_format: TextFormat,
    exports: ExportsDep,
    caller: auth.Caller,
    start: AwareDatetime,
    end: AwareDatetime,
    project_id: Name = None,
    region: Name = None,
    resource_type: Name = None,
    resource_id: Name = None,
    guard: Guard = True,
) -> StreamingResponse:
    """The intervals that have part in a window, whole, with the messages that each rests on."""
    asked = window(start, end)
    where = _filter(caller, project_id, region, resource_type, resource_id)

    async def rows(snapshot: Snapshot) -> AsyncGenerator[Sequence[export.Row]]:
        async for lines in snapshot.intervals(asked.start, asked.end, where):
            yield [export.interval_row(line) for line in lines]

    encoder = _encoder(file_format, export.INTERVAL_COLUMNS, guard=guard)
    return await _file(exports, rows, encoder, f"intervals.{file_format}")


@router.get(
    "/focus.{file_format}",
    operation_id="export_focus",
    response_class=StreamingResponse,
    responses=_FILES,
)
async def export_focus(
    file_format: Annotated[Literal["csv", "parquet"], Path()],
    exports: ExportsDep,
    caller: auth.Caller,
    start: AwareDatetime,
    end: AwareDatetime,
    price_book: PriceBookName = None,
    project_id: Name = None,
    region: Name = None,
    resource_type: Name = None,
    corrections: Annotated[
        bool,
        Query(
            description="also the adjustments to closed months that were written in the window, as"
            ' rows of ChargeClass "Correction": for who keeps each month\'s file as it was when the'
            " month closed"
        ),
    ] = False,
) -> StreamingResponse:
    """Charges in the columns of FOCUS 1.2: a row for each resource, measure and day in UTC.

    Without a price book all costs are 0, and columns of unit prices are left out. With a book that has
    tiers or rounds up, a project's rows are rated together: memory then grows with those. All rows but
    corrections say what is known now: a file of a closed month that is made again holds them already.
    """
    asked = window(start, end)
    if asked.start.microsecond or asked.end.microsecond:
        raise WindowInvalid("a FOCUS charge period begins and ends on a whole second")
    if asked.end - asked.start > MOST_FOCUS:
        raise WindowInvalid(f"a FOCUS file spans {MOST_FOCUS.days} days at most")
    where = _filter(caller, project_id, region, resource_type, None)
    pricing = await exports.pricing(price_book, caller)
    issuer = exports.issuer
    is_priced = pricing is not None

    async def rows(snapshot: Snapshot) -> AsyncGenerator[Sequence[export.Row]]:
        if corrections:  # first: they may be refused
            async with aclosing(
                correction_charges(snapshot, asked, where, pricing, issuer.currency)
            ) as late:
                async for changes in late:
                    yield [focus.row(charge, issuer, priced=is_priced) for charge in changes]
        async for charges in focus_charges(snapshot, asked, where, pricing, issuer.currency):
            yield [focus.row(charge, issuer, priced=is_priced) for charge in charges]

    encoder = _encoder(file_format, focus.columns(priced=is_priced), guard=False)
    return await _file(exports, rows, encoder, f"focus.{file_format}", has_corrections=corrections)


def _filter(
    caller: auth.Principal,
    project_id: str | None,
    region: str | None,
    resource_type: str | None,
    resource_id: str | None,
) -> UsageFilter:
    return UsageFilter(
        scope=caller.projects,
        project_id=project_id,
        region=region,
        resource_type=resource_type,
        resource_id=resource_id,
    )


def _encoder(file_format: str, columns: Sequence[export.Column], *, guard: bool) -> export.Encoder:
    match file_format:
        case "csv":
            return export.Csv(columns, guard=guard)
        case "ndjson":
            return export.Ndjson(columns)
        case _:
            try:
                return export_parquet.Parquet(columns)
            except export_parquet.PyarrowMissing as exc:
                raise ParquetMissing(str(exc)) from exc


Rows = Callable[[Snapshot], AsyncGenerator[Sequence[export.Row]]]


async def _file(
    exports: Exports,
    rows: Rows,
    encoder: export.Encoder,
    name: str,
    *,
    has_corrections: bool = False,
) -> StreamingResponse:
    """The answer that is the file. What fails before the first rows are read is raised here."""
    pieces = _pieces(exports, rows, encoder, has_corrections=has_corrections)
    first = await anext(pieces)
    return _Download(
        first,
        pieces,
        media_type=encoder.media_type,
        headers={"Content-Disposition": f'attachment; filename="{name}"'},
    )


async def _pieces(
    exports: Exports, rows: Rows, encoder: export.Encoder, *, has_corrections: bool
) -> AsyncGenerator[bytes]:
    if exports.slots.locked():
        raise ExportsBusy(f"{MOST_AT_ONCE} exports are being written: try again when one is done")
    async with (
        exports.slots,
        exports.store.snapshot(has_corrections=has_corrections) as snapshot,
        aclosing(rows(snapshot)) as batches,
    ):
        async for batch in batches:
            # formatting takes processor time, pyarrow's a lot of it: others are served meanwhile
            yield await asyncio.to_thread(encoder.batch, batch)
    yield encoder.end()


class _Download(StreamingResponse):
    """Streams its pieces, and closes what they are read from whatever becomes of the caller."""

    def __init__(
        self,
        first: bytes,
        rest: AsyncGenerator[bytes],
        *,
        media_type: str,
        headers: Mapping[str, str],
    ) -> None:
        async def pieces() -> AsyncIterator[bytes]:
            yield first
            async for piece in rest:
                if piece:
                    yield piece

        super().__init__(pieces(), media_type=media_type, headers=headers)
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._rest):
            await super().__call__(scope, receive, send)
