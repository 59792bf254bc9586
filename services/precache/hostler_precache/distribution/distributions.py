"""The nouns of the service: a blob, a distribution, a host's part in it, a policy.

Values as the store gives them and the API shows them; what may happen to them is the store's
statements' and the jobs' matter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import NewType
from uuid import UUID, uuid4

from hostler_precache.distribution.rollout import Rollout
from hostler_precache.images import Image, Verification
from hostler_precache.transfer.manifest import BlobId

DistributionId = NewType("DistributionId", UUID)
PolicyId = NewType("PolicyId", UUID)


def new_distribution_id() -> DistributionId:
    """A fresh id."""
    return DistributionId(uuid4())


class DistributionState(StrEnum):
    """Where a distribution is."""

    FETCHING = "fetching"
    DISTRIBUTING = "distributing"
    PAUSED = "paused"
    DONE = "done"
    ERROR = "error"
    CANCELLED = "cancelled"

    @property
    def is_over(self) -> bool:
        """Whether nothing more happens by itself."""
        return self in (
            DistributionState.DONE,
            DistributionState.ERROR,
            DistributionState.CANCELLED,
        )


class BlobState(StrEnum):
    """Where a blob is."""

    FETCHING = "fetching"
    READY = "ready"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobRecord:
    """A blob as the database knows it. Without a `seed_url` it is on hosts only."""

    blob_id: BlobId
    image_id: str
    state: BlobState
    reason: str | None
    seed: str
    seed_url: str | None
    swarm_key: bytes
    fetched_bytes: int
    size_bytes: int | None
    root: bytes | None
    verification: Verification | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """What hosts are told of the pieces of a blob, from `first_piece` on; with a root, that is all."""

    size_bytes: int
    piece_bytes: int
    first_piece: int
    digests: bytes
    root: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchTask:
    """A fetch that this replica has the lease of, and what hosts were told in earlier attempts."""

    blob_id: BlobId
    image: Image
    swarm_key: bytes
    attempts: int
    told: Growth | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRecord:
    """An image with the state of its bytes, None while nobody wanted them."""

    image: Image
    blob: BlobRecord | None
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class HostProgress:
    """Where one host is with one distribution, and what it moved for it; not there, if it is silent."""

    host: str
    is_there: bool
    state: str
    reason: str | None
    pieces_done: int
    bytes_done: int
    sent_bytes: int
    received_from_seed_bytes: int
    received_from_peers_bytes: int
    received_from_rack_bytes: int
    wasted_bytes: int
    coverage: str
    wave: int
    link_bytes_per_second: int | None
    started_at: datetime | None
    updated_at: datetime
    finished_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """An image wanted on hosts, and how far it is, with the senders' own counts."""

    distribution_id: DistributionId
    image_id: str
    blob_id: str | None
    policy_id: PolicyId | None
    hosts: Sequence[str] | None
    labels: Mapping[str, str]
    percent: int | None
    rollout: Rollout
    wave: int
    is_open: bool
    paused_reason: str | None
    deadline_met: bool | None
    priority: int
    state: DistributionState
    reason: str | None
    failures: int
    last_failure: str | None
    retry_at: datetime | None
    size_bytes: int | None
    fetched_bytes: int
    fetched_at: datetime | None
    verification: str | None
    seed_sent_bytes: int
    peers_sent_bytes: int
    host_states: Mapping[str, int]
    created_at: datetime
    announced_at: datetime | None
    finished_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveDistribution:
    """A distribution on its way, with what the periodic work decides from."""

    distribution_id: DistributionId
    blob: BlobRecord | None
    rollout: Rollout
    wave: int
    is_paused: bool
    is_open: bool
    deadline_met: bool | None
    canary_states: Mapping[str, int]
    host_states: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostEnded:
    """A host that has come to an end with a distribution, the `index`th of `total`."""

    distribution_id: DistributionId
    image_id: str
    host: str
    state: str
    index: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageOnHosts:
    """What a distribution is of, and the hosts that it is to, by name."""

    distribution_id: DistributionId
    image_id: str
    state: DistributionState
    hosts: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A host that a distribution would choose; not known where no agent has spoken for it."""

    host: str
    is_known: bool
    free_bytes: int | None
    link_bytes_per_second: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HostRecord:
    """A host that an agent has spoken for."""

    host: str
    url: str
    free_bytes: int | None
    link_bytes_per_second: int | None
    labels: Mapping[str, str]
    images: int
    first_seen_at: datetime
    seen_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A lister, the hosts its images belong on, and how its last run went."""

    policy_id: PolicyId
    name: str
    lister: str
    options: Mapping[str, object]
    hosts: Sequence[str] | None
    priority: int
    labels: Mapping[str, str]
    every_seconds: int
    next_run_at: datetime
    last_run_at: datetime | None
    last_outcome: str | None
    last_detail: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A blob that a host should have, for a distribution."""

    distribution_id: DistributionId
    image_id: str
    disk_format: str | None
    priority: int
    is_paused: bool
    blob: BlobRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A host in the swarm of a blob: it has it, or is told to get it; not there, if it was silent for long."""

    host: str
    url: str
    rack: str | None
    is_there: bool
    is_moving: bool
    distribution_ids: Sequence[DistributionId]


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmRule:
    """What a distribution lets its hosts do with a blob."""

    is_halted: bool
    host_bytes_per_second: int | None
    total_bytes_per_second: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmRecord:
    """The swarm of a blob as the database knows it."""

    seeds: Sequence[str]
    rules: Mapping[DistributionId, SwarmRule]
    members: Sequence[Member]
