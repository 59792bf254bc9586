"""What happens to distributions as time goes by: windows open and close, canaries end, deadlines pass.

A distribution that needs a decision is locked, so that of several replicas one decides.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from hostler_common import db, errors, logs
from hostler_common.bus import Message
from hostler_precache import messages
from hostler_precache.distribution import endings, rollout
from hostler_precache.distribution.distribution_store import DistributionStore
from hostler_precache.distribution.distributions import DistributionId, LiveDistribution
from hostler_precache.distribution.rollout import Verdict
from hostler_precache.settings import Settings
from hostler_precache.store import Store
from hostler_precache.swarming import tracker
from hostler_precache.swarming.swarm_store import SwarmStore

log = logs.get(__name__)


class Rollouts:
    """The periodic work on distributions; call `advance` every second or so."""

    def __init__(
        self,
        *,
        settings: Settings,
        store: Store,
        distributions: DistributionStore,
        swarms: SwarmStore,
        tracking: tracker.Tracker,
        on_done: Callable[[Sequence[DistributionId]], None],
    ) -> None:
        """Nothing is known yet; `on_done` is told of distributions that are done with their canaries."""
        self._settings = settings
        self._store = store
        self._distributions = distributions
        self._swarms = swarms
        self._tracker = tracking
        self._on_done = on_done
        # who is silent is only known by who listens: not while this process, or the database, was away
        self._listens_since: float | None = None

    async def advance(self) -> None:
        """Every distribution is where it should be at this time.

        Raises:
            DatabaseUnavailable: nothing is known, and nobody has been listened to.
        """
        finished: list[DistributionId] = []
        try:
            async with db.transaction(self._distributions.pool) as connection:
                lives = await self._distributions.claim_live(connection)
                changed = [
                    live for live in lives if await self._advance(connection, live, finished)
                ]
        except errors.Unavailable:
            self._listens_since = None
            raise
        if self._listens_since is None:
            self._listens_since = time.monotonic()
        self._on_done(finished)
        for live in changed:
            if live.blob is not None:
                self._tracker.forget(live.blob.blob_id)

    async def _advance(
        self, connection: db.Connection, live: LiveDistribution, finished: list[DistributionId]
    ) -> bool:
        """Whether anything about the distribution has changed; if it is done by it, it is `finished`."""
        now = datetime.now(UTC)
        is_open = rollout.is_open(live.rollout.windows, now)
        wave, deadline_met, events = live.wave, live.deadline_met, list[Message]()
        if wave == 0 and live.blob is not None and not live.is_paused:
            live, events = await self._without_silent(connection, live)
            states = live.canary_states
            match rollout.canary_verdict(states):
                case Verdict.GO:
                    wave = 1
                case Verdict.STOP:
                    failed, total = states["error"], sum(states.values())
                    reason = f"{failed} of the first {total} hosts could not get the image"
                    await self._stop(connection, live, f"canary.failed: {reason}", events)
                    return True
                case Verdict.NOBODY:
                    counts = ", ".join(f"{n} {state}" for state, n in sorted(states.items()))
                    reason = f"none of the first {sum(states.values())} hosts got it: {counts}"
                    await self._stop(connection, live, f"canary.none_left: {reason}", events)
                    return True
        deadline_at = live.rollout.deadline_at
        if deadline_at is not None and deadline_met is None:
            if rollout.deadline_met(live.host_states, live.rollout.deadline_percent):
                deadline_met = True
            elif now >= deadline_at:
                deadline_met = False
                events.append(
                    messages.DISTRIBUTION_LATE.message(
                        messages.DistributionLate(
                            distribution_id=str(live.distribution_id),
                            deadline_at=deadline_at,
                            deadline_percent=live.rollout.deadline_percent,
                            hosts=dict(live.host_states),
                        ),
                        app_id=messages.APP_ID,
                    )
                )
        if (wave, is_open, deadline_met) == (live.wave, live.is_open, live.deadline_met):
            await self._store.announce(connection, events)
            return bool(events)
        await self._distributions.advance(
            connection,
            live.distribution_id,
            wave=wave,
            is_open=is_open,
            deadline_met=deadline_met,
        )
        log.info(
            "distribution_advanced", distribution_id=str(live.distribution_id), wave=wave,
            is_open=is_open, deadline_met=deadline_met,
        )  # fmt: skip
        if wave > live.wave:  # where all its hosts were canaries, the last of them may be skipped
            settled = await self._swarms.settle(connection, [live.distribution_id])
            finished += settled
            events += await endings.events_of(
                connection, self._distributions, ended=[], finished=settled
            )
        if live.blob is not None and (wave > live.wave or is_open > live.is_open):
            events += tracker.announcements(
                live.blob,
                [live.distribution_id],
                public_url=self._settings.public_url,
                token_seconds=self._settings.token_seconds,
            )
        await self._store.announce(connection, events)
        return True

    async def _without_silent(
        self, connection: db.Connection, live: LiveDistribution
    ) -> tuple[LiveDistribution, list[Message]]:
        """The distribution with canaries that are not heard of any more skipped, and what that says."""
        patience = self._settings.canary_silent_seconds
        listened = 0.0 if self._listens_since is None else time.monotonic() - self._listens_since
        silent = rollout.silent(
            await self._distributions.canaries_silent_seconds(connection, live.distribution_id),
            listened_seconds=listened,
            patience_seconds=patience,
        )
        if not silent:
            return live, []
        ended = await self._distributions.skip(
            connection,
            live.distribution_id,
            silent,
            reason=f"host.silent: not heard of for {patience:g} s",
        )
        log.warning(
            "canaries_skipped", distribution_id=str(live.distribution_id),
            hosts=[one.host for one in ended],
        )  # fmt: skip
        canaries, hosts = await self._distributions.states(connection, live.distribution_id)
        events = await endings.events_of(connection, self._distributions, ended=ended, finished=[])
        return replace(live, canary_states=canaries, host_states=hosts), events

    async def _stop(
        self, connection: db.Connection, live: LiveDistribution, reason: str, events: list[Message]
    ) -> None:
        await self._distributions.pause(connection, live.distribution_id, reason=reason)
        log.warning(
            "canaries_stopped_it", distribution_id=str(live.distribution_id), reason=reason
        )
        event = messages.DISTRIBUTION_PAUSED.message(
            messages.DistributionPaused(distribution_id=str(live.distribution_id), reason=reason),
            app_id=messages.APP_ID,
        )
        await self._store.announce(connection, [*events, event])
