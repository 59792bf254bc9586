"""Which resources nobody seems to need: how long, on what evidence, and how sure that is.

A finding is made of what is known, never of what is missing. Two kinds of knowledge are used:

- The state of a resource and since when it has it: stopped, shelved, suspended, paused or in error;
  a volume attached to nothing, a floating IP associated with nothing, a snapshot whose volume is
  gone. States come from events, so they are known as long as the resource is.
- Activity: what counters say was moved. A counter that says nothing may stand still or may not be
  read at all, so that a resource whose counters were not read throughout the days asked about
  (`COVERED`) is `unknown`, with the reason, and never `idle`.

The thresholds follow the rule that Oracle's cloud reclaims instances by: over 7 days, the 95th
percentile of CPU below 20 %. CPU decides. Network and disk traffic only take a verdict back, and
their thresholds are high for that: the noise of agents and updates is above any small one.

The score tells findings apart, 0 to 10. Of states: 5 at the threshold and 10 at four times as many
days, in proportion between. Of activity: 10 for none at all, 5 at the threshold.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from fractions import Fraction
from typing import Final

COVERED: Final = Fraction(9, 10)
"""The share of the days asked about that samples must span."""
_NANOSECONDS: Final = 1_000_000_000
_CPU: Final = "cpu_time_ns"
_TRAFFIC: Final = (
    "network_in_bytes",
    "network_out_bytes",
    "bandwidth_in_bytes",
    "bandwidth_out_bytes",
)
_DISK: Final = ("disk_read_bytes", "disk_write_bytes")
_VOLUME: Final = ("volume_read_bytes", "volume_write_bytes")


class Reason(StrEnum):
    """Why a resource is found."""

    STOPPED = "stopped"
    SUSPENDED = "suspended"
    PAUSED = "paused"
    SHELVED = "shelved"
    ERROR = "error"
    INACTIVE = "inactive"
    UNATTACHED = "unattached"
    UNASSOCIATED = "unassociated"
    ORPHANED = "orphaned"
    UNUSED = "unused"


class Verdict(StrEnum):
    """What is thought of a resource."""

    IDLE = "idle"
    IN_USE = "in_use"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """From when on something is found. Days are of 24 hours, rates are means over `inactive_days`."""

    stopped_days: int = 14
    error_days: int = 7
    unattached_days: int = 14
    unassociated_days: int = 7
    orphaned_days: int = 30
    unused_days: int = 90
    inactive_days: int = 7
    cpu_percent: Fraction = Fraction(20)
    network_bytes_per_second: int = 100_000
    disk_bytes_per_second: int = 1_000_000
    volume_bytes_per_second: int = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """What one counter of a resource, over all its labels, said in the days asked about.

    `p95_per_second` is the 95th percentile of its rates from sample to sample; None where there
    are fewer than two samples.
    """

    samples: int
    first_at: datetime
    last_at: datetime
    total: int
    p95_per_second: Fraction | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A resource that is held now, and what is known of it.

    `since` is when its state class began, `born` when it did. `activity` has a counter only where
    something moved; `read` are the first and the last moment, in the days asked about, at which
    counters of it were read at all. `source_gone_at` is the end of what it was made from (a
    snapshot's volume); `is_source_known` says whether that has a history. `is_wanted` says that
    something else of the ledger uses it (an image: an instance). `are_uses_reported` says that uses
    of things of its kind are reported in its region at all (images: image.send).
    """

    resource_type: str
    state_class: str
    born: datetime
    since: datetime
    attributes: Mapping[str, object]
    activity: Mapping[str, Counted]
    read: tuple[datetime, datetime] | None = None
    source_gone_at: datetime | None = None
    is_source_known: bool = False
    is_wanted: bool = False
    are_uses_reported: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What is thought of a resource. `since` is when it was last known to be needed."""

    verdict: Verdict
    reason: Reason | None = None
    since: datetime | None = None
    score: Fraction = Fraction(0)
    evidence: tuple[str, ...] = ()


_STATES: Final = {
    "stopped": Reason.STOPPED,
    "suspended": Reason.SUSPENDED,
    "paused": Reason.PAUSED,
    "shelved": Reason.SHELVED,
    "shelved_offloaded": Reason.SHELVED,
    "soft_deleted": Reason.STOPPED,
    "error": Reason.ERROR,
}
_IN_USE: Final = Judgement(verdict=Verdict.IN_USE)


def judge(held: Held, limits: Thresholds, *, now: datetime) -> Judgement:
    """What is thought of a resource as of `now`; types that nothing is known to say of are in use."""
    if held.state_class == "error":
        return _of_state(held, Reason.ERROR, limits.error_days, now)
    match held.resource_type:
        case "instance" if held.state_class in _STATES:
            return _of_state(held, _STATES[held.state_class], limits.stopped_days, now)
        case "instance" if held.state_class == "running":
            return _of_cpu(held, limits, now)
        case "volume" if held.state_class == "available":
            return _of_state(held, Reason.UNATTACHED, limits.unattached_days, now)
        case "volume" if held.state_class == "in_use":
            return _of_volume(held, limits, now)
        case "floating_ip" if held.state_class == "allocated":
            return _of_state(held, Reason.UNASSOCIATED, limits.unassociated_days, now)
        case "snapshot":
            return _of_source(held, limits, now)
        case "image":
            return _of_image(held, limits, now)
        case _:
            return _IN_USE


def holds(held: Held) -> dict[str, int]:
    """What would be free without it: the whole numbers among its attributes that its state keeps."""
    kept = {name: value for name, value in held.attributes.items() if isinstance(value, int)}
    if held.state_class == "shelved_offloaded":  # it is on no host any more
        for name in ("vcpus", "memory_mb", "disk_gb"):
            kept.pop(name, None)
    return kept


def _of_state(held: Held, reason: Reason, days: int, now: datetime) -> Judgement:
    return _aged(held.since, reason, days, now, f"{held.state_class} since {held.since:%Y-%m-%d}")


def _aged(since: datetime, reason: Reason, days: int, now: datetime, evidence: str) -> Judgement:
    age, limit = now - since, timedelta(days=days)
    if age < limit:
        return _IN_USE
    times = Fraction(age // _STEP, max(1, limit // _STEP))
    score = min(Fraction(10), 5 + Fraction(5, 3) * (times - 1))
    return Judgement(
        verdict=Verdict.IDLE, reason=reason, since=since, score=score, evidence=(evidence,)
    )


_STEP: Final = timedelta(seconds=1)


def _of_cpu(held: Held, limits: Thresholds, now: datetime) -> Judgement:
    begin = now - timedelta(days=limits.inactive_days)
    if held.since > begin:
        return _IN_USE
    vcpus = held.attributes.get("vcpus")
    cpu = held.activity.get(_CPU)
    missing = _not_covered(None if cpu is None else (cpu.first_at, cpu.last_at), begin, now)
    if cpu is None or cpu.p95_per_second is None or missing:
        return _unknown(missing or "CPU time was not sampled", begin)
    if not isinstance(vcpus, int) or vcpus < 1:
        return _unknown("how many vCPUs it has is not known", begin)
    percent = cpu.p95_per_second * 100 / (vcpus * _NANOSECONDS)
    evidence = [f"p95 of CPU {_shown(percent)} % over {limits.inactive_days} days"]
    share = percent / limits.cpu_percent if limits.cpu_percent else Fraction(2)
    if share >= 1:
        return _IN_USE
    for name, counters, limit in (
        ("network", _TRAFFIC, limits.network_bytes_per_second),
        ("disk", _DISK, limits.disk_bytes_per_second),
    ):
        rate = _rate(held, counters, limits)
        # the samples of CPU time carry these counters too: what is not there did not move
        evidence.append(f"{name} {_shown(rate)} B/s")
        if rate >= limit:
            return _IN_USE
    return Judgement(
        verdict=Verdict.IDLE,
        reason=Reason.INACTIVE,
        since=begin,
        score=10 - 5 * share,
        evidence=tuple(evidence),
    )


def _of_volume(held: Held, limits: Thresholds, now: datetime) -> Judgement:
    begin = now - timedelta(days=limits.inactive_days)
    if held.since > begin:
        return _IN_USE
    missing = _not_covered(held.read, begin, now)
    if missing:
        return _unknown(missing, begin)
    rate = _rate(held, _VOLUME, limits)
    if rate >= limits.volume_bytes_per_second:
        return _IN_USE
    return Judgement(
        verdict=Verdict.IDLE,
        reason=Reason.INACTIVE,
        since=begin,
        score=10 - 5 * rate / limits.volume_bytes_per_second,
        evidence=(f"reads and writes {_shown(rate)} B/s over {limits.inactive_days} days",),
    )


def _of_source(held: Held, limits: Thresholds, now: datetime) -> Judgement:
    if not held.is_source_known:
        return _unknown("nothing is known of the volume it was made of", held.born)
    if held.source_gone_at is None:
        return _IN_USE
    evidence = f"volume {held.attributes.get('volume')} gone since {held.source_gone_at:%Y-%m-%d}"
    return _aged(held.source_gone_at, Reason.ORPHANED, limits.orphaned_days, now, evidence)


def _of_image(held: Held, limits: Thresholds, now: datetime) -> Judgement:
    if held.is_wanted or held.activity or now - held.born < timedelta(days=limits.unused_days):
        return _IN_USE
    if not held.are_uses_reported:
        return _unknown("nothing reports images that are sent in its region", held.born)
    evidence = "never sent, and no instance runs from it"
    return _aged(held.born, Reason.UNUSED, limits.unused_days, now, evidence)


def _not_covered(
    read: tuple[datetime, datetime] | None, begin: datetime, now: datetime
) -> str | None:
    """Why counters cannot be trusted to have been read all the time, if so."""
    if read is None:
        return "its counters were not read"
    spanned = Fraction((read[1] - read[0]) // _STEP, max(1, (now - begin) // _STEP))
    if spanned < COVERED:
        return f"its counters were read in {_shown(spanned * 100)} % of the time only"
    return None


def _unknown(why: str, since: datetime) -> Judgement:
    return Judgement(verdict=Verdict.UNKNOWN, since=since, evidence=(why,))


def _rate(held: Held, counters: Sequence[str], limits: Thresholds) -> Fraction:
    """Units a second, a mean over the days asked about."""
    total = sum(held.activity[name].total for name in counters if name in held.activity)
    return Fraction(total, limits.inactive_days * 86_400)


def _shown(value: Fraction) -> str:
    return f"{float(value):.1f}"
