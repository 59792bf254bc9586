"""How an image gets onto its hosts: on which, in what order, when, and how fast.

Everything here is decided from what is passed in: the hosts' states, the time, the sizes. Percent
are whole numbers; a share of hosts is always rounded up, so that one percent of three hosts is one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, time, timedelta
from enum import StrEnum
from typing import Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

MAX_WINDOWS: Final = 16
DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
PRESENT: Final = frozenset({"cached", "existing"})
OPEN: Final = frozenset({"waiting", "transferring"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Times of day in which pieces may move, in a time zone; past midnight where stop <= start.

    A window belongs to the day on which it starts.
    """

    start: time
    stop: time
    time_zone: str = "UTC"
    days: frozenset[str] = field(default_factory=lambda: frozenset(DAYS))

    def __post_init__(self) -> None:
        """Raises ValueError: a time zone or day that there is not."""
        try:
            ZoneInfo(self.time_zone)
        except (ZoneInfoNotFoundError, ValueError, OSError) as exc:
            raise ValueError(f"no time zone {self.time_zone!r}") from exc
        if not self.days or self.days - set(DAYS):
            raise ValueError(f"days are of {', '.join(DAYS)}")

    def contains(self, at: datetime) -> bool:
        """Whether the moment is inside."""
        local = at.astimezone(ZoneInfo(self.time_zone))
        now = local.time()
        today = DAYS[local.weekday()]
        yesterday = DAYS[(local.weekday() - 1) % 7]
        if self.start < self.stop:
            return today in self.days and self.start <= now < self.stop
        begun = today in self.days and now >= self.start
        return begun or (yesterday in self.days and now < self.stop)

    def next_open(self, after: datetime) -> datetime | None:
        """The first moment after a moment outside at which it is open; None where there is none in 8 days."""
        zone = ZoneInfo(self.time_zone)
        day = after.astimezone(zone).date()
        # it opens at its start, of which there are two where clocks are put back ...
        moments = [
            datetime.combine(day + timedelta(days=n), self.start, zone).replace(fold=fold)
            for n in range(9)
            for fold in (0, 1)
        ]
        # ... or when clocks are put forward over it, which they are at a quarter of an hour
        quarter = after.replace(minute=after.minute // 15 * 15, second=0, microsecond=0)
        moments += [quarter + timedelta(minutes=15 * n) for n in range(1, 8 * 24 * 4 + 1)]
        later = sorted(at for one in moments if (at := one.astimezone(UTC)) > after)
        return next((at for at in later if self.contains(at)), None)


def is_open(windows: Sequence[Window], at: datetime) -> bool:
    """Whether pieces may move now: always, where no window is named."""
    return not windows or any(window.contains(at) for window in windows)


def next_open(windows: Sequence[Window], after: datetime) -> datetime | None:
    """The first moment from `after` on that is inside a window; None where there is none in 8 days."""
    at = after.astimezone(UTC)
    if is_open(windows, at):
        return at
    openings = (window.next_open(at) for window in windows)
    return min((opening for opening in openings if opening is not None), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Which hosts: those named, or those with these labels, there are or will be; of them, a share."""

    hosts: Sequence[str] | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    percent: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """In what order, until when, how fast and at which times."""

    canary_percent: int | None = None
    deadline_at: datetime | None = None
    deadline_percent: int = 100
    host_bytes_per_second: int | None = None
    total_bytes_per_second: int | None = None
    windows: Sequence[Window] = ()


class Verdict(StrEnum):
    """What is to become of a distribution whose first hosts are being watched."""

    WAIT = "wait"
    GO = "go"
    STOP = "stop"
    NOBODY = "nobody"


def canary_verdict(states: Mapping[str, int]) -> Verdict:
    """From how many canary hosts are in which state: all must have ended, and none in an error.

    A host that cannot hold images, or is silent (unsupported, skipped), says nothing of the image:
    the others are its judges, and where there are no others, nobody is. Where there is no host
    yet, the first that comes is the canary.
    """
    if not states or any(states.get(state) for state in OPEN):
        return Verdict.WAIT
    if states.get("error"):
        return Verdict.STOP
    return Verdict.GO if any(states.get(state) for state in PRESENT) else Verdict.NOBODY


def silent(
    silent_seconds: Mapping[str, float], *, listened_seconds: float, patience_seconds: float
) -> list[str]:
    """The hosts that nobody need wait for any more, sorted.

    Args:
        silent_seconds: of each host that has not ended, since when it was last heard of, or since
            it could have begun if that is later.
        listened_seconds: since when somebody could have heard it.
        patience_seconds: who is silent for longer is not waited for.
    """
    if listened_seconds <= patience_seconds:
        return []
    return sorted(host for host, seconds in silent_seconds.items() if seconds > patience_seconds)


def share_of(count: int, percent: int) -> int:
    """So many percent of so many, rounded up."""
    return -(-count * percent // 100)


def deadline_met(states: Mapping[str, int], percent: int) -> bool:
    """Whether the share of hosts that the deadline asks for has the image."""
    present = sum(states.get(state, 0) for state in PRESENT)
    return present >= share_of(sum(states.values()), percent)
