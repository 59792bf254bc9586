"""Who fetches from whom, and with what right: the service's side of the swarm.

The tracker is off the data path. A swarm goes on without it; it cannot grow.
"""

import time
from collections.abc import Mapping, Sequence

from hostler_common.bus import Message
from hostler_precache import messages, protocol, swarm, tokens
from hostler_precache.distributions import BlobRecord, DistributionId, Member, Wanted
from hostler_precache.envelope import CacheCall
from hostler_precache.manifest import BlobId


def grant(blob: BlobRecord, distribution_id: DistributionId, *, token_seconds: int) -> str:
    """A token for the blob, on behalf of the distribution."""
    return tokens.mint(
        tokens.Grant(
            blob_id=blob.blob_id,
            distribution_id=str(distribution_id),
            expires_at=int(time.time()) + token_seconds,
        ),
        blob.swarm_key,
    )


def desired_image(wanted: Wanted, *, token_seconds: int) -> protocol.DesiredImage:
    """What a host is told of an image that it should have."""
    blob = wanted.blob
    assert blob.root is not None
    assert blob.size_bytes is not None
    return protocol.DesiredImage(
        distribution_id=str(wanted.distribution_id),
        image_id=wanted.image_id,
        blob_id=blob.blob_id,
        root=blob.root.hex(),
        size_bytes=blob.size_bytes,
        disk_format=wanted.disk_format,
        priority=wanted.priority,
        seeds=[blob.seed_url],
        token=grant(blob, wanted.distribution_id, token_seconds=token_seconds),
        swarm_key=blob.swarm_key.hex(),
    )


def cache_call(
    blob: BlobRecord,
    distribution_id: DistributionId,
    *,
    public_url: str | None,
    token_seconds: int,
) -> CacheCall:
    """The fanout of a distribution: all that a host needs to fetch the image.

    The key of the swarm is not in it: a fanout is read by whoever is on the broker.
    """
    assert blob.root is not None
    meta: dict[str, object] = {
        "schema": "1.0",
        "distribution_id": str(distribution_id),
        "blob_id": blob.blob_id,
        "root": blob.root.hex(),
        "size_bytes": blob.size_bytes,
        "seeds": [blob.seed_url],
        "token": grant(blob, distribution_id, token_seconds=token_seconds),
    }
    if public_url is not None:
        meta["manifest_url"] = f"{public_url.rstrip('/')}/v1/blobs/{blob.blob_id}/manifest"
    return CacheCall(image_id=blob.image_id, meta=meta)


def announcements(
    blob: BlobRecord,
    distribution_ids: Sequence[DistributionId],
    *,
    public_url: str | None,
    token_seconds: int,
) -> list[Message]:
    """The fanout of each of these distributions of a blob that is ready."""
    return [
        messages.cache_message(
            cache_call(blob, one, public_url=public_url, token_seconds=token_seconds)
        )
        for one in distribution_ids
    ]


def swarm_of(
    host: str,
    blob_id: BlobId,
    members: Sequence[Member],
    *,
    seeds: Sequence[str],
    banned: Sequence[str],
) -> protocol.Swarm:
    """Whom a host is to ask for a blob: its neighbours in the graph over all members."""
    urls: Mapping[str, str] = {member.host: member.url for member in members}
    chosen = swarm.neighbours(host, urls, key=blob_id)
    return protocol.Swarm(
        seeds=list(seeds),
        neighbours=[
            protocol.Neighbour(host=other, url=urls[other])
            for other in chosen
            if other not in banned
        ],
    )
