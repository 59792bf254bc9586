"""The service's pages: distributions and how far each host is, hosts, policies."""

import asyncio
import heapq
from datetime import UTC, datetime
from uuid import UUID

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from hostler_common import auth
from hostler_common.pages import Pages
from hostler_precache.deps import DistributionsDep, PoliciesDep, SettingsDep, SwarmsDep
from hostler_precache.distribution import estimate
from hostler_precache.distribution.distributions import HostProgress

ROWS_SHOWN = 50
HOSTS_SHOWN = 500
_ORDER = ("error", "transferring", "waiting")

router = APIRouter(include_in_schema=False)
pages = Pages("hostler_precache")


@router.get("/", dependencies=[auth.require(auth.Role.READER, every_project=True)])
async def overview(
    request: Request, records: DistributionsDep, swarms: SwarmsDep, policies: PoliciesDep
) -> HTMLResponse:
    """Distributions, hosts and policies."""
    return pages.render(
        request,
        "overview.html",
        distributions=await records.distributions(limit=ROWS_SHOWN),
        hosts=await swarms.hosts(limit=ROWS_SHOWN),
        policies=await policies.policies(limit=ROWS_SHOWN),
        rows_shown=ROWS_SHOWN,
    )


@router.get(
    "/distributions/{distribution_id}",
    dependencies=[auth.require(auth.Role.READER, every_project=True)],
)
async def distribution(
    request: Request, distribution_id: UUID, records: DistributionsDep, settings: SettingsDep
) -> HTMLResponse:
    """One distribution, host by host, kept current by its events."""
    record = await records.distribution(distribution_id)
    hosts = await records.progress(distribution_id)
    # in parts, not in a thread: one that computes takes the loop's turn at each of its system calls
    found = estimate.estimate(
        record,
        hosts,
        seed_bytes_per_second=settings.link_bytes_per_second,
        cluster_bytes_per_second=settings.cluster_bytes_per_second,
        now=datetime.now(UTC),
    )
    await asyncio.sleep(0)
    urgent = heapq.nsmallest(HOSTS_SHOWN, hosts, key=_urgency)
    await asyncio.sleep(0)
    return pages.render(
        request,
        "distribution.html",
        distribution=record,
        pace=estimate.pace_in_words(record, found),
        left=estimate.left_in_words(found),
        cluster_bytes_per_second=settings.cluster_bytes_per_second,
        hosts=urgent,
        host_count=len(hosts),
        rows_shown=HOSTS_SHOWN,
    )


def _urgency(host: HostProgress) -> tuple[int, str]:
    return _ORDER.index(host.state) if host.state in _ORDER else len(_ORDER), host.host
