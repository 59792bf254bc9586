"""What precache and its agents say to each other over HTTP.

An agent asks what it should have (`Desired`), and tells every few seconds what it has and how
far it is (`HostReport`); the answer (`ReportReply`) names its neighbours in each swarm. Reports
are totals, not steps, so a report lost or sent twice changes nothing.
"""

from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from hostler_precache.images import IMAGE_ID_PATTERN

REASON_CHARACTERS = 500  # a longer reason is cut by who reports it
HOST_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,252}$"
HostName = Annotated[str, Field(pattern=HOST_PATTERN)]
Url = Annotated[str, Field(pattern=r"^https?://[^\s/]+(/[^\s]*)?$", max_length=500)]
Hex = Annotated[str, Field(pattern=r"^([0-9a-f]{2})+$", max_length=128)]
UUID_PATTERN = r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"
BlobIdText = Annotated[str, Field(pattern=UUID_PATTERN)]
Count = Annotated[int, Field(ge=0, lt=2**63)]


class HostState(StrEnum):
    """How far a host is with an image; Nova's words where Nova has one (`cached` to `skipped`)."""

    WAITING = "waiting"
    TRANSFERRING = "transferring"
    CACHED = "cached"
    EXISTING = "existing"
    ERROR = "error"
    UNSUPPORTED = "unsupported"
    SKIPPED = "skipped"

    @property
    def is_final(self) -> bool:
        """Whether nothing more is coming unless something changes."""
        return self not in (HostState.WAITING, HostState.TRANSFERRING)


class _Wire(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class DesiredImage(_Wire):
    """An image that a host should have, with all it needs to fetch it."""

    distribution_id: BlobIdText
    image_id: Annotated[str, Field(pattern=IMAGE_ID_PATTERN)]
    blob_id: BlobIdText
    root: Hex
    size_bytes: Count
    disk_format: str | None = None
    priority: int = 0
    seeds: list[Url]
    token: str
    swarm_key: Hex


class Desired(_Wire):
    """All that a host should have, most urgent first."""

    images: list[DesiredImage]


class BlobReport(_Wire):
    """Where a host is with one image. Byte counts are totals of this run of the agent."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    distribution_id: BlobIdText
    blob_id: BlobIdText
    state: HostState
    reason: Annotated[str, Field(max_length=REASON_CHARACTERS)] | None = None
    pieces_done: Count = 0
    bytes_done: Count = 0
    bytes_from_seed: Count = 0
    bytes_from_peers: Count = 0
    bytes_wasted: Count = Field(0, description="received, and of no use: wrong or had already")
    sent_bytes: dict[BlobIdText, Count] = Field(
        default={}, description="sent of this blob, by the distribution it was sent for"
    )
    banned: list[HostName] = Field(default=[], description="peers that sent bad pieces")


class HostReport(_Wire):
    """What an agent says of itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: Url = Field(description="where this host serves pieces")
    session_id: BlobIdText = Field(description="one run of the agent: its totals start at 0")
    free_bytes: Count | None = None
    blobs: Annotated[list[BlobReport], Field(max_length=1000)] = []


class Neighbour(_Wire):
    """A host that has, or is getting, the same blob."""

    host: HostName
    url: Url


class Swarm(_Wire):
    """Who to ask for the pieces of a blob."""

    seeds: list[Url]
    neighbours: list[Neighbour]


class ReportReply(_Wire):
    """The swarms of the blobs that the host is still getting."""

    swarms: dict[str, Swarm]
