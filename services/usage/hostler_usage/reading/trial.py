"""What bodies would do under a mapping, shown without a service: every step, and what comes of them."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from collections.abc import Mapping as Table
from dataclasses import dataclass
from datetime import datetime

from hostler_usage.history.ledger import Ledger, reckon
from hostler_usage.history.measures import Window, totals
from hostler_usage.history.observation import Observation
from hostler_usage.history.observe import observe
from hostler_usage.reading.envelope import Notification, UnreadableError, open_body
from hostler_usage.reading.imports import Line
from hostler_usage.reading.mapping import Mapping, Rule
from hostler_usage.reading.normalise import Normalised, Normaliser, Said
from hostler_usage.reading.statement import Evidence, ResourceKey, Statement
from hostler_usage.reading.times import MICROSECOND


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """What a body says of one resource, and what follows from it."""

    said: Said
    observations: tuple[Observation, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """One line: `notification` is None where it holds none, and `problem` then says why.

    `rule` is None where the mapping knows nothing of its event type.
    """

    line: int
    notification: Notification | None
    canonical: str | None = None
    rule: Rule | None = None
    normalised: Normalised | None = None
    words: tuple[Word, ...] = ()
    problem: UnreadableError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """What all the lines amount to for one resource.

    `totals` are unit-microseconds of what was held until `as_of`, the last moment spoken of, and
    units of what moved; measures that come to nothing are left out.
    """

    resource: ResourceKey
    ledger: Ledger
    totals: Table[str, int]
    as_of: datetime


def hear(mapping: Mapping, lines: Iterable[Line], *, region: str) -> Sequence[Heard]:
    """Return what each line says; lines without a body are left out."""
    normaliser = Normaliser(mapping)
    return [
        _heard(mapping, normaliser, line.number, line.body, region)
        for line in lines
        if line.body is not None
    ]


def _heard(
    mapping: Mapping, normaliser: Normaliser, number: int, body: bytes, region: str
) -> Heard:
    try:
        notification = open_body(body)
    except UnreadableError as exc:
        return Heard(line=number, notification=None, problem=exc)
    normalised = normaliser.read(notification, region=region)
    evidence = _evidence(notification)
    return Heard(
        line=number,
        notification=notification,
        canonical=mapping.canonical(notification.event_type),
        rule=mapping.rule_for(notification.event_type),
        normalised=normalised,
        words=tuple(
            Word(
                said=said,
                observations=()
                if said.statement is None
                else tuple(
                    observe(
                        said.statement, mapping.resources[said.resource.resource_type], evidence
                    )
                ),
            )
            for said in normalised.said
        ),
    )


def account(mapping: Mapping, heard: Iterable[Heard]) -> Sequence[Account]:
    """Return what was heard amounts to, for each resource, in order of their keys."""
    spoken: dict[ResourceKey, list[tuple[Statement, Evidence]]] = defaultdict(list)
    last: datetime | None = None
    for one in heard:
        if one.notification is None:
            continue
        for word in one.words:
            if word.said.statement is not None:
                spoken[word.said.resource].append(
                    (word.said.statement, _evidence(one.notification))
                )
                moment = one.notification.timestamp
                last = moment if last is None else max(last, moment)
    if last is None:
        return []
    return [_account(mapping, key, spoken[key], last) for key in sorted(spoken)]


def _account(
    mapping: Mapping,
    key: ResourceKey,
    said: Sequence[tuple[Statement, Evidence]],
    last: datetime,
) -> Account:
    ledger = reckon(mapping.resources[key.resource_type], said)
    moments = [item.start for item in ledger.intervals] + [item.at for item in ledger.amounts]
    ends = [item.end for item in ledger.intervals if item.end is not None]
    # an end or an amount may lie after the message that speaks of it
    as_of = max([last, *ends, *(item.at + MICROSECOND for item in ledger.amounts)])
    window = Window(start=min([last, *moments]), end=as_of, as_of=as_of)
    measures = mapping.measures_of(key.resource_type)
    found = totals(measures, ledger.intervals, window, ledger.amounts)
    return Account(
        resource=key,
        ledger=ledger,
        totals={name: amount for name, amount in found.items() if amount},
        as_of=as_of,
    )


def _evidence(notification: Notification) -> Evidence:
    return Evidence(
        event_time=notification.timestamp,
        message_id=notification.message_id,
        digest=notification.digest,
    )
