"""HTTP of imports: bodies come as lines of a request and go the way that a broker's go.

Every line ends in exactly one of stored, duplicate, quarantined. A message id that comes to stand over
several messages is counted as a conflict besides.
"""

import asyncio
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Final, Protocol

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel

from hostler_common import auth, bus, errors, http, logs
from hostler_usage.reading.event import Event, Tally

log = logs.get(__name__)

MAX_LINES: Final = 2000
MAX_PLAIN_BYTES: Final = 16 * 1024 * 1024  # of a request once decompressed
ROUTING_KEY: Final = "import"  # where it was published to, nobody knows; this says how it came
_REASONS_SHOWN: Final = 100


class SourceUnknown(errors.NotFound):
    """No source of that name is configured, so that the region of its messages is not known."""

    code = "usage.import.source_unknown"


class BatchInvalid(errors.Invalid):
    """The request has more lines than are taken at once, or cannot be decompressed."""

    code = "usage.import.batch_invalid"


class BatchTooLarge(errors.HostlerError):
    """The request is larger than any that is meant, once decompressed."""

    code = "usage.import.batch_too_large"
    status = 413


class Intake(Protocol):
    """What stores a source's notifications: the consumer of its queue."""

    def read(self, delivery: bus.Delivery) -> Event:
        """The event in a delivery; raises `bus.Reject` where there is none."""

    async def keep(self, events: Sequence[Event]) -> Tally:
        """All of them are stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantined:
    """A line that holds no notification; lines count from 1."""

    line: int
    code: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of the lines of a batch."""

    tally: Tally
    quarantined: Sequence[Quarantined]


@dataclass(frozen=True, slots=True, kw_only=True)
class Importer:
    """Imports into every source that has messages of its own: `queues` and `intakes` are by its name.

    What is quarantined is replayed to the source's queue, like everything that came through it.
    """

    intakes: Mapping[str, Intake]
    queues: Mapping[str, str]
    quarantine: bus.Quarantine

    async def take(self, source: str, lines: Sequence[bytes]) -> Outcome:
        """Every line is stored or in quarantine when this returns, and safe to be sent again.

        Blank lines are no bodies.

        Raises:
            SourceUnknown: there is no such source; nothing was done.
            Unavailable: the database is away; what was done is done again with the next call.
        """
        intake = self.intakes.get(source)
        if intake is None:
            names = ", ".join(sorted(self.intakes))
            raise SourceUnknown(f"there is no source {source!r}, only {names}")
        bad: list[Quarantined] = []
        events: list[tuple[int, bus.Delivery, Event]] = []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            delivery = bus.Delivery(
                queue=self.queues[source],
                exchange="",
                routing_key=ROUTING_KEY,
                body=line,
                headers={},
                content_type="application/json",
            )
            try:
                events.append((number, delivery, intake.read(delivery)))
            except bus.Reject as exc:
                bad.append(await self._quarantine(number, delivery, exc))
            if number % 100 == 0:
                await asyncio.sleep(0)  # others are served meanwhile
        tally = await self._keep(intake, events, bad)
        return Outcome(tally=tally, quarantined=sorted(bad, key=lambda item: item.line))

    async def _keep(
        self,
        intake: Intake,
        events: Sequence[tuple[int, bus.Delivery, Event]],
        bad: list[Quarantined],
    ) -> Tally:
        """Store them all, halving what fails until the bad message stands alone, as the bus does."""
        if not events:
            return Tally()
        try:
            return await intake.keep([event for _, _, event in events])
        except errors.Unavailable:
            raise
        except Exception as exc:
            if len(events) == 1:
                number, delivery, _ = events[0]
                log.exception("import_failed", line=number)
                reject = bus.Reject(f"{type(exc).__name__}: {exc}", code="message.handler_failed")
                bad.append(await self._quarantine(number, delivery, reject))
                return Tally()
            half = len(events) // 2
            first = await self._keep(intake, events[:half], bad)
            return _sum(first, await self._keep(intake, events[half:], bad))

    async def _quarantine(
        self, number: int, delivery: bus.Delivery, reject: bus.Reject
    ) -> Quarantined:
        await self.quarantine.put(delivery, code=reject.code, reason=reject.reason)
        return Quarantined(line=number, code=reject.code, reason=reject.reason)


def _sum(one: Tally, other: Tally) -> Tally:
    return replace(
        one,
        stored=one.stored + other.stored,
        duplicate=one.duplicate + other.duplicate,
        conflict=one.conflict + other.conflict,
        unknown_type=one.unknown_type + other.unknown_type,
        problem=one.problem + other.problem,
    )


class QuarantinedLine(BaseModel):
    """A line that went to quarantine, counted from 1 with every line of the request."""

    line: int
    code: str
    reason: str


class ImportReport(BaseModel):
    """What became of the lines of an import: `lines` = `stored` + `duplicate` + `quarantined`.

    `conflict` are message ids that were seen at once to stand over several messages now,
    `unknown_type` and `problem` kinds of stored ones. Of the quarantined lines the first 100 are named.
    """

    lines: int
    stored: int
    duplicate: int
    conflict: int
    unknown_type: int
    problem: int
    quarantined: int
    quarantine: list[QuarantinedLine]


ImporterDep = Annotated[Importer, http.state("importer")]
router = APIRouter(prefix="/v1/imports", tags=["imports"])


@router.post(
    "",
    operation_id="import_notifications",
    dependencies=[auth.require(auth.Role.OPERATOR, every_project=True)],
    openapi_extra={
        "requestBody": {
            "required": True,
            "description": "A body of a notification a line, in either of oslo.messaging's"
            f" envelopes; {MAX_LINES} lines at most. `Content-Encoding: gzip` is understood.",
            "content": {"application/x-ndjson": {"schema": {"type": "string"}}},
        }
    },
)
async def import_notifications(
    request: Request,
    importer: ImporterDep,
    source: Annotated[str, Query(min_length=1, max_length=100)],
) -> ImportReport:
    """Store notifications as if the source's broker had delivered them. Safe to repeat."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    body = await request.body()
    if encoding == "gzip":
        body = await asyncio.to_thread(_decompressed, body)
    elif encoding != "identity":
        raise BatchInvalid(f"Content-Encoding {encoding[:40]!r} is not known; gzip is")
    lines = _lines(body)
    outcome = await importer.take(source, lines)
    tally = outcome.tally
    return ImportReport(
        lines=tally.stored + tally.duplicate + len(outcome.quarantined),
        stored=tally.stored,
        duplicate=tally.duplicate,
        conflict=tally.conflict,
        unknown_type=tally.unknown_type,
        problem=tally.problem,
        quarantined=len(outcome.quarantined),
        quarantine=[
            QuarantinedLine(**_fields(item)) for item in outcome.quarantined[:_REASONS_SHOWN]
        ],
    )


def _fields(item: Quarantined) -> dict[str, Any]:
    return {"line": item.line, "code": item.code, "reason": item.reason[:300]}


def _decompressed(body: bytes) -> bytes:
    stream = zlib.decompressobj(wbits=31)
    try:
        plain = stream.decompress(body, MAX_PLAIN_BYTES + 1)
    except zlib.error as exc:
        raise BatchInvalid(f"the request is no gzip: {exc}") from exc
    if len(plain) > MAX_PLAIN_BYTES:
        raise BatchTooLarge(f"a request may have {MAX_PLAIN_BYTES} bytes once decompressed")
    if not stream.eof or stream.unused_data:
        raise BatchInvalid("the request is not one whole gzip member")
    return plain


def _lines(body: bytes) -> list[bytes]:
    """The lines of a request; the last one need not end."""
    if body.count(b"\n") > MAX_LINES:
        raise BatchInvalid(f"a request may have {MAX_LINES} lines")
    lines = body.split(b"\n")
    if not lines[-1]:
        lines.pop()
    if len(lines) > MAX_LINES:
        raise BatchInvalid(f"a request may have {MAX_LINES} lines")
    return [line.removesuffix(b"\r") for line in lines]
