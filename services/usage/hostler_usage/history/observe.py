"""What follows from a statement for its resource's history.

Two kinds of lives are told differently. In a life of *segments* (Nova's instances) the hinge is the
moment of birth: it is set anew whenever a segment begins (create, finished resize, revert, rebuild,
rescue, unshelve) and repeated in every later body. Each of them therefore says "from that moment on
it had this flavor", which is how a lost create or resize is made good to the exact moment by any
later update or audit. Two spans must not be taken at their word: flavor and image flip in Nova's
database some time before the new moment follows (`Resource.between_segments`). States and hosts
have no such field: they hold from the time of the event that shows them.

In a *plain* life (volumes, images, addresses) a body is a full snapshot at the time of its event,
and says of the birth only that it happened. Of a volume whose launch it never wrote down, Cinder
says that it was launched now. That is no birth in the states of what is not there yet or never came
to be (`Resource.now_is_unborn`); in another one (an operator has reset it) the volume serves, and
lives since the first word of it at the latest. Where moments are exact (`Resource.is_exact`), none of
them is settled with another, any body that names the birth opens the life, and one of the end speaks
of the end's moment, not of its event's.
`cinder-volume-usage-audit --send_actions` sends the create and delete events of its period again:
new message ids, the audit run's timestamp, today's size. They are told by an audit period of no
length (cinder/cmd/volume_usage_audit.py), whose moment is the true one, and count as evidence only.
"""

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta

from hostler_usage.history.observation import Kind, Observation, Rank
from hostler_usage.reading.mapping import Edge, Holds, Life, Resource
from hostler_usage.reading.statement import Attributes, Evidence, Statement
from hostler_usage.reading.times import SAME_MOMENT

# the .end of a launch follows it within seconds: of a cloud that does not set launched_at anew it is that of the birth
LAUNCH_IS_OLD = timedelta(minutes=10)
_RANK_OF_STATE = {Edge.CHANGE: Rank.ACTION, Edge.NOTE: Rank.UPDATE, Edge.AUDIT: Rank.EVIDENCE}
_RANK_OF_END = {Edge.END: Rank.DELETE, Edge.NOTE: Rank.UPDATE, Edge.AUDIT: Rank.EVIDENCE}
_SILENT = frozenset({Edge.NONE, Edge.COUNT})


def observe(statement: Statement, resource: Resource, evidence: Evidence) -> Iterator[Observation]:
    """Yield what `statement`, made by the message `evidence` names, says of its resource."""
    if statement.edge in _SILENT or statement.failed:
        return iter(())
    if resource.life is Life.SEGMENTS:
        return _segmented(statement, resource, evidence)
    return _plain(statement, resource, evidence)


def is_unborn(statement: Statement, resource: Resource, evidence: Evidence) -> bool:
    """Whether a body in passing shows something, of a plain life, that has not come to life."""
    if resource.life is Life.SEGMENTS or statement.edge in (Edge.LAUNCH, Edge.RELAUNCH):
        return False
    return _is_not_there(statement, resource, evidence)


def _is_not_there(statement: Statement, resource: Resource, evidence: Evidence) -> bool:
    state = _state(statement)
    if state in resource.unborn:
        return True
    is_doubtful = state is None or state in resource.now_is_unborn
    return is_doubtful and is_born_now(statement, resource, evidence)


def is_born_now(statement: Statement, resource: Resource, evidence: Evidence) -> bool:
    """Whether the birth that a body names is no more than the moment it was sent."""
    return (
        bool(resource.now_is_unborn)
        and statement.born_at is not None
        and evidence.event_time - statement.born_at <= SAME_MOMENT
    )


def _state(statement: Statement) -> str | None:
    value = next((value for name, value in statement.attributes if name == "state"), None)
    return value if isinstance(value, str) else None


# --- segments


def _segmented(
    statement: Statement, resource: Resource, evidence: Evidence
) -> Iterator[Observation]:
    edge, state = statement.edge, _state(statement)
    if edge in (Edge.LAUNCH, Edge.RELAUNCH):
        launch = _launch(statement, evidence)
        if edge is Edge.RELAUNCH and resource.begins_in and state not in resource.begins_in:
            yield replace(launch, attributes=_that_hold(statement, resource, Holds.SEGMENT))
            yield Observation(
                kind=Kind.STATE,
                t_eff=evidence.event_time,
                rank=Rank.ACTION,
                attributes=_that_hold(statement, resource, Holds.MOMENT),
                evidence=evidence,
            )
            return
        yield launch
        return
    if statement.born_at is not None:
        yield _segment(statement, resource, evidence)
    if edge in _RANK_OF_END and (edge is Edge.END or state in resource.gone):
        yield Observation(
            kind=Kind.END,
            t_eff=statement.ended_at or evidence.event_time,
            rank=_RANK_OF_END[edge],
            is_rounded=statement.ended_at is not None,
            evidence=evidence,
        )
    elif (
        edge in _RANK_OF_STATE
        and state is not None
        and state not in resource.unborn
        and state not in resource.gone
    ):
        if edge is Edge.NOTE and statement.task is not None:
            return  # sent by whichever service began the task, whose clock may run ahead
        yield Observation(
            kind=Kind.STATE,
            t_eff=evidence.event_time,
            rank=_RANK_OF_STATE[edge],
            attributes=(("state", state),)
            if edge is Edge.NOTE
            else _that_hold(statement, resource, Holds.MOMENT),
            evidence=evidence,
        )


def _launch(statement: Statement, evidence: Evidence) -> Observation:
    launched_at = statement.born_at
    is_relaunch = statement.edge is Edge.RELAUNCH
    if (
        is_relaunch
        and launched_at is not None
        and evidence.event_time - launched_at > LAUNCH_IS_OLD
    ):
        launched_at = None  # of a cloud that did not set it anew: it is that of the birth
    return Observation(
        kind=Kind.STATE,
        # a body that cannot say when: the event itself is the nearest moment known
        t_eff=launched_at or evidence.event_time,
        rank=Rank.ACTION if is_relaunch else Rank.CREATE,
        opens=True,
        is_rounded=launched_at is not None,
        attributes=statement.attributes,
        evidence=evidence,
    )


def _segment(statement: Statement, resource: Resource, evidence: Evidence) -> Observation:
    """What a body says in passing about the segment it belongs to."""
    assert statement.born_at is not None
    said: Attributes = ()
    if statement.task not in resource.between_segments:
        # a launch ends in "active"; where it did not, the event that says so outranks this
        fixed = dict(_that_hold(statement, resource, Holds.SEGMENT))
        said = tuple(sorted((fixed | {"state": "active"}).items()))
    return Observation(
        kind=Kind.STATE,
        t_eff=statement.born_at,
        rank=Rank.EVIDENCE,
        opens=True,
        is_rounded=True,
        attributes=said,
        evidence=evidence,
    )


def _that_hold(statement: Statement, resource: Resource, holds: Holds) -> Attributes:
    known = resource.attributes  # a statement may be older than the mapping
    return tuple(
        pair for pair in statement.attributes if pair[0] in known and known[pair[0]].holds is holds
    )


# --- plain


def _plain(statement: Statement, resource: Resource, evidence: Evidence) -> Iterator[Observation]:
    edge = statement.edge
    period = statement.period
    resent_moment = period[0] if period is not None and statement.is_resent else None
    is_resent = edge in (Edge.LAUNCH, Edge.END) and resent_moment is not None
    born_at = statement.born_at or (resent_moment if edge is Edge.LAUNCH else None)
    if edge in (Edge.LAUNCH, Edge.RELAUNCH) and not is_resent:
        yield Observation(
            kind=Kind.STATE,
            t_eff=born_at or evidence.event_time,
            rank=Rank.CREATE,
            opens=True,
            is_rounded=born_at is not None and not resource.is_exact,
            attributes=statement.attributes,
            evidence=evidence,
        )
        return
    state = _state(statement)
    is_now = is_born_now(statement, resource, evidence)
    is_there = not _is_not_there(statement, resource, evidence)
    if born_at is not None and not is_now and is_there:
        yield Observation(
            kind=Kind.STATE,
            t_eff=born_at,
            # what is exact is as good as its own event, which may be lost
            rank=Rank.CREATE if resource.is_exact else Rank.EVIDENCE,
            opens=True,
            is_rounded=not resource.is_exact,
            evidence=evidence,
        )
    is_gone = edge is Edge.END or (edge is Edge.AUDIT and state in resource.gone)
    shown_at = evidence.event_time
    if is_gone:
        ended_at = (resent_moment if is_resent else None) or statement.ended_at
        gone_at = ended_at or evidence.event_time
        if resource.is_exact:
            # the event may be of the next life's time; and its moment, which is cut, before its own life's birth
            gone_at = shown_at = max(gone_at, born_at or gone_at)
        yield Observation(
            kind=Kind.END,
            t_eff=gone_at,
            rank=Rank.EVIDENCE if is_resent or edge is Edge.AUDIT else Rank.DELETE,
            is_rounded=ended_at is not None and not resource.is_exact,
            evidence=evidence,
        )
        if is_now:
            return  # it may be that it never was
    if state in resource.unborn:
        return
    yield Observation(
        kind=Kind.STATE,
        t_eff=shown_at,
        rank=Rank.ACTION if edge is Edge.CHANGE else Rank.EVIDENCE,
        # of what has no field for its birth, this may be the first word that it is there at all
        opens=(born_at is None or (is_now and is_there))
        and not is_gone
        and edge in (Edge.AUDIT, Edge.CHANGE),
        attributes=tuple(
            pair
            for pair in statement.attributes
            # a body of the end has the state it ended in: held never
            if pair[0] != "state" or not (edge is Edge.END or pair[1] in resource.gone)
        ),
        evidence=evidence,
    )
