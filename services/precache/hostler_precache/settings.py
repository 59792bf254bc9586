"""Settings of the service and of its part of the agent."""

import socket
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr
from pydantic_settings import NoDecode

from hostler_common import settings
from hostler_precache import protocol
from hostler_precache.distribution.bound import ASSUMED_LINK_BYTES_PER_SECOND
from hostler_precache.placing import placement
from hostler_precache.swarming import swarm


def _labels(value: object) -> object:
    """`rack=r7,zone=a` as a mapping."""
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in value.split(",") if part.strip()]
    if any(not equals for _, equals, _ in pairs):
        raise ValueError("labels are name=value, separated by commas")
    return {name.strip(): text.strip() for name, _, text in pairs}


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
    upload_slots: int = Field(4, ge=1, le=256, description="pieces sent at once")
    server: str = Field(
        "http", description="what sends pieces, of the entry points hostler.precache.servers"
    )
    glance_url: str | None = Field(
        None,
        description="endpoint of Glance, without /v2; Keystone's catalogue names it otherwise",
    )
    glance_token_file: Path | None = Field(
        None, description="a token for Glance where there is no keystone_url; nobody renews it"
    )
    glance_amqp_url: SecretStr | None = Field(
        None,
        description="the broker that Glance notifies on: policies run when images change there",
    )
    glance_exchange_durable: bool = Field(
        False, description="durability of exchange glance if it is absent (amqp_durable_queues)"
    )
    keystone_url: str | None = Field(None, description="Keystone v3, for Glance and Swift")
    keystone_application_credential_id: str | None = None
    keystone_username: str | None = Field(
        None, description="a user with a password, instead of an application credential"
    )
    keystone_user_domain: str = "Default"
    keystone_project: str | None = Field(None, description="the user's project")
    keystone_project_domain: str = "Default"
    keystone_secret_file: Path | None = Field(
        None, description="the application credential's secret, or the user's password"
    )
    keystone_region: str | None = Field(None, description="whose endpoints are taken")
    keystone_interface: Literal["public", "internal", "admin"] = "public"
    swift_auth_url: str | None = Field(
        None, description="Swift's own v1 authentication; without it, Keystone's token is used"
    )
    swift_user: str | None = Field(None, description="account:user at swift_auth_url")
    swift_key_file: Path | None = None
    usage_url: str | None = Field(
        None, description="hostler's usage service, which the demand lister asks"
    )
    lister_seconds: float = Field(
        300.0,
        gt=0,
        description="a lister that has not answered for so long has failed: other policies wait for it",
    )
    convert_to_raw: bool = Field(
        True,
        description="qcow2, vmdk, vhd, vhdx and vdi images reach hosts as raw disks, as with Nova's"
        " force_raw_images",
    )
    file_roots: settings.CommaList = Field(
        default=[], description="directories that the file fetcher may read"
    )
    transient_quorum_queue: bool = Field(
        False, description="oslo.messaging's rabbit_transient_quorum_queue of the cloud"
    )
    link_bytes_per_second: int = Field(
        ASSUMED_LINK_BYTES_PER_SECOND, ge=1, description="what the seeds' network cards can do"
    )
    cluster_bytes_per_second: int | None = Field(
        None,
        ge=1_000_000,
        lt=2**63,
        description="what the hosts of all distributions together may fetch, shared out among those"
        " that move",
    )
    seed_keep_seconds: float = Field(
        7 * 86400.0, ge=0, description="how long an image that nobody wants stays on this disk"
    )
    seed_silent_seconds: float = Field(
        900.0,
        gt=5,
        description="a replica that is gone for so long has no images any more: what hosts wait for"
        " is fetched again by another",
    )
    history_days: int = Field(
        30,
        ge=1,
        le=3650,
        description="when a distribution that failed or was cancelled is forgotten",
    )
    member_seconds: float = Field(
        30.0, gt=0, description="a host that has not reported for so long is nobody's neighbour"
    )
    canary_silent_seconds: float = Field(
        300.0, gt=0, description="a canary that is not heard of for so long is skipped"
    )
    peer_certificate_file: Path | None = Field(
        None, description="this peer's certificate: with key and CA, pieces travel over TLS"
    )
    peer_key_file: Path | None = Field(None, description="the certificate's private key")
    peer_ca_file: Path | None = Field(None, description="who signs the certificates of peers")
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
    placer: str = Field("nova", description="who owns that place: nova, directory, ironic")
    nova_config_files: settings.CommaList = Field(
        default=[], description="Nova's own files, which then say where its images are and how"
    )
    force_raw: bool = Field(
        True, description="whether images must be raw; nova_config_files say it for Nova"
    )
    keep_link: bool = Field(
        True, description="keep a hard link of what was placed, for when its owner removes it"
    )
    cache_bytes: int | None = Field(
        None,
        ge=0,
        description="what images placed here may take in all; as much as fits unless set",
    )
    cache_high_percent: float = Field(
        95.0, gt=0, le=100, description="of cache_bytes: above it, unwanted images are evicted ..."
    )
    cache_low_percent: float = Field(
        80.0, gt=0, le=100, description="... until no more than this is taken"
    )
    unwanted_seconds: float = Field(
        86400.0, ge=0, description="when an image that is not wanted any more is removed"
    )
    scrub_seconds: float = Field(
        7 * 86400.0, ge=0, description="how often each file is read and checked; 0: never"
    )
    scrub_bytes_per_second: int = Field(
        16 << 20, gt=0, description="how fast, so that guests do not feel it"
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
    requests: int = Field(
        swarm.REQUESTS,
        ge=1,
        le=64,
        description="pieces asked for at once, an image; most wait at the senders",
    )
    upload_slots: int = Field(2, ge=1, le=256, description="pieces sent at once")
    labels: Annotated[
        dict[protocol.LabelName, protocol.LabelValue], NoDecode, BeforeValidator(_labels)
    ] = Field(
        default={}, description="rack=r7,zone=a: hosts of a rack fetch from each other first"
    )
    link_bytes_per_second: int | None = Field(
        None,
        ge=1,
        description="what this host's network card can do; as its driver says, unless set",
    )
    peer_certificate_file: Path | None = Field(
        None, description="this peer's certificate: with key and CA, pieces travel over TLS"
    )
    peer_key_file: Path | None = Field(None, description="the certificate's private key")
    peer_ca_file: Path | None = Field(None, description="who signs the certificates of peers")
    peer_port: int = Field(
        8312, ge=0, le=65535, description="port that serves pieces over TLS, if they do"
    )
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
