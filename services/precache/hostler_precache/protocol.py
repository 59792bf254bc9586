"""What precache and its agents say to each other over HTTP.

An agent asks what it should have (`Desired`), and tells every few seconds what it has and how
far it is (`HostReport`); the answer (`ReportReply`) names its neighbours in each swarm. Reports
are totals, not steps, so a report lost or sent twice changes nothing.
"""

from enum import StrEnum
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from hostler_precache.images import IMAGE_ID_PATTERN

PAUSED = "paused"  # the reason of a host that has heard that it is to wait
REASON_CHARACTERS = 500  # a longer reason is cut by who reports it
HOST_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,252}$"
HostName = Annotated[str, Field(pattern=HOST_PATTERN)]
Url = Annotated[str, Field(pattern=r"^https?://[^\s/\x00]+(/[^\s\x00]*)?$", max_length=500)]
Reason = Annotated[
    # NUL is legal in JSON and in no column
    str, Field(max_length=REASON_CHARACTERS), AfterValidator(lambda text: text.replace("\0", ""))
]
COVERAGE_BUCKETS = 64
Coverage = Annotated[str, Field(pattern=rf"^[0-9a-f]{{0,{COVERAGE_BUCKETS}}}$")]
Hex = Annotated[str, Field(pattern=r"^([0-9a-f]{2})+$", max_length=128)]
UUID_PATTERN = r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"
BlobIdText = Annotated[str, Field(pattern=UUID_PATTERN)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
LabelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,62}$")]
LabelValue = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{0,63}$")]
Labels = Annotated[dict[LabelName, LabelValue], Field(max_length=32)]


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


class Neighbour(_Wire):
    """A host that has, or is getting, the same blob."""

    host: HostName
    url: Url
    in_rack: bool = Field(True, description="whether it shares the asking host's rack")


class DesiredImage(_Wire):
    """An image that a host should have, with all it needs to fetch it."""

    distribution_id: BlobIdText
    image_id: Annotated[str, Field(pattern=IMAGE_ID_PATTERN)]
    blob_id: BlobIdText
    root: Hex | None = Field(
        None, description="null while the seed still fetches: ask for the blob's growth"
    )
    size_bytes: Count
    disk_format: str | None = None
    priority: int = 0
    paused: bool = Field(
        False, description="keep what is here and fetch nothing more until it is told otherwise"
    )
    limit_bytes_per_second: Count | None = Field(
        None, description="how fast this host may fetch this blob; None: as fast as it can"
    )
    seeds: list[Url]
    neighbours: list[Neighbour] = Field(
        default=[], description="known before the fanout: who else is told to get it"
    )
    token: str
    swarm_key: Hex


class Desired(_Wire):
    """All that a host should have, most urgent first."""

    images: list[DesiredImage]
    deleted_image_ids: list[str] = Field(
        default=[], description="deleted at their source lately: gone here as soon as none uses it"
    )


class BlobReport(_Wire):
    """Where a host is with one image. Byte counts are totals of this run of the agent."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    distribution_id: BlobIdText
    blob_id: BlobIdText
    state: HostState
    reason: Reason | None = None
    pieces_done: Count = 0
    bytes_done: Count = 0
    bytes_from_seed: Count = 0
    bytes_from_peers: Count = 0
    bytes_from_rack: Count = Field(0, description="those of the peers' that came from the rack")
    bytes_wasted: Count = Field(0, description="received, and of no use: wrong or had already")
    sent_bytes: dict[BlobIdText, Count] = Field(
        default={}, description="sent of this blob, by the distribution it was sent for"
    )
    swarm_version: Annotated[str, Field(max_length=100)] = Field(
        "", description="of the swarm that the host goes by: it is not told again what it knows"
    )
    coverage: Coverage = Field(
        "", description="a digit a 64th of the image: how many sixteenths of it are verified"
    )
    banned: list[HostName] = Field(default=[], description="peers that sent bad pieces")


class HostReport(_Wire):
    """What an agent says of itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: Url = Field(description="where this host serves pieces")
    session_id: BlobIdText = Field(description="one run of the agent: its totals start at 0")
    sequence: Count | None = Field(
        None,
        description="grows from report to report of a session: of two the larger one is meant",
    )
    free_bytes: Count | None = None
    link_bytes_per_second: Count | None = Field(None, description="what its network card can do")
    labels: Labels = Field(default={}, description="`rack` decides who is whose neighbour")
    blobs: Annotated[list[BlobReport], Field(max_length=1000)] = []


class Swarm(_Wire):
    """Who to ask for the pieces of a blob."""

    seeds: list[Url]
    neighbours: list[Neighbour]
    limit_bytes_per_second: Count | None = None
    version: str = Field("", description="changes whenever anything of it may have changed")


class Growth(_Wire):
    """What a host is to know of a blob's pieces, from the first that it asked for on."""

    size_bytes: Count
    piece_bytes: Count
    first_piece: Count
    digests: str = Field(description="the sha256 of each piece, one after the other, in base64")
    root: Hex | None = Field(
        None, description="closes the list: all digests are told, and this is their root"
    )
    pause_seconds: float = Field(0.0, ge=0, description="ask again no sooner")


class ReportReply(_Wire):
    """The swarms of the blobs that the host is still getting, as far as it does not know them."""

    swarms: dict[str, Swarm]
    look_again: bool = Field(False, description="what the host should have has changed: ask now")
