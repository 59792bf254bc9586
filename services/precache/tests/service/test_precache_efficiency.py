"""A distribution that is done is counted once, with how far from the bound it was."""

import asyncio
import uuid
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry

from hostler_common import db, errors
from hostler_precache import protocol
from hostler_precache.distribution import distributions_api
from hostler_precache.distribution.distribution_store import DistributionStore
from hostler_precache.distribution.distributions import Distribution, DistributionId
from hostler_precache.distribution.efficiency import Efficiency
from hostler_precache.distribution.rollout import Rollout, Targets
from hostler_precache.distribution.rollout_jobs import Rollouts
from hostler_precache.metrics import Metrics
from hostler_precache.settings import Settings
from hostler_precache.swarming.reports import Reports
from hostler_precache.swarming.tracker import Tracker


class Counted:
    """What is told of a distribution, and what is counted of it."""

    def __init__(self, control: Any, distributions: DistributionStore | None = None) -> None:
        self.registry = CollectorRegistry()
        self.efficiency = Efficiency(
            distributions or control.distributions,
            seed_bytes_per_second=10,
            over_bound=Metrics(self.registry).over_bound,
        )
        self.reports = Reports(
            control.store, control.distributions, control.swarms, on_done=self.efficiency.done
        )

    async def hear(self, *reports: tuple[str, protocol.HostReport]) -> None:
        running = asyncio.create_task(self.reports.run())
        await asyncio.gather(*(self.reports.put(host, report) for host, report in reports))
        running.cancel()

    @property
    def count(self) -> float | None:
        return self.registry.get_sample_value("precache_distribution_over_bound_count")

    @property
    def over_bound(self) -> float | None:
        return self.registry.get_sample_value("precache_distribution_over_bound_sum")


async def done(control: Any, counted: Counted) -> uuid.UUID:
    """A distribution of 100 bytes to two hosts, announced 30 s ago, whose last host has just ended."""
    blob_id = await control.add_blob()
    distribution_id: uuid.UUID = await control.distribute()
    async with db.transaction(control.pool) as connection:
        await connection.execute("UPDATE distribution SET announced_at = now() - interval '30 s'")
    keys = {"distribution_id": str(distribution_id), "blob_id": blob_id, "state": "cached"}
    await counted.hear(("h1", control.report("h1", keys)))
    await counted.efficiency.turn()
    assert counted.count == 0
    await counted.hear(("h2", control.report("h2", keys)), ("h2", control.report("h2", keys)))
    return distribution_id


async def test_a_distribution_is_counted_when_its_last_host_has_ended(control: Any) -> None:
    counted = Counted(control)
    await done(control, counted)
    for _ in range(2):
        await counted.efficiency.turn()
        assert counted.count == 1
    # 100 bytes at 10 a second take 10 s, and it was 30
    assert counted.over_bound == pytest.approx(3.0, abs=0.2)


async def test_while_the_database_is_away_it_is_kept_and_a_gone_one_is_not(
    control: Any,
) -> None:
    class Away(DistributionStore):
        """Away at first."""

        is_away = True

        async def distribution(self, distribution_id: uuid.UUID) -> Distribution:
            if self.is_away:
                raise errors.Unavailable("away")
            return await super().distribution(distribution_id)

    store = Away(control.pool)
    counted = Counted(control, store)
    await done(control, counted)
    with pytest.raises(errors.Unavailable):
        await counted.efficiency.turn()
    assert counted.count == 0
    store.is_away = False
    counted.efficiency.done([DistributionId(uuid.uuid4())])
    for _ in range(2):
        await counted.efficiency.turn()
    assert counted.count == 1


@pytest.mark.parametrize("ended", [{"h1": "cached"}, {"h1": "cached", "h2": "error"}])
async def test_one_whose_last_canary_was_skipped_is_counted_at_once_or_when_it_is_resumed(
    control: Any, ended: dict[str, str]
) -> None:
    counted, tracking = Counted(control), Tracker(control.swarms, member_seconds=30)
    settings = cast("Settings", SimpleNamespace(
        canary_silent_seconds=0.0, public_url=None, token_seconds=60, link_bytes_per_second=10,
        cluster_bytes_per_second=None,
    ))  # fmt: skip
    rollouts = Rollouts(
        settings=settings, store=control.store, distributions=control.distributions,
        swarms=control.swarms, tracking=tracking, on_done=counted.efficiency.done,
    )  # fmt: skip
    blob_id = await control.add_blob()
    made = await control.distribute(
        targets=Targets(hosts=[*ended, "ghost"]), rollout=Rollout(canary_percent=99)
    )
    for host, state in ended.items():
        keys = {"distribution_id": str(made), "blob_id": blob_id, "state": state}
        await counted.hear((host, control.report(host, keys)))
    await rollouts.advance()  # who is silent is known by who has listened
    await rollouts.advance()
    if "error" in ended.values():
        await counted.efficiency.turn()
        assert counted.count == 0
        await distributions_api.resume_distribution(
            made, control.store, control.distributions, counted.efficiency, control.swarms,
            tracking, settings,
        )  # fmt: skip
    assert (await control.distributions.distribution(made)).state == "done"
    await counted.efficiency.turn()
    assert counted.count == 1
