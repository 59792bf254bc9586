"""The hub's state in PostgreSQL: what subscribers asked for, and how far each was told.

A turn of work is claimed by moving its next time ahead, and given back by its outcome: a process
that dies in between leaves it to whoever comes after that time. No transaction is open while a
subscriber is called. What a delivery moves is where it began (`after_seq`): a straggler whose claim
was taken over changes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import asyncpg

from hostler_common import db, errors
from hostler_usage.feeds.websub import Mode, Request
from hostler_usage.history.paging import Scope, visible_projects

CLAIM_SECONDS = 60
"""Longer than a call and its document may take."""


class SubscriptionNotFound(errors.NotFound):
    """There is no such subscription, or none that the caller may see."""

    code = "usage.hub.subscription_not_found"


class TooManySubscriptions(errors.TooMany):
    """The caller has as many subscriptions and requests as one may have."""

    code = "usage.hub.too_many_subscriptions"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A claimed request: to verify that a subscriber wants it, or to tell it that it is denied.

    `lease_seconds` is no more than is left of the token: nothing or less where that has ended.
    """

    id: int
    mode: str
    topic: str
    callback: str
    lease_seconds: int
    token_ends_at: datetime | None
    secret: str | None
    reason: str
    caller: str
    scope: Scope
    attempts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed:
    """A claimed subscription whose topic may have news."""

    id: int
    topic: str
    callback: str
    secret: str | None
    caller: str
    scope: Scope
    verified_at: datetime
    after_seq: int
    failures: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HubStore:
    """Subscriptions and requests. A caller may have `most` of both together."""

    pool: db.Pool
    most: int = 1000

    # --- requests

    async def ask(
        self,
        request: Request,
        *,
        lease_seconds: int,
        caller: str,
        scope: Scope,
        token_ends_at: datetime | None = None,
    ) -> None:
        """The request waits to be verified; where the caller's token ends by itself, no longer than to that.

        Raises:
            TooManySubscriptions: the caller has `most` already.
            DatabaseUnavailable: nothing was changed.
        """
        async with db.transaction(self.pool) as connection:
            has = await connection.fetchval(
                "SELECT (SELECT count(*) FROM hub_request WHERE caller = $1)"
                " + (SELECT count(*) FROM hub_subscription WHERE caller = $1"
                "    AND (callback, topic) <> ($2, $3))",
                caller,
                request.callback,
                request.topic,
            )
            if has >= self.most:
                raise TooManySubscriptions(f"{caller} has {has} subscriptions and requests")
            await connection.execute(
                "INSERT INTO hub_request (mode, topic, callback, lease_seconds, secret, caller,"
                " projects, token_ends_at) VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
                str(request.mode),
                request.topic,
                request.callback,
                lease_seconds,
                request.secret,
                caller,
                visible_projects(scope),
                token_ends_at,
            )

    async def claim_request(self) -> Asked | None:
        """A request that is due; of those about one callback and topic, the oldest.

        Raises:
            DatabaseUnavailable: nothing was claimed, or the claim runs out.
        """
        async with db.connection(self.pool) as connection:
            row = await connection.fetchrow(
                "UPDATE hub_request SET next_at = now() + make_interval(secs => $1),"
                " attempts = attempts + 1 WHERE id = (SELECT id FROM hub_request AS r"
                "  WHERE next_at <= now() AND NOT EXISTS (SELECT FROM hub_request AS earlier"
                "   WHERE earlier.callback = r.callback AND earlier.topic = r.topic"
                "   AND earlier.id < r.id) ORDER BY next_at LIMIT 1 FOR UPDATE SKIP LOCKED)"
                " RETURNING id, mode, topic, callback, least(lease_seconds,"
                "  floor(extract(epoch FROM token_ends_at - now())))::integer AS lease_seconds,"
                " token_ends_at, secret, reason, caller, projects, attempts",
                CLAIM_SECONDS,
            )
        return None if row is None else Asked(**_with_scope(row))

    async def verified(self, asked: Asked) -> None:
        """What was asked for holds: the subscription is there and new, renewed, or gone.

        A renewed one goes on where it was; a new one begins with what is settled from now on. It ends
        with the token that asked for it; where that has ended meanwhile, nothing is changed.

        Raises:
            DatabaseUnavailable: the request is verified anew.
        """
        async with db.transaction(self.pool) as connection:
            if not await _take(connection, asked.id):
                return
            if asked.mode != Mode.SUBSCRIBE:
                await connection.execute(
                    "DELETE FROM hub_subscription WHERE (callback, topic) = ($1, $2)",
                    asked.callback,
                    asked.topic,
                )
                return
            await connection.execute(
                "INSERT INTO hub_subscription AS s (topic, callback, secret, caller, projects,"
                " expires_at, after_seq) SELECT $1, $2, $3, $4, $5,"
                " least(now() + make_interval(secs => $6), $7), settled_seq FROM feed_clock"
                " WHERE coalesce($7::timestamptz > now(), true)"
                " ON CONFLICT (callback, topic) DO UPDATE SET secret = excluded.secret,"
                " caller = excluded.caller, projects = excluded.projects, verified_at = now(),"
                " expires_at = excluded.expires_at, failures = 0,"
                # one that is just being told keeps its claim
                " next_at = CASE WHEN s.failures > 0 THEN now() ELSE s.next_at END,"
                " after_seq = CASE WHEN s.expires_at <= now() THEN excluded.after_seq"
                "  ELSE s.after_seq END",
                asked.topic,
                asked.callback,
                asked.secret,
                asked.caller,
                visible_projects(asked.scope),
                asked.lease_seconds,
                asked.token_ends_at,
            )

    async def dropped(self, asked: Asked) -> None:
        """The request is over, and changed nothing.

        Raises:
            DatabaseUnavailable: it is tried again.
        """
        async with db.transaction(self.pool) as connection:
            await _take(connection, asked.id)

    async def put_off(self, asked: Asked, seconds: float) -> None:
        """The request is tried again after that time.

        Raises:
            DatabaseUnavailable: it is tried again when its claim has run out.
        """
        async with db.connection(self.pool) as connection:
            await connection.execute(
                "UPDATE hub_request SET next_at = now() + make_interval(secs => $2)"
                " WHERE id = $1 AND attempts = $3",
                asked.id,
                seconds,
                asked.attempts,
            )

    # --- subscriptions

    async def claim_subscription(self) -> Claimed | None:
        """A subscription that lasts, is due, and whose topic may have news.

        Raises:
            DatabaseUnavailable: nothing was claimed, or the claim runs out.
        """
        async with db.connection(self.pool) as connection:
            row = await connection.fetchrow(
                "UPDATE hub_subscription SET next_at = now() + make_interval(secs => $1)"
                " WHERE id = (SELECT id FROM hub_subscription WHERE next_at <= now()"
                "  AND expires_at > now() AND after_seq < (SELECT settled_seq FROM feed_clock)"
                "  ORDER BY next_at LIMIT 1 FOR UPDATE SKIP LOCKED)"
                " RETURNING id, topic, callback, secret, caller, projects, verified_at,"
                " after_seq, failures",
                CLAIM_SECONDS,
            )
        return None if row is None else Claimed(**_with_scope(row))

    async def told(self, claimed: Claimed, through: int, answer: str | None) -> None:
        """The subscriber knows of everything up to `through`; `answer` is None where there was no news.

        Raises:
            DatabaseUnavailable: it is told once more.
        """
        async with db.connection(self.pool) as connection:
            await connection.execute(
                "UPDATE hub_subscription SET after_seq = $3, failures = 0, next_at = now(),"
                " last_answer = coalesce($4, last_answer),"
                " deliveries = deliveries + ($4::text IS NOT NULL)::integer,"
                " delivered_at = CASE WHEN $4::text IS NULL THEN delivered_at ELSE now() END"
                " WHERE id = $1 AND after_seq = $2",
                claimed.id,
                claimed.after_seq,
                through,
                answer,
            )

    async def failed(self, claimed: Claimed, seconds: float, answer: str) -> None:
        """The delivery is tried again after that time.

        Raises:
            DatabaseUnavailable: it is tried again when its claim has run out.
        """
        async with db.connection(self.pool) as connection:
            await connection.execute(
                "UPDATE hub_subscription SET failures = $3, last_answer = $4,"
                " next_at = now() + make_interval(secs => $5)"
                " WHERE id = $1 AND after_seq = $2 AND failures = $3 - 1",
                claimed.id,
                claimed.after_seq,
                claimed.failures + 1,
                answer,
                seconds,
            )

    async def ended(self, claimed: Claimed, reason: str | None) -> None:
        """The subscription is gone, unless it was renewed meanwhile.

        Its subscriber will be told that it is denied, with the reason; not where there is none.

        Raises:
            DatabaseUnavailable: it is still there.
        """
        async with db.transaction(self.pool) as connection:
            row = await connection.fetchrow(
                "DELETE FROM hub_subscription WHERE id = $1 AND verified_at = $2"
                " RETURNING topic, callback, caller",
                claimed.id,
                claimed.verified_at,
            )
            if row is not None and reason is not None:
                await _denied(connection, row, reason)

    async def expire(self) -> int:
        """Subscriptions whose lease has ended are gone; how many those were.

        Raises:
            DatabaseUnavailable: they are still there, and not told of anything.
        """
        async with db.connection(self.pool) as connection:
            status = await connection.execute(
                "DELETE FROM hub_subscription WHERE expires_at <= now()"
            )
        return int(status.rpartition(" ")[2])

    async def subscriptions(
        self, *, caller: str | None, after_id: int, limit: int
    ) -> list[asyncpg.Record]:
        """Subscriptions in the order of their ids, those of one caller or all; without secrets.

        Raises:
            DatabaseUnavailable: the database is away.
        """
        async with db.connection(self.pool) as connection:
            return await connection.fetch(
                "SELECT s.id, topic, callback, caller, projects, secret IS NOT NULL AS is_signed,"
                " verified_at, expires_at, failures, deliveries, delivered_at, last_answer,"
                " greatest(settled_seq - after_seq, 0) AS behind"
                " FROM hub_subscription AS s, feed_clock"
                " WHERE s.id > $2 AND ($1::text IS NULL OR caller = $1) ORDER BY s.id LIMIT $3",
                caller,
                after_id,
                limit,
            )

    async def deny(self, subscription_id: int, reason: str) -> None:
        """The subscription is gone, and its subscriber will be told that it is denied.

        Raises:
            SubscriptionNotFound: there is none.
            DatabaseUnavailable: nothing was changed.
        """
        async with db.transaction(self.pool) as connection:
            row = await connection.fetchrow(
                "DELETE FROM hub_subscription WHERE id = $1 RETURNING topic, callback, caller",
                subscription_id,
            )
            if row is None:
                raise SubscriptionNotFound(f"there is no subscription {subscription_id}")
            await _denied(connection, row, reason)


async def _denied(connection: db.Connection, gone: asyncpg.Record, reason: str) -> None:
    """The subscriber of what is gone will be told that it is denied."""
    await connection.execute(
        "INSERT INTO hub_request (mode, topic, callback, lease_seconds, caller, reason)"
        " VALUES ('denied', $1, $2, 0, $3, $4)",
        gone["topic"],
        gone["callback"],
        gone["caller"],
        reason,
    )


async def _take(connection: db.Connection, request_id: int) -> bool:
    """Whether the request was still there; it is not any more."""
    taken = await connection.fetchval(
        "DELETE FROM hub_request WHERE id = $1 RETURNING true", request_id
    )
    return taken is not None


def _with_scope(row: asyncpg.Record) -> dict[str, Any]:
    values: dict[str, Any] = dict(row)
    projects: Sequence[str] | None = values.pop("projects")
    return {**values, "scope": None if projects is None else frozenset(projects)}
