"""Budgets and quotas: how much may be used in a period, how far that is used up, and what it will come to.

A budget is a document. It is for some projects together, for a user, or for a dated group of
projects; its limit is money by a price book, or an amount of a measure; it begins anew with each
calendar period, or counts one fixed window.

    subject: {projects: [p1, p2]}      # or {user: u1}, or {group: {kind: cost_center, name: research}}
    limit: {amount: 1500, price_book: default}     # or {amount: 20000, measure: vcpu_hours}
    period: month                      # day, week, month; or {from: 2026-01-01, until: 2027-01-01}
    time_zone: Europe/Berlin           # UTC if absent
    thresholds: [50, 80, 100]          # percent; these if absent

Everything here is exact and pure; what was used is an argument.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from fractions import Fraction
from itertools import pairwise
from typing import Final

from hostler_usage.history.calendar_span import Span, ZoneUnknownError, begin, following, zone
from hostler_usage.history.measures import MICROSECONDS_PER_HOUR
from hostler_usage.money.document import Fields
from hostler_usage.money.price_book import DIMENSION, NAME
from hostler_usage.reading.mapping import Measure
from hostler_usage.reading.times import microseconds

KIND: Final = DIMENSION
FORECAST_FROM: Final = timedelta(days=7)
_THRESHOLDS: Final = (50, 80, 100)


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """That a project belongs to a group of a kind in `[start, end)`; `end` is None while it does."""

    kind: str
    group: str
    project: str
    start: datetime
    end: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """Whose use is counted: of some projects together, of a user, or of a group of projects."""

    projects: frozenset[str] = frozenset()
    user: str | None = None
    group_kind: str | None = None
    group: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """How much there is: in a price book's currency, or of a measure, in unit-hours or units moved."""

    amount: Fraction
    price_book: str | None = None
    measure: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Period:
    """`[start, end)`, in which a budget is used up."""

    start: datetime
    end: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """One budget. It recurs with `span`, or has one `fixed` period."""

    name: str
    subject: Subject
    limit: Limit
    span: Span | None
    fixed: Period | None
    time_zone: tzinfo
    thresholds: tuple[int, ...]

    def period(self, moment: datetime) -> Period | None:
        """The period that holds `moment`; None where a fixed one does not."""
        if self.fixed is not None:
            return self.fixed if self.fixed.start <= moment < self.fixed.end else None
        assert self.span is not None
        return Period(
            start=begin(moment, self.span, self.time_zone),
            end=following(moment, self.span, self.time_zone),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """How far a budget is used up at `as_of`, in its limit's unit; `left` is negative beyond it."""

    period: Period
    as_of: datetime
    limit: Fraction
    consumed: Fraction
    left: Fraction
    forecast: Fraction
    crossed: tuple[int, ...]


def budget(name: str, document: object, measures: Mapping[str, Measure] | None = None) -> Budget:
    """The budget that a document describes; with `measures`, one that is not of any other measure.

    Raises:
        DocumentError: with everything that is wrong with it, each fault by its path.
    """
    fields = Fields(document)
    place: tzinfo = UTC
    try:
        place = zone(fields.text("time_zone", default="UTC"))
    except ZoneUnknownError as exc:
        fields.fault("time_zone", str(exc))
    span, fixed = _period(fields, place)
    found = Budget(
        name=name,
        subject=_subject(fields),
        limit=_limit(fields, measures),
        span=span,
        fixed=fixed,
        time_zone=place,
        thresholds=_thresholds(fields),
    )
    fields.finish()
    return found


def _subject(fields: Fields) -> Subject:
    given = fields.mapping("subject")
    projects = given.texts("projects")
    user = given.text("user") if given.has("user") else None
    kind = group = None
    if given.has("group"):
        named = given.mapping("group")
        kind, group = named.text("kind", pattern=KIND), named.text("name")
        named.close()
    if sum((bool(projects), user is not None, group is not None)) != 1:
        fields.fault("subject", "must be one of projects, user and group")
    given.close()
    return Subject(projects=frozenset(projects), user=user, group_kind=kind, group=group)


def _limit(fields: Fields, measures: Mapping[str, Measure] | None) -> Limit:
    given = fields.mapping("limit")
    book = given.text("price_book", pattern=NAME) if given.has("price_book") else None
    measure = given.text("measure", pattern=DIMENSION) if given.has("measure") else None
    if (book is None) == (measure is None):
        fields.fault("limit", "must be by price_book, or of a measure")
    elif measure is not None and measures is not None and measure not in measures:
        given.fault("measure", "is none of the configured measures")
    limit = Limit(amount=given.number("amount"), price_book=book, measure=measure)
    given.close()
    return limit


def _period(fields: Fields, place: tzinfo) -> tuple[Span | None, Period | None]:
    if not fields.is_mapping("period"):
        return fields.choice("period", Span, default=Span.MONTH), None
    given = fields.mapping("period")
    start, end = given.moments(place)
    given.close()
    if start is None or end is None:
        fields.fault("period", "must have both from and until")
        return Span.MONTH, None
    return None, Period(start=start, end=end)


def _thresholds(fields: Fields) -> tuple[int, ...]:
    found = fields.wholes("thresholds", least=1, most=1000)
    if not found and not fields.has("thresholds"):
        return _THRESHOLDS
    if list(found) != sorted(set(found)) or not 0 < len(found) <= 20:
        fields.fault("thresholds", "must be 1 to 20 percentages, each more than the one before")
    return found


def amount_of(measure: Measure, amount: int) -> Fraction:
    """An amount as limits count it: in unit-hours of what was held, in units of what moved."""
    return Fraction(amount, MICROSECONDS_PER_HOUR if measure.is_held else 1)


def crossed(thresholds: Sequence[int], consumed: Fraction, limit: Fraction) -> tuple[int, ...]:
    """The thresholds, in percent of the limit, that are reached; of a limit of nothing all, by any use."""
    if not limit:
        return tuple(thresholds) if consumed > 0 else ()
    return tuple(percent for percent in thresholds if consumed * 100 >= percent * limit)


def forecast(consumed: Fraction, recent: Fraction, now: datetime, end: datetime) -> Fraction:
    """What will have been consumed at `end`, if use goes on as in `FORECAST_FROM` before `now`.

    Linear: `recent` is what was consumed in that time. Use that began within it counts as if it
    had been spread over all of it.
    """
    ahead = max(0, microseconds(end - now))
    return consumed + recent * Fraction(ahead, microseconds(FORECAST_FROM))


def state(
    of: Budget, period: Period, as_of: datetime, *, consumed: Fraction, recent: Fraction
) -> State:
    """How far a budget is used up, given what was consumed in `period` and lately (see `forecast`)."""
    return State(
        period=period,
        as_of=as_of,
        limit=of.limit.amount,
        consumed=consumed,
        left=of.limit.amount - consumed,
        forecast=forecast(consumed, recent, as_of, period.end),
        crossed=crossed(of.thresholds, consumed, of.limit.amount),
    )


def overlapping(memberships: Sequence[Membership]) -> tuple[Membership, Membership] | None:
    """Two memberships of one project and kind that have a moment in common; None where there are none."""
    ordered = sorted(memberships, key=lambda one: (one.kind, one.project, one.start))
    for one, other in pairwise(ordered):
        if (one.kind, one.project) == (other.kind, other.project) and (
            one.end is None or other.start < one.end
        ):
            return one, other
    return None
