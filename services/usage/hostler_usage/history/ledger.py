"""Everything that follows from what was said of one resource.

Its history, what it moved, what was done to it, and how it agrees with the audits: one pure
function of the set of statements, whatever order or how often they came in.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from hostler_usage.auditing.audits import Reconciliation
from hostler_usage.auditing.reconciliation import reconcile_said
from hostler_usage.auditing.repetition import Said, without_repetitions
from hostler_usage.history.amounts import Amount, amounts
from hostler_usage.history.intervals import Anomaly, Interval, fold
from hostler_usage.history.observe import observe
from hostler_usage.profiling.operations import Operation, pair_said
from hostler_usage.reading import citation
from hostler_usage.reading.mapping import Resource


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """All that is known of one resource."""

    intervals: tuple[Interval, ...]
    amounts: tuple[Amount, ...]
    operations: tuple[Operation, ...]
    reconciliation: Reconciliation
    anomalies: tuple[Anomaly, ...]


def reckon(resource: Resource, said: Iterable[Said]) -> Ledger:
    """Return what a set of statements, each with the message it came in, amounts to."""
    distinct = in_order(said)
    observed = (
        observation
        for statement, evidence in without_repetitions(distinct)
        for observation in observe(statement, resource, evidence)
    )
    history = fold(observed, ids_return=resource.ids_return)
    intervals = tuple(_completed(interval, resource) for interval in history.intervals)
    moved = amounts(distinct, intervals, is_born_of_event=history.is_born_of_event)
    doubts = (Anomaly.COUNTS_OVERLAP,) if moved.is_overlapping else ()
    return Ledger(
        intervals=intervals,
        amounts=moved.amounts,
        operations=pair_said(resource.name, distinct),
        reconciliation=reconcile_said(resource, intervals, distinct),
        anomalies=history.anomalies + doubts,
    )


def _completed(interval: Interval, resource: Resource) -> Interval:
    """The interval, with what nobody said of an attribute taken from what stands in for it."""
    said = interval.attributes
    added = {
        name: said.get(attribute.otherwise)
        for name, attribute in resource.attributes.items()
        if attribute.otherwise is not None and said.get(name) is None
    }
    return replace(interval, attributes={**said, **added}) if added else interval


def in_order(said: Iterable[Said]) -> list[Said]:
    """Each of them once, in the order of citing."""
    return sorted(set(said), key=lambda item: citation.order(item[1]))
