"""The fold: a set of observations of one resource becomes its history.

The history is a row of half-open intervals `[start, end)`, each with the attributes that held and
the messages that say so. It is a pure function of the *set* of observations: any order of arrival,
any number of copies, any batching gives the same intervals, so that history is simply made anew
when something arrives late.

Four rules make it so:

1. Moments that senders cut or round to seconds are settled first: those within a second of each
   other are one moment, and its finest spelling is the one that counts.
2. At one moment the observation of the highest rank wins, then the later event, then the larger
   message id: content decides, never arrival.
3. An audit that contradicts an event of the half hour before it is taken to be older than it looks;
   if it is right, the next one says so again.
4. Birth is the earliest moment the resource is known to have been in being; death is the earliest
   end of the most trusted kind. Nothing after a death is usage, but where ids return: there what is
   launched later lives anew. What held at birth but was lost is filled from the first observation
   that speaks of it.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from itertools import compress, groupby, pairwise
from operator import not_
from typing import Protocol, TypeVar

from hostler_usage.history.observation import Kind, Observation, Rank
from hostler_usage.reading import citation
from hostler_usage.reading.statement import Evidence, Scalar
from hostler_usage.reading.times import MICROSECOND, SAME_MOMENT

# audits read all their rows first and send for minutes: what an event has said since outranks them
AUDIT_IS_STALE = timedelta(minutes=30)


class Provenance(StrEnum):
    """What a history rests on."""

    EVENTS = "events"
    AUDIT = "audit"  # birth or death is known from evidence only: its own event was lost


class Anomaly(StrEnum):
    """What is odd about a history; counted, and no reason to stop billing the rest."""

    NEVER_OPENED = "never_opened"
    ENDED_BEFORE_BIRTH = "ended_before_birth"
    SEEN_AFTER_END = "seen_after_end"
    COUNTS_OVERLAP = "counts_overlap"  # of what moved, only what is certain counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A span during which nothing about a resource changed.

    `end` is None while it lasts. `opened_by` are the messages the attributes rest on, `closed_by`
    those that ended it; both in a fixed order.
    """

    start: datetime
    end: datetime | None
    attributes: Mapping[str, Scalar]
    opened_by: tuple[Evidence, ...]
    closed_by: tuple[Evidence, ...]
    provenance: Provenance


class _Span(Protocol):
    @property
    def start(self) -> datetime: ...
    @property
    def end(self) -> datetime | None: ...


SpanT = TypeVar("SpanT", bound=_Span)


def lives(spans: Sequence[SpanT]) -> list[Sequence[SpanT]]:
    """Spans in order of time, parted where one does not go on from the one before."""
    begun = [
        number
        for number, span in enumerate(spans)
        if not number or spans[number - 1].end != span.start
    ]
    return [spans[first:after] for first, after in pairwise([*begun, len(spans)])]


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """All that is known of one resource."""

    intervals: tuple[Interval, ...]
    anomalies: tuple[Anomaly, ...] = ()
    is_born_of_event: bool = False


def fold(observations: Iterable[Observation], *, ids_return: bool = False) -> History:
    """Return the history that a set of observations of one resource amounts to.

    With `ids_return`, what was told to have ended may begin again under the same id.
    """
    seen = set(observations)
    if not ids_return:
        return _life(seen)
    histories = [_life(life) for life in _parted(seen)]
    anomalies = (anomaly for history in histories for anomaly in history.anomalies)
    return History(
        intervals=tuple(item for history in histories for item in history.intervals),
        anomalies=tuple(dict.fromkeys(anomalies)),
        is_born_of_event=histories[0].is_born_of_event,
    )


def _parted(seen: Iterable[Observation]) -> list[list[Observation]]:
    """The observations of each life, of one at least: an end that an event told of closes it.

    The next one is opened by a launch, or by what shows it so much later that it cannot be stale.
    """
    told = [item for item in seen if _is_told_end(item)]
    others = [item for item in seen if not _is_told_end(item)]
    parts: list[list[Observation]] = [[]]
    cut: datetime | None = None
    for item in sorted([*others, *_settled(told)], key=lambda one: (one.t_eff, _is_told_end(one))):
        at = item.t_eff
        if not _is_told_end(item):
            is_late = cut is None or at - cut >= AUDIT_IS_STALE
            is_opening = item.opens and (is_late or item.rank is Rank.CREATE)
            parts[-1].append(item if item.opens == is_opening else replace(item, opens=False))
        elif cut is not None and _is_told_again(at, cut, parts[-1]):
            parts[-2].append(replace(item, t_eff=cut, is_rounded=False))
        else:
            cut = at
            launched = _launched_early(parts[-1], at)
            parts[-1] = [one for one in parts[-1] if one not in launched]
            parts[-1].append(replace(item, is_rounded=False))
            after = at + MICROSECOND
            parts.append([replace(one, t_eff=after, is_rounded=False) for one in launched])
    found = parts[:1]
    for part in parts[1:]:
        birth = min((item.t_eff for item in part if item.opens), default=None)
        is_of_it = [birth is not None and _is_since(birth, item) for item in part]
        found[-1] += compress(part, map(not_, is_of_it))  # it came too late for the life before
        if birth is not None:
            found.append(list(compress(part, is_of_it)))
    return found


def _is_told_end(item: Observation) -> bool:
    return item.kind is Kind.END and item.rank is Rank.DELETE


def _is_launch(item: Observation) -> bool:
    return item.opens and item.rank is Rank.CREATE


def _is_told_again(at: datetime, cut: datetime, since: Iterable[Observation]) -> bool:
    """Whether an end is the one before, told again: within a second, and nothing launched since."""
    return at == cut or (at - cut <= SAME_MOMENT and not any(map(_is_launch, since)))


def _launched_early(part: Iterable[Observation], end: datetime) -> list[Observation]:
    """Launches that, by another host's clock, come just before the end of the life before theirs.

    Where that one had not begun before, they are its own; or its own launch, told twice.
    """
    first = min((item.t_eff for item in part if item.opens), default=end)
    return [
        item
        for item in part
        if _is_launch(item)
        and end - item.t_eff <= SAME_MOMENT
        and item.t_eff - first > SAME_MOMENT
    ]


def _is_since(birth: datetime, item: Observation) -> bool:
    """Whether it speaks of what was born then.

    A clock may be behind, and a moment cut; but what is said in passing just before is of something else.
    """
    is_exact = item.rank is Rank.EVIDENCE and not item.is_rounded
    return item.t_eff >= (birth if is_exact else birth - SAME_MOMENT)


def _life(seen: Collection[Observation]) -> History:
    """The history of what lives once."""
    states = _settled(item for item in seen if item.kind is Kind.STATE)
    openings = [item for item in states if item.opens]
    if not openings:
        return History(intervals=(), anomalies=(Anomaly.NEVER_OPENED,) if states else ())
    birth = min(item.t_eff for item in openings)
    death = _death([item for item in seen if item.kind is Kind.END])
    if death is not None and death.t_eff <= birth:
        is_odd = birth - death.t_eff > SAME_MOMENT
        return History(intervals=(), anomalies=(Anomaly.ENDED_BEFORE_BIRTH,) if is_odd else ())
    is_born_of_event = any(
        item.t_eff == birth and item.rank is not Rank.EVIDENCE for item in openings
    )
    is_ended_by_event = death is None or death.rank is Rank.DELETE
    provenance = Provenance.EVENTS if is_born_of_event and is_ended_by_event else Provenance.AUDIT
    anomalies = []
    if death is not None and any(
        item.rank > Rank.EVIDENCE and item.t_eff - death.t_eff > SAME_MOMENT for item in states
    ):
        anomalies.append(Anomaly.SEEN_AFTER_END)
    return History(
        intervals=tuple(_walk(states, birth, death, provenance)),
        anomalies=tuple(anomalies),
        is_born_of_event=is_born_of_event,
    )


def _settled(observations: Iterable[Observation]) -> list[Observation]:
    """Sort, with the several spellings of one moment made one (rule 1)."""
    items = list(observations)
    moments = _settle({item.t_eff for item in items if item.is_rounded})
    return sorted(
        (_moved(item, moments[item.t_eff]) if item.is_rounded else item for item in items),
        key=lambda item: item.order,
    )


def _moved(item: Observation, moment: datetime) -> Observation:
    return item if item.t_eff == moment else replace(item, t_eff=moment)


def _settle(moments: Iterable[datetime]) -> dict[datetime, datetime]:
    settled: dict[datetime, datetime] = {}
    cluster: list[datetime] = []
    for moment in [*sorted(moments), None]:
        if cluster and (moment is None or moment - cluster[0] > SAME_MOMENT):
            finest = next((item for item in cluster if item.microsecond), cluster[0])
            settled.update(dict.fromkeys(cluster, finest))
            cluster = []
        if moment is not None:
            cluster.append(moment)
    return settled


def _death(ends: list[Observation]) -> Observation | None:
    if not ends:
        return None
    trusted = max(item.rank for item in ends)
    moments = _settle({item.t_eff for item in ends if item.is_rounded})
    return min(
        (
            replace(item, t_eff=moments[item.t_eff]) if item.is_rounded else item
            for item in ends
            if item.rank is trusted
        ),
        key=lambda item: item.order,
    )


def _walk(
    states: list[Observation],
    birth: datetime,
    death: Observation | None,
    provenance: Provenance,
) -> Iterator[Interval]:
    values: dict[str, Scalar] = {}
    sources: dict[str, Evidence] = {}
    for item in reversed(states):  # the first that speaks of a name is the last one written
        for name, value in item.attributes:
            values[name], sources[name] = value, item.evidence
    spoken: dict[str, datetime] = {}  # when an event last spoke of a name
    for item in states:
        if item.t_eff <= birth:
            for name, value in item.attributes:
                # what is only said again needs no second witness: the first one is cited
                if item.rank is not Rank.EVIDENCE or values[name] != value:
                    values[name], sources[name] = value, item.evidence
            if item.rank is not Rank.EVIDENCE:
                spoken.update(dict.fromkeys(dict(item.attributes), item.t_eff))
    start = birth
    living = (
        item
        for item in states
        if item.t_eff > birth and (death is None or item.t_eff < death.t_eff)
    )
    for moment, group in groupby(living, key=lambda item: item.t_eff):
        said: dict[str, tuple[Scalar, Evidence]] = {}
        for item in group:  # in order of rank: the last word stands (rule 2)
            for name, value in item.attributes:
                if _is_stale(item, spoken.get(name)):
                    continue
                # as at the birth: what is only said again is witnessed already
                is_again = item.rank is Rank.EVIDENCE and said.get(name, (None,))[0] == value
                if name not in said or not is_again:
                    said[name] = (value, item.evidence)
                if item.rank is not Rank.EVIDENCE:
                    spoken[name] = moment
        changed = {name: word for name, word in said.items() if values[name] != word[0]}
        if not changed:
            continue
        yield Interval(
            start=start,
            end=moment,
            attributes=dict(values),
            opened_by=_distinct(sources.values()),
            closed_by=_distinct(evidence for _, evidence in changed.values()),
            provenance=provenance,
        )
        start = moment
        for name, (value, evidence) in changed.items():
            values[name], sources[name] = value, evidence
    yield Interval(
        start=start,
        end=None if death is None else death.t_eff,
        attributes=dict(values),
        opened_by=_distinct(sources.values()),
        closed_by=() if death is None else (death.evidence,),
        provenance=provenance,
    )


def _is_stale(item: Observation, spoken_at: datetime | None) -> bool:
    """Whether an audit's word may be older than what an event has said."""
    return (
        spoken_at is not None
        and item.rank is Rank.EVIDENCE
        and not item.is_rounded
        and item.t_eff - spoken_at < AUDIT_IS_STALE
    )


def _distinct(evidence: Iterable[Evidence]) -> tuple[Evidence, ...]:
    return tuple(sorted(set(evidence), key=citation.order))
