"""The WebSub hub over HTTP (W3C Recommendation, section 5), and a list of who is subscribed.

A subscription sees what the caller saw who made it, until its lease ends, and less where the
caller's token is gone or sees less meanwhile (`hub_deliver`). Of a signed token nothing more is
heard once it was shown: what it subscribed to ends when it does, and is renewed with the next one.
Requests are answered before the subscriber is called: 202 says that the request was understood,
nothing more.
"""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import APIRouter, Form, Query, Request, Response
from pydantic import BaseModel, Field

from hostler_common import auth, errors, http
from hostler_usage.feeds import websub
from hostler_usage.feeds.feed import Kind
from hostler_usage.feeds.hub_store import HubStore
from hostler_usage.feeds.hub_topic import topic_feed
from hostler_usage.feeds.publish import Publisher
from hostler_usage.feeds.websub import BadRequestError, Lease, Mode, Network


@dataclass(frozen=True, slots=True, kw_only=True)
class HubTerms:
    """What the hub grants: how long leases are, and which networks may be called that usually may not."""

    lease: Lease = Lease()  # noqa: RUF009  frozen
    allowed: Sequence[Network] = ()


HubDep = Annotated[HubStore, http.state("hub")]
TermsDep = Annotated[HubTerms, http.state("hub_terms")]
PublisherDep = Annotated[Publisher, http.state("publisher")]

router = APIRouter(tags=["hub"])


class BadSubscription(errors.Invalid):
    """The request to subscribe or unsubscribe cannot be meant."""

    code = "usage.hub.request_invalid"


class TopicUnknown(errors.NotFound):
    """The topic is no feed of this service, or none that the caller may see."""

    code = "usage.hub.topic_unknown"


class CallbackForbidden(errors.Forbidden):
    """The callback is at an address that the hub does not call."""

    code = "usage.hub.callback_forbidden"


class Subscription(BaseModel):
    """A subscription as its owner may see it."""

    id: int
    topic: str
    callback: str | None = Field(description="null where it is another caller's")
    caller: str
    projects: list[str] | None = Field(description="null: all")
    is_signed: bool
    verified_at: datetime
    expires_at: datetime
    failures: int = Field(description="in a row")
    deliveries: int
    delivered_at: datetime | None
    last_answer: str | None
    behind: int = Field(
        description="0: it knows all that is settled; else how far it may be behind"
    )


class Subscriptions(BaseModel):
    """A page of subscriptions."""

    subscriptions: list[Subscription]
    next_marker: str | None


@router.post(
    "/hub",
    operation_id="hub_request",
    status_code=202,
    response_class=Response,
    dependencies=[auth.require(auth.Role.READER)],
)
async def hub_request(
    request: Request,
    hub: HubDep,
    terms: TermsDep,
    publisher: PublisherDep,
    caller: auth.Caller,
    mode: Annotated[str | None, Form(alias="hub.mode", max_length=100)] = None,
    topic: Annotated[str | None, Form(alias="hub.topic", max_length=4096)] = None,
    callback: Annotated[str | None, Form(alias="hub.callback", max_length=4096)] = None,
    lease_seconds: Annotated[str | None, Form(alias="hub.lease_seconds", max_length=100)] = None,
    secret: Annotated[str | None, Form(alias="hub.secret", max_length=1000)] = None,
) -> Response:
    """Subscribe to a feed or unsubscribe from it; the callback is asked whether that was its wish."""
    try:
        asked = websub.read_request(
            mode=mode, topic=topic, callback=callback, lease_seconds=lease_seconds, secret=secret
        )
    except BadRequestError as exc:
        raise BadSubscription(str(exc)) from exc
    base = publisher.base or str(request.base_url).rstrip("/")
    found = topic_feed(asked.topic)
    # whoever unsubscribes may do so from what there is no more
    if asked.mode is Mode.SUBSCRIBE:
        if found is None or found[0] != base:
            raise TopicUnknown(f"{asked.topic} is no feed at {base}")
        feed = found[1]
        if (
            caller.projects is not None
            and feed.kind is Kind.PROJECT
            and feed.key not in caller.projects
        ):
            raise TopicUnknown(f"{asked.topic} is no feed at {base}")
    if _is_out_of_reach(asked.callback, terms.allowed):
        raise CallbackForbidden("the hub does not call this machine, its link or multicast")
    await hub.ask(
        asked,
        lease_seconds=terms.lease.seconds(asked.lease_seconds, _token_lasts(caller)),
        caller=caller.name,
        scope=caller.projects,
        token_ends_at=caller.expires_at,
    )
    return Response(status_code=202)


@router.get(
    "/v1/hub/subscriptions",
    operation_id="list_subscriptions",
    dependencies=[auth.require(auth.Role.READER)],
)
async def list_subscriptions(
    hub: HubDep,
    caller: auth.Caller,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    marker: Annotated[int, Query(ge=0, le=2**63 - 1)] = 0,
) -> Subscriptions:
    """The caller's subscriptions; all of them for operators that may see every project."""
    sees_all = caller.projects is None and caller.has(auth.Role.OPERATOR)
    rows = await hub.subscriptions(
        caller=None if sees_all else caller.name, after_id=marker, limit=limit
    )
    # a callback is a secret between the hub and the subscriber
    found = [
        Subscription(
            **{**dict(row), "callback": row["callback"] if row["caller"] == caller.name else None}
        )
        for row in rows
    ]
    return Subscriptions(
        subscriptions=found,
        next_marker=str(found[-1].id) if len(found) == limit else None,
    )


@router.delete(
    "/v1/hub/subscriptions/{subscription_id}",
    operation_id="deny_subscription",
    status_code=204,
    dependencies=[auth.require(auth.Role.OPERATOR, every_project=True)],
)
async def deny_subscription(
    subscription_id: int,
    hub: HubDep,
    reason: Annotated[
        str, Query(max_length=200, pattern=r"^[^\x00]*$", description="told to the subscriber")
    ] = "ended by an operator",
) -> None:
    """End a subscription; its subscriber is told that it is denied."""
    await hub.deny(subscription_id, reason)


def _token_lasts(caller: auth.Principal) -> int | None:
    """For how many seconds the caller's token is good; None where it does not end by itself."""
    if caller.expires_at is None:
        return None
    return int((caller.expires_at - datetime.now(UTC)).total_seconds())


def _is_out_of_reach(callback: str, allowed: Sequence[Network]) -> bool:
    """Whether the callback names an address that is not called; names are judged when they are called."""
    try:
        address = ipaddress.ip_address((urlsplit(callback).hostname or "").partition("%")[0])
    except ValueError:
        return False
    return not websub.may_call(address, allowed)
