"""What audits say of one resource, beside its history.

A statement is true of the moment at which the audit read its row, which is not told: it lies
between the period's end and the sending. What differs from ours at the time of sending but was ours
within that span was right when it was read. Repairs are told once, under the first statement that
made them possible; those after it are verified against the history it repaired.
"""

from bisect import bisect_left, bisect_right, insort
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from operator import itemgetter
from types import MappingProxyType
from typing import Final, NamedTuple

from hostler_usage.auditing.audits import (
    MEANINGS,
    AuditStatement,
    Code,
    Lived,
    Reconciliation,
    Status,
    Told,
    Verdict,
    audit_statement,
    deletion,
    launch,
    merged,
    row_order,
)
from hostler_usage.history.intervals import Interval, Provenance, lives
from hostler_usage.history.observe import is_born_now, is_unborn
from hostler_usage.reading import citation
from hostler_usage.reading.mapping import Edge, Life, Resource
from hostler_usage.reading.statement import Evidence, Scalar, Statement
from hostler_usage.reading.times import SAME_MOMENT

# audits read all their rows first and send for minutes
READ_BEFORE: Final = timedelta(minutes=30)
_OFFLOADED: Final = "shelved_offloaded"


def reconcile_said(
    resource: Resource,
    intervals: Sequence[Interval],
    said: Iterable[tuple[Statement, Evidence]],
) -> Reconciliation:
    """`reconcile` for all that messages say of one resource, audits and events alike."""
    audits: list[AuditStatement] = []
    launches: list[Told] = []
    deletions: list[Told] = []
    events: dict[Evidence, Statement] = {}
    for statement, evidence in said:
        if (audit := audit_statement(statement, evidence, resource.audit)) is not None:
            if is_unborn(statement, resource, evidence):
                audit = replace(audit, born_at=None, is_unborn=True)
            elif resource.life is Life.PLAIN and is_born_now(statement, resource, evidence):
                audit = replace(audit, born_at=None)
            audits.append(audit)
            continue
        events[evidence] = statement
        if (launched := launch(statement, evidence)) is not None:
            launches.append(launched)
        elif (deleted := deletion(statement, evidence)) is not None:
            deletions.append(deleted)
    return reconcile(
        resource, intervals, audits, launches=launches, deletions=deletions, events=events
    )


def reconcile(
    resource: Resource,
    intervals: Sequence[Interval],
    statements: Iterable[AuditStatement],
    *,
    launches: Iterable[Told] | None = None,
    deletions: Iterable[Told] | None = None,
    events: Mapping[Evidence, Statement] = MappingProxyType({}),
) -> Reconciliation:
    """Compare a set of statements about one resource with its history.

    `launches` and `deletions` are what launch and delete events tell of themselves; with None it is
    not known which there were: every launched_at inside the life is then believed. `events` is all
    that was said beside audits.
    """
    distinct = {statement.evidence: statement for statement in statements}
    told = None if launches is None else sorted({item.at for item in launches})
    ends = None if deletions is None else tuple(deletions)
    groups: dict[GroupKey, list[AuditStatement]] = defaultdict(list)
    for statement in sorted(distinct.values(), key=_statement_order):
        groups[group_key(statement)].append(statement)
    comparison = _Comparison(resource, intervals, told)
    repairs, rows = _repairs(resource, intervals, distinct, groups, told, ends)
    agreed: list[_Agreed] = []
    for key, group in sorted(groups.items(), key=itemgetter(0)):
        if key not in repairs and not key.is_partial and all(map(comparison.agrees, group)):
            agreed.append(_agreed(comparison, group))
            continue
        found = list(_of_group(comparison, group, repairs.get(key, [])))
        if any(item.code is Code.RELAUNCH_REPAIRED for item in found):
            comparison.take_over(group)
        rows += found
    if not resource.ids_return:
        rows += _deleted_twice(ends or (), intervals)
    rows += _overlaps(groups, intervals)
    rows += _untold(resource, comparison, list(distinct.values()), events)
    births = {item.born_at for item in distinct.values() if item.born_at is not None}
    return Reconciliation(
        verdicts=tuple(sorted((*_rows(agreed), *merged(rows)), key=row_order)),
        lived=_lived(intervals),
        launches=tuple(sorted({_cut(item) for item in births.union(told or ())}))
        if comparison.is_segmented
        else (),
        confirmed_at=max((item.said_at for item in distinct.values()), default=None),
    )


class GroupKey(NamedTuple):
    """What statements about one period have in common, in whole seconds."""

    start: datetime
    end: datetime
    is_partial: bool


# what a comparison finds: code, field, ours, theirs
_Finding = tuple[Code, str | None, Scalar, Scalar]


def _cut(moment: datetime) -> datetime:
    """The whole second: the versioned format cuts what the legacy one spells out."""
    return moment.replace(microsecond=0) if moment.microsecond else moment


def group_key(statement: AuditStatement) -> GroupKey:
    """What a statement has in common with the others about its period."""
    start, end = statement.period
    return GroupKey(_cut(start), _cut(end), statement.is_partial)


def _statement_order(statement: AuditStatement) -> tuple[datetime, datetime, str, bytes]:
    return (statement.said_at, *citation.order(statement.evidence))


def _is_same(one: datetime, other: datetime) -> bool:
    return abs(one - other) <= SAME_MOMENT


def _spelled(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()


def _text(value: Scalar) -> str | None:
    return value if isinstance(value, str) else None


class _Comparison:
    """One history, made ready to be compared with many statements."""

    def __init__(
        self, resource: Resource, intervals: Sequence[Interval], launches: list[datetime] | None
    ) -> None:
        self.rule = resource.audit
        self.gone = resource.gone
        self.is_segmented = resource.life is Life.SEGMENTS
        self.intervals = intervals
        self.starts = [item.start for item in intervals]
        self.lives = [(life[0].start, life[-1].end) for life in lives(intervals)]
        self.births = [birth for birth, _ in self.lives]
        self.are_launches_told = launches is not None
        known = self.starts if launches is None else launches
        self.launches = sorted({*known, *self.births})

    def held(self, moment: datetime) -> Mapping[str, Scalar]:
        """Our attributes at a moment; the first or last ones outside of the life."""
        if not self.intervals:
            return {}
        return self.intervals[max(0, bisect_right(self.starts, moment) - 1)].attributes

    def held_before(self, moment: datetime) -> Mapping[str, Scalar]:
        """Our attributes just before a moment; the first or last ones outside of the life."""
        return self.intervals[max(0, bisect_left(self.starts, moment) - 1)].attributes

    def life(self, statement: AuditStatement) -> tuple[datetime, datetime | None]:
        """From birth to end: the last life that had begun when the audit was sent, else the first."""
        begun = bisect_right(self.births, statement.said_at + SAME_MOMENT)
        return self.lives[max(0, begun - 1)]

    def agrees(self, statement: AuditStatement) -> bool:
        """Whether there is nothing to be said of it."""
        return self._is_as_held(statement) or not self.findings(statement)

    def _is_as_held(self, statement: AuditStatement) -> bool:
        """Whether it is of something alive, launched when we say, with each field ours, as nearly all are."""
        born_at, said_at = statement.born_at, statement.said_at
        if not self.intervals or statement.ended_at is not None:
            return False
        birth, ended_at = self.life(statement)
        start, end = statement.period
        if start > said_at or end < birth or (ended_at is not None and ended_at < said_at):
            return False
        if born_at is None:
            if self.is_segmented:
                return False
        else:
            launch = self._expected_launch(statement) if self.is_segmented else birth
            if launch != born_at and not _is_same(launch, born_at):
                return False
        held, fields = self.held(said_at), statement.fields
        for name in self.rule.compares:
            theirs = fields.get(name)
            if theirs is not None and name in held and held[name] != theirs:
                return False
        return True

    def findings(self, statement: AuditStatement) -> list[_Finding]:
        """What is to be said of one statement; nothing where all agrees."""
        if not self.intervals:
            if statement.is_unborn:
                return []  # for us it is not there either
            if self.is_segmented and statement.born_at is None:
                return [(Code.NO_LAUNCHED_AT, "launched_at", None, None)]
            return [(Code.NO_LIFE, None, None, _spelled(statement.born_at))]
        birth, ended_at = self.life(statement)
        if statement.is_unborn and birth >= self._read_from(statement) - SAME_MOMENT:
            return []
        start, end = statement.period
        if ended_at is not None and start - ended_at > SAME_MOMENT:
            return [(Code.AFTER_END, None, _spelled(ended_at), _spelled(start))]
        # where a life has no segments, what names no birth may be the first word of it
        names_birth = self.is_segmented or statement.born_at is not None
        if birth - (end if names_birth else max(end, statement.said_at)) > SAME_MOMENT:
            return [(Code.BEFORE_BIRTH, None, _spelled(birth), _spelled(end))]
        found = [*self._of_launch(statement, birth), *self._of_end(statement, ended_at)]
        held = self.held(statement.said_at)
        for name in self.rule.compares:
            theirs = statement.fields.get(name)
            if theirs is not None and name in held and held[name] != theirs:
                found += self._of_field(statement, name, held[name], theirs)
        return found

    def _read_from(self, statement: AuditStatement) -> datetime:
        """The earliest moment at which the audit can have read what it says."""
        _, end = statement.period
        if statement.period_end is None:
            return statement.said_at - READ_BEFORE
        return max(end - SAME_MOMENT, statement.said_at - READ_BEFORE)

    def _of_launch(self, statement: AuditStatement, birth: datetime) -> Iterator[_Finding]:
        theirs = statement.born_at
        if theirs is None:
            if self.is_segmented:
                yield (Code.NO_LAUNCHED_AT, "launched_at", _spelled(birth), None)
            return
        ours = self._expected_launch(statement)
        if not self.is_segmented:
            if not any(_is_same(item, theirs) for item in self.launches):
                yield (Code.LAUNCHED_AT_DIFFERS, "born_at", _spelled(birth), _spelled(theirs))
            return
        if _is_same(ours, theirs):
            return
        finding = ("launched_at", _spelled(ours), _spelled(theirs))
        may_be_older = ours >= self._read_from(statement)
        if theirs < birth - SAME_MOMENT or theirs > statement.said_at + SAME_MOMENT:
            yield (Code.LAUNCHED_AT_DIFFERS, *finding)
        elif not self.are_launches_told:
            return  # our edges need be no launches
        elif any(_is_same(item, theirs) for item in self.launches):
            yield (Code.AGREED_EARLIER if may_be_older else Code.LAUNCHED_AT_DIFFERS, *finding)
        else:
            is_news = theirs > ours or may_be_older
            yield (Code.RELAUNCH_REPAIRED if is_news else Code.LAUNCHED_AT_DIFFERS, *finding)

    def _expected_launch(self, statement: AuditStatement) -> datetime:
        """The last launch before the statement."""
        position = bisect_right(self.launches, statement.said_at + SAME_MOMENT)
        return self.launches[max(0, position - 1)]

    def take_over(self, statements: Iterable[AuditStatement]) -> None:
        """Launches that statements repaired are known to those after them."""
        for statement in statements:
            theirs = statement.born_at
            if (
                self.are_launches_told
                and theirs is not None
                and any(
                    code is Code.RELAUNCH_REPAIRED
                    for code, *_ in self._of_launch(statement, self.life(statement)[0])
                )
            ):
                insort(self.launches, theirs)

    def _of_end(self, statement: AuditStatement, ended_at: datetime | None) -> Iterator[_Finding]:
        state, theirs = statement.fields.get("state"), statement.ended_at
        is_gone = isinstance(state, str) and state in self.gone
        if theirs is None:
            if is_gone or ended_at is None or ended_at >= statement.said_at - SAME_MOMENT:
                return
            is_earlier = ended_at >= self._read_from(statement)
            code = Code.AGREED_EARLIER if is_earlier else Code.ALIVE_AFTER_END
            yield (code, "deleted_at", _spelled(ended_at), None)
            return
        if statement.born_at is not None and theirs < statement.born_at - SAME_MOMENT:
            launched_at = _spelled(statement.born_at)
            yield (Code.DELETED_BEFORE_LAUNCH, "deleted_at", launched_at, _spelled(theirs))
        if state is not None and not is_gone:
            yield (Code.DELETED_IN_OTHER_STATE, "state", "deleted", state)
        if ended_at is None:
            yield (Code.END_UNKNOWN, "deleted_at", None, _spelled(theirs))
        elif not _is_same(ended_at, theirs):
            yield (Code.DELETED_AT_DIFFERS, "deleted_at", _spelled(ended_at), _spelled(theirs))

    def _of_field(
        self, statement: AuditStatement, name: str, ours: Scalar, theirs: Scalar
    ) -> Iterator[_Finding]:
        if name == "state" and (theirs in self.gone or theirs in self.rule.passing):
            return  # an end is compared as a moment
        around = (statement.said_at - SAME_MOMENT, statement.said_at + SAME_MOMENT)
        if self._held_within(name, theirs, *around):
            return
        if self._held_within(name, theirs, self._read_from(statement), around[1]):
            yield (Code.AGREED_EARLIER, name, ours, theirs)
        else:
            yield (Code.FIELD_DIFFERS, name, ours, theirs)

    def _held_within(self, name: str, value: Scalar, start: datetime, end: datetime) -> bool:
        first = max(0, bisect_right(self.starts, start) - 1)
        for interval in self.intervals[first:]:
            if interval.start > end:
                return False
            if interval.attributes.get(name) == value:
                return True
        return False


class _Agreed(NamedTuple):
    """A whole period whose statements all agree with our history."""

    start: datetime
    end: datetime
    project_id: str | None
    host: str | None
    statements: int
    evidence: tuple[Evidence, ...]


def _agreed(comparison: _Comparison, group: list[AuditStatement]) -> _Agreed:
    start, end = _finest(group).period
    project_id, host = _whose(comparison, group)
    return _Agreed(
        start, end, project_id, host, len(group), tuple(item.evidence for item in group)
    )


def _rows(agreed: Iterable[_Agreed]) -> Iterator[Verdict]:
    """What `audits.merged` makes of verdicts that agree: `agreed` is in order of its beginnings."""
    runs: dict[tuple[object, ...], list[_Agreed]] = {}
    whole: list[list[_Agreed]] = []
    for item in agreed:
        day = item.start.astimezone(UTC).date()
        key = (item.project_id, item.host, item.end - item.start, day)
        run = runs.get(key)
        if run is not None and run[-1].end == item.start:
            run.append(item)
        else:
            runs[key] = [item]
            whole.append(runs[key])
    for run in whole:
        first, last = run[0], run[-1]
        yield Verdict(
            period_start=first.start,
            period_end=last.end,
            periods=len(run),
            status=Status.VERIFIED,
            code=Code.AGREED,
            project_id=first.project_id,
            host=first.host,
            statements=sum(item.statements for item in run),
            evidence=last.evidence,
        )


def _finest(group: list[AuditStatement]) -> AuditStatement:
    """Of the twins of both formats, the one that does not cut moments to the second."""
    if len(group) == 1:
        return group[0]
    return max(group, key=lambda item: (item.period[1].microsecond, item.period[1]))


def _whose(comparison: _Comparison, group: list[AuditStatement]) -> tuple[str | None, str | None]:
    """The project and the host of a verdict."""
    project_id = _text(comparison.held(group[-1].said_at).get("project")) or _text(
        group[0].fields.get("project")
    )
    if comparison.rule.is_per_host:
        for item in group:
            host = _text(item.fields.get("host"))
            if host is not None:
                return project_id, host
    return project_id, None


def _of_group(
    comparison: _Comparison, group: list[AuditStatement], repairs: list[Verdict]
) -> Iterator[Verdict]:
    """The verdicts on the statements about one period: the twins of both formats, and repetitions."""
    found: dict[_Finding, list[Evidence]] = defaultdict(list)
    for statement in group:
        for finding in comparison.findings(statement):
            found[finding].append(statement.evidence)
    finest = _finest(group)
    project_id, host = _whose(comparison, group)
    base = Verdict(
        period_start=finest.period[0],
        period_end=finest.period[1],
        is_partial=finest.is_partial,
        status=Status.VERIFIED,
        code=Code.AGREED,
        project_id=project_id,
        host=host,
        statements=len(group),
    )
    is_wrong = False
    for finding in sorted(found, key=repr):
        code, name, ours, theirs = finding
        if code is Code.AGREED_EARLIER:
            continue
        is_wrong = True
        yield replace(
            base,
            status=MEANINGS[code].status,
            code=code,
            field=name,
            ours=ours,
            theirs=theirs,
            evidence=tuple(sorted(set(found[finding]), key=citation.order)),
        )
    for repair in repairs:
        is_wrong = True
        yield replace(
            base,
            status=repair.status,
            code=repair.code,
            field=repair.field,
            ours=repair.ours,
            theirs=repair.theirs,
            evidence=repair.evidence,
        )
    if not is_wrong:
        evidence = tuple(sorted((item.evidence for item in group), key=citation.order))
        code = Code.AGREED_EARLIER if found else Code.AGREED
        yield replace(base, code=code, evidence=evidence)


def _repairs(
    resource: Resource,
    intervals: Sequence[Interval],
    statements: Mapping[Evidence, AuditStatement],
    groups: Mapping[GroupKey, Sequence[AuditStatement]],
    launches: list[datetime] | None,
    deletions: Sequence[Told] | None,
) -> tuple[dict[GroupKey, list[Verdict]], list[Verdict]]:
    """What of a history is known from audits only: under the period of the first of them.

    Those that rest on no audit at all (an update told of the birth) are in the second part.
    """
    found: list[tuple[datetime, _Finding, Sequence[Evidence]]] = []
    for life in lives(intervals):
        found += _repaired_edges(life, statements, launches, deletions)
    for before, after in pairwise(intervals):
        if not _is_only_of(before.closed_by, statements):
            continue
        for name in resource.audit.compares:
            ours, theirs = before.attributes.get(name), after.attributes.get(name)
            if ours != theirs and resource.audit.passing.isdisjoint((ours, theirs)):
                change = (Code.CHANGE_REPAIRED, name, ours, theirs)
                found.append((after.start, change, before.closed_by))
    if not found:
        return {}, []
    tellers = _Tellers(groups)
    grouped: dict[GroupKey, list[Verdict]] = defaultdict(list)
    alone: list[Verdict] = []
    for at, (code, about, ours, theirs), evidence in found:
        verdict = Verdict(
            period_start=at,
            period_end=at,
            status=Status.REPAIRED,
            code=code,
            field=about,
            ours=ours,
            theirs=theirs,
            project_id=_text(_at(intervals, at).get("project")),
            evidence=tuple(sorted(set(evidence), key=citation.order)),
        )
        key, witnesses = tellers.of(at) or _citing(evidence, statements)
        if key is None:
            alone.append(verdict)
        else:
            cited = tuple(sorted({item.evidence for item in witnesses}, key=citation.order))
            grouped[key].append(replace(verdict, evidence=cited))
    return grouped, alone


def _repaired_edges(
    life: Sequence[Interval],
    statements: Mapping[Evidence, AuditStatement],
    launches: list[datetime] | None,
    deletions: Sequence[Told] | None,
) -> Iterator[tuple[datetime, _Finding, Sequence[Evidence]]]:
    """The birth and the end of a life that no event told of."""
    first, last = life[0], life[-1]
    is_repaired = Provenance.AUDIT in (first.provenance, last.provenance)
    if deletions is None:
        end_is_told = not _is_only_of(last.closed_by, statements)
    else:
        end_is_told = any(last.end and _is_same(item.at, last.end) for item in deletions)
    is_end_repaired = is_repaired and last.end is not None and not end_is_told
    if launches is None:
        birth_is_told = is_end_repaired and not _is_only_of(first.opened_by, statements)
    else:
        birth_is_told = any(_is_same(item, first.start) for item in launches)
    if is_repaired and not birth_is_told:
        birth = (Code.BIRTH_REPAIRED, "born_at", None, _spelled(first.start))
        yield first.start, birth, first.opened_by
    if is_end_repaired and last.end is not None:
        death = (Code.END_REPAIRED, "ended_at", None, _spelled(last.end))
        yield last.end, death, last.closed_by


_Witnesses = tuple[GroupKey | None, Sequence[AuditStatement]]


class _Tellers:
    """The period whose statements were the first to tell of a moment, and those statements.

    The history cites whichever of many equal words it went by; the first one does not change when
    the next statement says the same.
    """

    def __init__(self, groups: Mapping[GroupKey, Sequence[AuditStatement]]) -> None:
        self._groups = groups
        self._sent: dict[datetime, AuditStatement] = {}
        self._named: dict[datetime, AuditStatement] = {}  # as a birth or an end
        statements = (item for group in groups.values() for item in group)
        for item in sorted(statements, key=_statement_order):
            self._sent.setdefault(item.said_at, item)
            for moment in (item.born_at, item.ended_at):
                if moment is not None:
                    self._named.setdefault(moment, item)

    def of(self, at: datetime) -> _Witnesses | None:
        """None of a moment that no statement was sent at or names."""
        first = [item for moment, item in self._named.items() if _is_same(moment, at)]
        if at in self._sent:
            first.append(self._sent[at])
        if not first:
            return None
        key = group_key(min(first, key=_statement_order))
        return key, [item for item in self._groups[key] if _tells(item, at)]


def _tells(statement: AuditStatement, at: datetime) -> bool:
    named = (statement.born_at, statement.ended_at)
    return statement.said_at == at or any(item and _is_same(item, at) for item in named)


def _citing(
    evidence: Sequence[Evidence], statements: Mapping[Evidence, AuditStatement]
) -> _Witnesses:
    """Of the statements that the history cites, those of the first period."""
    telling = [statements[item] for item in evidence if item in statements]
    if not telling:
        return None, ()
    key = group_key(min(telling, key=_statement_order))
    return key, [item for item in telling if group_key(item) == key]


def _is_only_of(
    evidence: Sequence[Evidence], statements: Mapping[Evidence, AuditStatement]
) -> bool:
    return bool(evidence) and all(item in statements for item in evidence)


def _at(intervals: Sequence[Interval], moment: datetime) -> Mapping[str, Scalar]:
    return next(
        (item.attributes for item in reversed(intervals) if item.start <= moment),
        intervals[0].attributes,
    )


class _Word(NamedTuple):
    """What a message shows a field to be, when it was sent, and whether it tells of the field's change."""

    at: datetime
    value: Scalar
    is_telling: bool
    evidence: Evidence


def _untold(
    resource: Resource,
    comparison: _Comparison,
    audits: Sequence[AuditStatement],
    events: Mapping[Evidence, Statement],
) -> Iterator[Verdict]:
    """Changes that no event told of, and that the event of something else lets slip.

    They happened at some moment since the old value was last seen; of that span, the part in the new
    one's day is named. (What no audit bears out is unverified as it is.)
    """
    if not comparison.intervals:
        return
    for name in resource.audit.compares:
        attribute = resource.attributes.get(name)
        if attribute is not None and attribute.told_by:
            words = sorted(_words(name, attribute.told_by, events), key=_word_order)
            seen = [(item.said_at, item.fields.get(name)) for item in audits]
            yield from _slips(comparison, name, words, seen + [item[:2] for item in words])


def _words(
    name: str, told_by: Container[str], events: Mapping[Evidence, Statement]
) -> Iterator[_Word]:
    for evidence, statement in events.items():
        if statement.failed or statement.edge is Edge.COUNT:
            continue
        value = next((said for key, said in statement.attributes if key == name), None)
        if value is not None:
            is_change = statement.edge is Edge.CHANGE and statement.operation in told_by
            is_telling = is_change or (statement.edge is Edge.LAUNCH and not statement.is_resent)
            yield _Word(evidence.event_time, value, is_telling, evidence)


def _word_order(word: _Word) -> tuple[datetime, str, bytes]:
    return citation.order(word.evidence)


def _slips(
    comparison: _Comparison,
    name: str,
    words: Sequence[_Word],
    seen: Iterable[tuple[datetime, Scalar]],
) -> Iterator[Verdict]:
    last: tuple[Scalar, Scalar] | None = None
    for word in words:
        held = comparison.held_before(word.at)
        ours, theirs = held.get(name), word.value
        is_known = (
            word.is_telling
            or ours in (None, theirs)
            or comparison.held_before(word.at - SAME_MOMENT).get(name) == theirs
        )
        if is_known or last == (ours, theirs):
            continue
        last = (ours, theirs)
        start = max(
            (at for at, value in seen if at < word.at and value == ours),
            default=comparison.births[0],
        )
        midnight = word.at.replace(hour=0, minute=0, second=0, microsecond=0)
        yield Verdict(
            period_start=min(max(start, midnight), word.at),
            period_end=word.at,
            is_partial=True,
            status=Status.MISMATCH,
            code=Code.CHANGE_UNTOLD,
            field=name,
            ours=ours,
            theirs=theirs,
            project_id=_text(held.get("project")),
            evidence=(word.evidence,),
        )


def _deleted_twice(deletions: Iterable[Told], intervals: Sequence[Interval]) -> Iterator[Verdict]:
    told = sorted(deletions, key=lambda item: (item.at, *citation.order(item.evidence)))
    if not told or _is_same(told[0].at, told[-1].at):
        return
    yield Verdict(
        period_start=told[-1].at,
        period_end=told[-1].at,
        status=Status.MISMATCH,
        code=Code.DELETED_TWICE,
        field="deleted_at",
        ours=_spelled(told[0].at),
        theirs=_spelled(told[-1].at),
        project_id=_text(intervals[-1].attributes.get("project")) if intervals else None,
        evidence=tuple(sorted({told[0].evidence, told[-1].evidence}, key=citation.order)),
    )


def _overlaps(
    groups: Mapping[GroupKey, Sequence[AuditStatement]], intervals: Sequence[Interval]
) -> Iterator[Verdict]:
    """Whole periods that overlap without being the same."""
    for before, after in pairwise(sorted(key for key in groups if not key.is_partial)):
        if before.end <= after.start:
            continue
        one, other = groups[before], groups[after]
        (_, end), (start, until) = one[0].period, other[0].period
        if end - start <= SAME_MOMENT:
            continue
        statement = other[0]
        yield Verdict(
            period_start=start,
            period_end=min(end, until),
            status=Status.MISMATCH,
            code=Code.PERIODS_OVERLAP,
            field="period",
            ours=_spelled(end),
            theirs=_spelled(start),
            project_id=(_text(_at(intervals, start).get("project")) if intervals else None)
            or _text(statement.fields.get("project")),
            statements=2,
            evidence=tuple(sorted({one[0].evidence, statement.evidence}, key=citation.order)),
        )


def _lived(intervals: Sequence[Interval]) -> tuple[Lived, ...]:
    """The life in spans of one owner on one host."""
    spans: list[Lived] = []
    for interval in intervals:
        span = Lived(
            start=interval.start,
            end=interval.end,
            project_id=_text(interval.attributes.get("project")),
            host=_text(interval.attributes.get("host")),
            is_offloaded=interval.attributes.get("state") == _OFFLOADED,
        )
        if spans and spans[-1] == replace(span, start=spans[-1].start, end=interval.start):
            spans[-1] = replace(spans[-1], end=span.end)
        else:
            spans.append(span)
    return tuple(spans)
