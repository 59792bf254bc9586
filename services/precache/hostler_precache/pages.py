"""The service's pages: distributions and how far each host is, hosts, policies."""

from datetime import UTC, datetime
from uuid import UUID

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from hostler_common import auth
from hostler_common.pages import Pages
from hostler_precache import estimate
from hostler_precache.deps import DistributionsDep, PoliciesDep, SettingsDep, SwarmsDep
from hostler_precache.distributions import Distribution, HostProgress

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
    found = estimate.estimate(
        record, hosts, seed_bytes_per_second=settings.link_bytes_per_second, now=datetime.now(UTC)
    )
    return pages.render(
        request,
        "distribution.html",
        distribution=record,
        estimate=found,
        pace=_pace(record, found),
        hosts=sorted(hosts, key=_urgency)[:HOSTS_SHOWN],
        host_count=len(hosts),
        rows_shown=HOSTS_SHOWN,
    )


def _urgency(host: HostProgress) -> tuple[int, str]:
    return _ORDER.index(host.state) if host.state in _ORDER else len(_ORDER), host.host


def _pace(record: Distribution, found: estimate.Estimate | None) -> str:
    if record.paused_reason is not None:
        return f"paused: {record.paused_reason}"
    if not record.is_open:
        return "waits for its window"
    if found is None or found.over_bound is None:
        return "-"
    host = f" ({found.slowest_host})" if found.slowest_host else ""
    return f"{found.over_bound:.2f}x; the limit is {found.limit}{host}"
