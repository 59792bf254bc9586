"""Settings of baremetal: `HOSTLER_BAREMETAL_<NAME>`."""

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from hostler_common import settings


class Settings(settings.Settings):
    """What an operator can set."""

    service: ClassVar[str] = "baremetal"

    http_port: int = Field(8304, ge=0, le=65535)
    credentials_key_file: Path = Field(
        description="keys that BMC secrets are sealed with: a line each, id:base64 of 32 bytes"
    )
    proxy_host: str = Field(
        "baremetal",
        min_length=1,
        max_length=100,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="the host that the nodes are reported under; all replicas have the same",
    )
    poll_seconds: float = Field(60.0, gt=0, description="between looks at a node's power")
    poll_backoff_max_seconds: float = Field(
        900.0, gt=0, description="the longest pause between looks at a BMC that does not answer"
    )
    poll_concurrency: int = Field(64, ge=1, description="BMCs looked at side by side")
    report_seconds: float = Field(30.0, gt=0, description="between whole reports to capacity")
    bmc_timeout_seconds: float = Field(10.0, gt=0, description="for a login, and for a command")
    bmc_interval_seconds: float = Field(
        0.2, ge=0, description="the least time between two commands to one BMC"
    )
    session_linger_seconds: float = Field(
        20.0, ge=0, description="how long a session is kept for the next command"
    )
    handshake_concurrency: int = Field(256, ge=1, description="logins side by side")
    power_timeout_seconds: float = Field(60.0, gt=0, description="for a power change to show")
    soft_off_timeout_seconds: float = Field(600.0, gt=0, description="for a soft off to show")
    claim_seconds: float = Field(
        30.0, gt=1, description="after which a dead replica's nodes are taken over"
    )
    operation_keep_days: int = Field(90, ge=1, description="how long finished operations are kept")
