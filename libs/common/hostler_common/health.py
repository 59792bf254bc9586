"""What ``/healthz`` and ``/readyz`` say.

Alive means that the process's own loops turn; it asks no server, so a broker's blip restarts nothing. Ready means that
the process may be sent work: every check holds and it is not stopping.
"""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from hostler_common import logs

log = logs.get(__name__)

CHECK_SECONDS = 1.0
MISSED_BEATS = 3

Check = Callable[[], tuple[bool, str] | Awaitable[tuple[bool, str]]]


@dataclass(slots=True)
class _Beat:
    period_seconds: float
    last: float


@dataclass(slots=True)
class Health:
    """The checks of one process and the beats of its loops."""

    draining: bool = False
    _checks: dict[str, Check] = field(default_factory=dict)
    _beats: dict[str, _Beat] = field(default_factory=dict)

    def check(self, name: str, check: Check) -> None:
        """``check`` decides, with others, whether the process is ready: (holds, detail)."""
        self._checks[name] = check

    def beat(self, loop: str, period_seconds: float) -> None:
        """The loop turned just now, and will again within the period."""
        self._beats[loop] = _Beat(period_seconds, time.monotonic())

    def forget(self, loop: str) -> None:
        """The loop has ended as it should."""
        self._beats.pop(loop, None)

    def alive(self) -> tuple[bool, list[str]]:
        """Whether every loop has turned lately, and those that have not."""
        now = time.monotonic()
        stuck = [
            name
            for name, beat in self._beats.items()
            if now - beat.last > MISSED_BEATS * beat.period_seconds + 60.0
        ]
        return not stuck, stuck

    async def ready(self) -> tuple[bool, list[dict[str, str]]]:
        """Whether the process may be sent work, and what each check says."""
        reports = []
        for name, check in self._checks.items():
            try:
                async with asyncio.timeout(CHECK_SECONDS):
                    outcome = check()
                    holds, detail = await outcome if inspect.isawaitable(outcome) else outcome
            except TimeoutError:
                holds, detail = False, f"no answer within {CHECK_SECONDS:g} s"
            except Exception as exc:  # a check that cannot say yes says no
                log.exception("check_failed", check=name)
                holds, detail = False, f"the check itself failed: {type(exc).__name__}"
            reports.append({"name": name, "status": "pass" if holds else "fail", "detail": detail})
        if self.draining:
            reports.append({"name": "draining", "status": "fail", "detail": "stopping"})
        return all(report["status"] == "pass" for report in reports), reports
