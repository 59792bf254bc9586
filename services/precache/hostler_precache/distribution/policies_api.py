"""The HTTP API of policies: what a lister names goes to hosts, again and again."""

import json
import uuid
from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter
from pydantic import AfterValidator, Field

from hostler_common import auth, db
from hostler_common.auth import Role
from hostler_precache import protocol
from hostler_precache.deps import Limit, PoliciesDep
from hostler_precache.distribution.distributions import Policy, PolicyId
from hostler_precache.sources import plugins
from hostler_precache.wire import HostNames, Request, View, check_plugin

router = APIRouter(prefix="/v1")


def _storable(options: dict[str, Any]) -> dict[str, Any]:
    # what Python's json reads beyond JSON: NaN, Infinity, halves of surrogate pairs
    json.dumps(options, allow_nan=False, ensure_ascii=False).encode()
    return options


class PolicyRequest(Request):
    """Put what a lister names on hosts, again and again."""

    name: Annotated[str, Field(min_length=1, max_length=100)]
    lister: str = Field("static", max_length=100)
    options: Annotated[dict[str, Any], AfterValidator(_storable)] = Field(
        {}, description="what the lister wants to know"
    )
    hosts: HostNames | None = Field(None, description="these hosts, or those with `labels`")
    labels: protocol.Labels = Field({}, description="hosts with these labels; all, without any")
    priority: int = Field(0, ge=-100, le=100)
    every_seconds: int = Field(300, ge=1, le=7 * 86400)


class PolicyView(View):
    """A policy and its last run."""

    policy_id: UUID
    name: str
    lister: str
    options: dict[str, Any]
    hosts: list[str] | None
    labels: dict[str, str]
    priority: int
    every_seconds: int
    next_run_at: datetime
    last_run_at: datetime | None
    last_outcome: str | None = Field(description="ok, partial or failed")
    last_detail: str | None


class PolicyList(View):
    """Policies by name."""

    policies: list[PolicyView]
    next_marker: str | None


@router.post(
    "/policies", status_code=201, dependencies=[auth.require(Role.OPERATOR, every_project=True)]
)
async def create_policy(body: PolicyRequest, policies: PoliciesDep) -> PolicyView:
    """Make a policy, which is due at once."""
    check_plugin(plugins.LISTERS, body.lister)
    policy_id = PolicyId(uuid.uuid4())
    async with db.transaction(policies.pool) as connection:
        await policies.add_policy(connection, policy_id=policy_id, **body.model_dump())
    return PolicyView.model_validate(await policies.policy(policy_id))


@router.put(
    "/policies/{policy_id}", dependencies=[auth.require(Role.OPERATOR, every_project=True)]
)
async def change_policy(policy_id: UUID, body: PolicyRequest, policies: PoliciesDep) -> PolicyView:
    """Make the policy this, all but its name, and run it: what it has distributed follows."""
    check_plugin(plugins.LISTERS, body.lister)
    await policies.change_policy(policy_id, **body.model_dump(exclude={"name"}))
    return PolicyView.model_validate(await policies.policy(policy_id))


@router.get("/policies", dependencies=[auth.require(Role.READER, every_project=True)])
async def list_policies(
    policies: PoliciesDep, limit: Limit = 100, marker: str | None = None
) -> PolicyList:
    """Policies by name."""
    records: list[Policy] = await policies.policies(limit=limit, marker=marker)
    return PolicyList(
        policies=[PolicyView.model_validate(record) for record in records],
        next_marker=records[-1].name if len(records) == limit else None,
    )


@router.get("/policies/{policy_id}", dependencies=[auth.require(Role.READER, every_project=True)])
async def show_policy(policy_id: UUID, policies: PoliciesDep) -> PolicyView:
    """One policy."""
    return PolicyView.model_validate(await policies.policy(policy_id))


@router.post(
    "/policies/{policy_id}/run",
    status_code=202,
    dependencies=[auth.require(Role.OPERATOR, every_project=True)],
)
async def run_policy(policy_id: UUID, policies: PoliciesDep) -> PolicyView:
    """Run it now."""
    await policies.run_policy_now(policy_id)
    return PolicyView.model_validate(await policies.policy(policy_id))


@router.delete(
    "/policies/{policy_id}",
    status_code=204,
    dependencies=[auth.require(Role.OPERATOR, every_project=True)],
)
async def delete_policy(policy_id: UUID, policies: PoliciesDep) -> None:
    """Remove the policy; what it distributed stays."""
    await policies.remove_policy(policy_id)
