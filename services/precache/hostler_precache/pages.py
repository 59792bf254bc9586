"""The service's page: distributions and how far each host is, hosts, policies."""

from uuid import UUID

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from hostler_common import auth
from hostler_common.pages import Pages
from hostler_precache.deps import DistributionsDep, PoliciesDep, SwarmsDep

ROWS_SHOWN = 50

router = APIRouter(include_in_schema=False)
pages = Pages("hostler_precache")


@router.get("/", dependencies=[auth.require(auth.Role.READER)])
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


@router.get("/distributions/{distribution_id}", dependencies=[auth.require(auth.Role.READER)])
async def distribution(
    request: Request, distribution_id: UUID, records: DistributionsDep
) -> HTMLResponse:
    """One distribution, host by host."""
    return pages.render(
        request,
        "distribution.html",
        distribution=await records.distribution(distribution_id),
        hosts=await records.progress(distribution_id),
    )
