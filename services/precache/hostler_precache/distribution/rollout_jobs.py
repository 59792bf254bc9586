"""What happens to distributions as time goes by: windows open and close, canaries end, deadlines pass.

A distribution that needs a decision is locked, so that of several replicas one decides.
"""

from datetime import UTC, datetime

from hostler_common import db, logs
from hostler_common.bus import Message
from hostler_precache import messages
from hostler_precache.distribution import rollout
from hostler_precache.distribution.distribution_store import DistributionStore
from hostler_precache.distribution.distributions import LiveDistribution
from hostler_precache.distribution.rollout import Verdict
from hostler_precache.settings import Settings
from hostler_precache.store import Store
from hostler_precache.swarming import tracker

log = logs.get(__name__)


class Rollouts:
    """The periodic work on distributions; call `advance` every second or so."""

    def __init__(
        self,
        *,
        settings: Settings,
        store: Store,
        distributions: DistributionStore,
        swarms: tracker.Tracker,
    ) -> None:
        self._settings = settings
        self._store = store
        self._distributions = distributions
        self._swarms = swarms

    async def advance(self) -> None:
        """Every distribution is where it should be at this time."""
        async with db.transaction(self._distributions.pool) as connection:
            lives = await self._distributions.claim_live(connection)
            changed = [live for live in lives if await self._advance(connection, live)]
        for live in changed:
            if live.blob is not None:
                self._swarms.forget(live.blob.blob_id)

    async def _advance(self, connection: db.Connection, live: LiveDistribution) -> bool:
        """Whether anything about the distribution has changed."""
        now = datetime.now(UTC)
        is_open = rollout.is_open(live.rollout.windows, now)
        wave, deadline_met, events = live.wave, live.deadline_met, list[Message]()
        if wave == 0 and live.blob is not None and not live.is_paused:
            match rollout.canary_verdict(live.canary_states):
                case Verdict.GO:
                    wave = 1
                case Verdict.STOP:
                    await self._stop(connection, live)
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
            return False
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
        if live.blob is not None and (wave > live.wave or is_open > live.is_open):
            events += tracker.announcements(
                live.blob,
                [live.distribution_id],
                public_url=self._settings.public_url,
                token_seconds=self._settings.token_seconds,
            )
        await self._store.announce(connection, events)
        return True

    async def _stop(self, connection: db.Connection, live: LiveDistribution) -> None:
        failed, total = live.canary_states["error"], sum(live.canary_states.values())
        reason = f"canary.failed: {failed} of the first {total} hosts could not get the image"
        await self._distributions.pause(connection, live.distribution_id, reason=reason)
        log.warning("canary_failed", distribution_id=str(live.distribution_id), failed=failed)
        event = messages.DISTRIBUTION_PAUSED.message(
            messages.DistributionPaused(distribution_id=str(live.distribution_id), reason=reason),
            app_id=messages.APP_ID,
        )
        await self._store.announce(connection, [event])
