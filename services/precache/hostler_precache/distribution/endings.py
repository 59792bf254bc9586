"""What is said on the bus when hosts, and with them distributions, come to an end."""

from collections.abc import Sequence

from hostler_common import db
from hostler_common.bus import Message
from hostler_precache import messages
from hostler_precache.distribution.distribution_store import DistributionStore
from hostler_precache.distribution.distributions import DistributionId, HostEnded
from hostler_precache.distribution.rollout import PRESENT


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
