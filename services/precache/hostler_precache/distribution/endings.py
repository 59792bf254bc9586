"""What is said on the bus when distributions begin, and when hosts, and with them distributions, come to an end.

What hosts do is said in Nova's words (`aggregate.cache_images.*`), so that who listens to Nova's own
notifications of an aggregate can listen to these; what is only ours is said in our own.
"""

from collections.abc import Collection, Sequence

from hostler_common import db, outbox
from hostler_common.bus import EventType, Message
from hostler_precache import messages
from hostler_precache.distribution.distribution_store import DistributionStore
from hostler_precache.distribution.distributions import DistributionId, HostEnded, ImageOnHosts
from hostler_precache.distribution.rollout import PRESENT


async def beginnings_of(
    connection: db.Connection,
    distributions: DistributionStore,
    begun: Collection[DistributionId],
) -> list[Message]:
    """An event for each distribution whose hosts may begin to get the image, if it was not told before."""
    started = await distributions.tell_started(connection, begun) if begun else []
    return [
        _aggregate(messages.CACHE_START, one)
        for one in await distributions.on_hosts(connection, started)
    ]


async def tell(distributions: DistributionStore) -> None:
    """Of every distribution that is over, however it came to that, it was told once that it has ended.

    What ends a distribution need not know of this: hosts that have all ended, an operator, a policy, an image that is
    gone, a fetch that failed. Call it every second or so.
    """
    while True:
        async with db.transaction(distributions.pool) as connection:
            ended = await distributions.tell_ended(connection)
            if not ended:
                return
            on_hosts = await distributions.on_hosts(connection, ended)
            await outbox.add(connection, [_aggregate(messages.CACHE_END, one) for one in on_hosts])


async def events_of(
    connection: db.Connection,
    distributions: DistributionStore,
    *,
    ended: Sequence[HostEnded],
    finished: Sequence[DistributionId],
) -> list[Message]:
    """An event for each host that ended, in Nova's words, and one for each distribution that is done."""
    events = [_progress(one) for one in ended]
    for distribution_id in finished:
        image_id, states = await distributions.host_states(connection, distribution_id)
        events.append(
            messages.DISTRIBUTION_FINISHED.message(
                messages.DistributionFinished(
                    distribution_id=str(distribution_id), image_id=image_id, hosts=states
                ),
                app_id=messages.APP_ID,
            )
        )
    return events


def _aggregate(
    event: EventType[messages.AggregateCacheImages], distribution: ImageOnHosts
) -> Message:
    """What Nova says of an aggregate when it begins to cache images there, and when it goes on no more."""
    state = distribution.state
    data = messages.AggregateData(
        uuid=str(distribution.distribution_id),
        name=distribution.image_id,
        hosts=list(distribution.hosts),
        metadata={"state": state.value} if state.is_over else {},
    )
    return event.message(
        messages.AggregateCacheImages(
            event_type=event.routing_key, payload=messages.AggregatePayload(data=data)
        ),
        app_id=messages.APP_ID,
    )


def _progress(ended: HostEnded) -> Message:
    """What Nova says when a host has cached an image, or could not."""
    has_it = ended.state in PRESENT
    return messages.CACHE_PROGRESS.message(
        messages.AggregateCacheProgress(
            payload=messages.AggregateCachePayload(
                data=messages.AggregateCacheData(
                    uuid=str(ended.distribution_id),
                    name=ended.image_id,
                    host=ended.host,
                    images_cached=[ended.image_id] if has_it else [],
                    images_failed=[] if has_it else [ended.image_id],
                    index=ended.index,
                    total=ended.total,
                )
            )
        ),
        app_id=messages.APP_ID,
    )
