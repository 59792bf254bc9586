"""The hub's and the feeds' periodic work: cut pages, verify requests, tell subscribers, end leases.

Each may run in every replica at once: what is claimed by one is not taken by another. Delivery is at
least once, in the order of arrival, one at a time for each subscription: what was told is written
down when the subscriber has said that it got it, so that a process killed in between tells it again.
A failing subscriber is tried again, ever more rarely, until its lease ends; it misses nothing.

What a subscriber is told is what its maker might see then and may see now: where tokens are in a
file, that file is asked at every delivery. Of signed tokens nothing is known between two requests:
there the lease is what ends a subscription, and it is no longer than the token was good for.
"""

import asyncio
import random
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from hostler_common import auth, logs
from hostler_usage.feeds import atom, websub
from hostler_usage.feeds.callbacks import Callbacks, CallFailedError
from hostler_usage.feeds.feed_store import FeedNotFound, FeedStore
from hostler_usage.feeds.hub_store import Asked, Claimed, HubStore
from hostler_usage.feeds.hub_topic import topic_feed
from hostler_usage.feeds.publish import Edition, Publisher
from hostler_usage.feeds.websub import Mode, Outcome
from hostler_usage.history.paging import Scope

log = logs.get(__name__)

TURN_SECONDS: Final = 20.0
"""A turn takes on nothing more after that: a loop that does not turn looks stuck."""
VERIFY_ATTEMPTS: Final = 4
DELIVERY_EVENTS: Final = 100


def _ignored(_: str) -> None:
    """Nobody counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedJobs:
    """The loops, each method one turn. `count` is told of every outcome by its name.

    `named` says who may call by a name now, or None where only a token that is shown tells
    (`auth.Verifier.named`).
    """

    feeds: FeedStore
    hub: HubStore
    publisher: Publisher
    callbacks: Callbacks
    named: Callable[[str], Sequence[auth.Principal] | None]
    at_once: int = 20
    count: Callable[[str], None] = _ignored

    async def settle(self) -> None:
        """The catalogue of pages reaches as far as it can.

        Raises:
            DatabaseUnavailable: the rest is catalogued in a later turn.
        """
        deadline = _now() + TURN_SECONDS
        while await self.feeds.settle() and _now() < deadline:
            pass

    async def expire(self) -> None:
        """Subscriptions whose lease has ended are gone.

        Raises:
            DatabaseUnavailable: they go in a later turn; they are not told of anything.
        """
        if ended := await self.hub.expire():
            log.info("subscriptions_expired", subscriptions=ended)

    async def verify(self) -> None:
        """Every request that is due was verified, refused or put off.

        Raises:
            DatabaseUnavailable: the rest waits for a later turn.
        """

        async def one() -> bool:
            asked = await self.hub.claim_request()
            if asked is not None:
                await self._answer(asked)
            return asked is not None

        await self._all(one)

    async def deliver(self) -> None:
        """Every subscriber whose topic has news, and who is not being waited for, was told.

        Raises:
            DatabaseUnavailable: the rest waits for a later turn.
        """

        async def one() -> bool:
            claimed = await self.hub.claim_subscription()
            if claimed is not None:
                await self._tell(claimed)
            return claimed is not None

        await self._all(one)

    async def _all(self, one: Callable[[], Awaitable[bool]]) -> None:
        """Calls `one` until it finds nothing to do; side by side, so that nobody waits for a slow subscriber."""
        deadline = _now() + TURN_SECONDS

        async def work() -> None:
            while _now() < deadline and await one():
                pass

        if await one():
            results = await asyncio.gather(
                *(work() for _ in range(self.at_once)), return_exceptions=True
            )
            for result in results:
                if isinstance(result, BaseException):
                    raise result

    # --- requests

    async def _answer(self, asked: Asked) -> None:
        if asked.mode == "denied":
            await self._deny(asked)
            return
        if asked.mode == Mode.SUBSCRIBE and asked.lease_seconds < 1:
            await self.hub.dropped(asked)
            self._note("lapsed", asked, reason="the token that asked has ended")
            return
        challenge = secrets.token_urlsafe(32)
        url = websub.verification_url(
            asked.callback,
            mode=Mode(asked.mode),
            topic=asked.topic,
            challenge=challenge,
            lease_seconds=asked.lease_seconds,
        )
        try:
            answer = await self.callbacks.get(url)
        except CallFailedError as exc:
            await self._put_off(asked, str(exc))
            return
        if websub.is_verified(answer.status, answer.body, challenge):
            await self.hub.verified(asked)
            self._note("verified", asked)
        else:
            await self.hub.dropped(asked)
            self._note("unverified", asked, reason=f"status {answer.status}")

    async def _deny(self, asked: Asked) -> None:
        url = websub.denial_url(asked.callback, topic=asked.topic, reason=asked.reason)
        try:
            await self.callbacks.get(url)
        except CallFailedError as exc:
            await self._put_off(asked, str(exc))
            return
        await self.hub.dropped(asked)
        self._note("denied", asked)

    async def _put_off(self, asked: Asked, reason: str) -> None:
        if asked.attempts >= VERIFY_ATTEMPTS:
            await self.hub.dropped(asked)
            self._note("unreachable", asked, reason=reason)
        else:
            await self.hub.put_off(asked, websub.backoff_seconds(asked.attempts, _spread()))

    def _note(self, outcome: str, asked: Asked, **fields: object) -> None:
        self.count(outcome)
        # the callback is what proves a subscriber: it is not for logs
        log.info(
            "subscription_answered",
            outcome=outcome,
            mode=asked.mode,
            topic=asked.topic,
            caller=asked.caller,
            **fields,
        )

    # --- deliveries

    async def _tell(self, claimed: Claimed) -> None:
        found = topic_feed(claimed.topic)
        if found is None:
            await self._end(claimed, "there is no such feed any more")
            return
        base, feed = found
        scope = self._scope(claimed)
        if scope is not None and not scope:
            await self._end(claimed, "whoever subscribed may see nothing of it any more")
            return
        try:
            page, through = await self.feeds.news(
                feed, scope=scope, after=claimed.after_seq, limit=DELIVERY_EVENTS
            )
        except FeedNotFound:
            await self._end(claimed, "whoever subscribed may not see it any more")
            return
        if not page.events:
            await self.hub.told(claimed, through, None)
            return
        edition = Edition(feed=feed, scope=scope, base=base, page=page)
        body = await self.publisher.document(edition)
        try:
            answer = await self.callbacks.post(
                claimed.callback, body, _headers(claimed, base, body)
            )
        except CallFailedError as exc:
            await self._failed(claimed, str(exc))
            return
        match websub.outcome(answer.status):
            case Outcome.DELIVERED:
                await self.hub.told(claimed, through, f"status {answer.status}")
                self.count("delivered")
            case Outcome.GONE:
                await self.hub.ended(claimed, None)
                self.count("gone")
                log.info("subscription_gone", topic=claimed.topic)
            case Outcome.FAILED:
                await self._failed(claimed, f"status {answer.status}")

    def _scope(self, claimed: Claimed) -> Scope:
        """What may be told now: the token of whoever subscribed may be gone, or see less than then."""
        holders = self.named(claimed.caller)
        if holders is None:
            return claimed.scope
        readers = [holder.projects for holder in holders if holder.has(auth.Role.READER)]
        return websub.present_scope(claimed.scope, readers)

    async def _end(self, claimed: Claimed, reason: str) -> None:
        await self.hub.ended(claimed, reason)
        self.count("ended")
        log.info("subscription_ended", topic=claimed.topic, caller=claimed.caller, reason=reason)

    async def _failed(self, claimed: Claimed, reason: str) -> None:
        delay = websub.backoff_seconds(claimed.failures + 1, _spread())
        await self.hub.failed(claimed, delay, reason)
        self.count("failed")
        if claimed.failures == 0:
            log.warning("delivery_failed", topic=claimed.topic, reason=reason)


def _headers(claimed: Claimed, base: str, body: bytes) -> dict[str, str]:
    headers = {
        "Content-Type": f"{atom.MEDIA_TYPE}; charset=utf-8",
        # the topic as it was subscribed to, however it spells its feed's name: by that subscribers know it
        "Link": f'<{base}/hub>; rel="hub", <{claimed.topic}>; rel="self"',
    }
    if claimed.secret is not None:
        headers["X-Hub-Signature"] = websub.signature(claimed.secret, body)
    return headers


def _now() -> float:
    return asyncio.get_running_loop().time()


def _spread() -> float:
    return random.random()  # noqa: S311  jitter, not a secret
