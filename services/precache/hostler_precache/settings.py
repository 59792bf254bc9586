"""Settings of the service and of its part of the agent."""

import socket
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field, SecretStr

from hostler_common import settings
from hostler_precache import placement


class Settings(settings.Settings):
    """Settings of the precache service: environment `HOSTLER_PRECACHE_*`."""

    service: ClassVar[str] = "precache"

    http_port: int = Field(8301, ge=0, le=65535)
    public_url: str | None = Field(
        None, description="where agents reach the API, for those who only have the fanout"
    )
    blob_port: int = Field(8311, ge=0, le=65535, description="port that serves pieces")
    seed_url: str | None = Field(
        None, description="where agents reach blob_port; http://<http_host>:<blob_port> unless set"
    )
    seed_id: str = Field(
        default_factory=socket.gethostname, description="this replica's name, kept over restarts"
    )
    data_dir: Path = Field(Path("/var/lib/hostler/precache"), description="where images are kept")
    reserve_bytes: int = Field(1 << 30, ge=0, description="what stays free where images are kept")
    fetch_concurrency: int = Field(2, ge=1, le=16)
    fetch_attempts: int = Field(5, ge=1, description="tries before a transient failure is final")
    upload_slots: int = Field(8, ge=1, le=256, description="pieces sent at once")
    glance_url: str | None = Field(None, description="endpoint of Glance, without /v2")
    glance_token_file: Path | None = Field(None, description="a token for Glance")
    file_roots: settings.CommaList = Field(
        default=[], description="directories that the file fetcher may read"
    )
    transient_quorum_queue: bool = Field(
        False, description="oslo.messaging's rabbit_transient_quorum_queue of the cloud"
    )
    member_seconds: float = Field(
        30.0, gt=0, description="a host that has not reported for so long is nobody's neighbour"
    )
    token_seconds: int = Field(86400, ge=60, description="how long a swarm token opens a blob")
    lease_seconds: float = Field(
        30.0, gt=0, description="a fetch whose replica is silent for so long is taken over"
    )


class AgentSettings(settings.ProcessSettings):
    """Settings of the agent's part: environment `HOSTLER_PRECACHE_*` on a compute host."""

    service: ClassVar[str] = "precache"

    precache_url: str = Field(description="where the precache API is")
    advertise_url: str | None = Field(
        None, description="where other hosts reach this agent's HTTP port"
    )
    target_dir: Path = Field(
        Path("/var/lib/nova/instances/_base"), description="where images are placed"
    )
    target_template: Annotated[str, AfterValidator(placement.check_template)] = Field(
        placement.NOVA_TEMPLATE, description="file name, from {image_id} or {sha1}"
    )
    replace_differing: bool = Field(
        False, description="replace a file of that name whose content is another one"
    )
    unsupported_reason: str | None = Field(
        None, description="set where images cannot be placed in files, as with images_type=rbd"
    )
    max_image_bytes: int | None = Field(None, ge=0, description="larger images are skipped")
    reserve_bytes: int = Field(1 << 30, ge=0, description="what stays free beside images")
    downloads: int = Field(2, ge=1, le=16, description="images fetched at once")
    requests: int = Field(6, ge=1, le=64, description="pieces on their way at once, an image")
    upload_slots: int = Field(4, ge=1, le=256, description="pieces sent at once")
    desired_seconds: float = Field(120.0, gt=0, description="how often the desired state is asked")
    report_seconds: float = Field(2.0, gt=0, description="how often progress is told")
    retry_seconds: float = Field(60.0, gt=0, description="when a failed image is tried again")
    verify_whole: bool = Field(
        False, description="read the whole file once more before it is placed"
    )
    transient_quorum_queue: bool = Field(
        False, description="oslo.messaging's rabbit_transient_quorum_queue of the cloud"
    )


def read_secret(path: Path | None) -> SecretStr | None:
    """The content of a secret's file, or None where there is none.

    Raises:
        settings.SettingsError: it cannot be read.
    """
    if path is None:
        return None
    try:
        return SecretStr(path.read_text().strip())
    except OSError as exc:
        raise settings.SettingsError(f"{path}: {exc.strerror}") from exc
