"""Settings of capacity: how far hosts are filled, with which overhead models, and how long things last."""

from typing import ClassVar

from pydantic import Field, field_validator

from hostler_capacity import inventory, overhead, resources
from hostler_common import settings


class Settings(settings.Settings):
    """`HOSTLER_CAPACITY_*`, else `HOSTLER_*`, else /etc/hostler/capacity.toml."""

    service: ClassVar[str] = "capacity"

    http_port: int = Field(8303, ge=0, le=65535)
    stale_seconds: float = Field(
        180.0, gt=0, description="a host silent for longer than this takes no claims"
    )
    refresh_seconds: float = Field(
        0.5, gt=0, description="how often the counters in memory follow the database"
    )
    sweep_seconds: float = Field(1.0, gt=0, description="how often claims past their time end")
    audit_seconds: float = Field(
        60.0, gt=0, description="how often counters are compared with the sum of their claims"
    )
    claim_ttl_seconds: int = Field(
        120, ge=1, description="how long a claim is held when its request does not say"
    )
    claim_ttl_seconds_max: int = Field(86_400, ge=1)
    memory_ratio_percent: int = Field(
        100, ge=1, le=1000, description="how far memory is filled, after the host's reserve"
    )
    vcpu_ratio_percent: int = Field(
        400, ge=1, le=10_000, description="vCPUs per core; Nova starts at 4.0 too"
    )
    disk_ratio_percent: int = Field(100, ge=1, le=1000)
    overhead_models: dict[str, str] = Field(
        default_factory=dict,
        description='other models for hypervisor types, as JSON: {"xen": "xen-nova-2013-12"}',
    )

    @field_validator("overhead_models")
    @classmethod
    def _are_safe(cls, chosen: dict[str, str]) -> dict[str, str]:
        try:
            overhead.shipped().with_defaults(chosen)
        except overhead.UnknownModelError as exc:
            raise ValueError(str(exc)) from exc
        return chosen

    @property
    def catalogue(self) -> overhead.Catalogue:
        """The shipped models, with the operator's choice of defaults."""
        return overhead.shipped().with_defaults(self.overhead_models)

    @property
    def ratios(self) -> inventory.Ratios:
        """How far each class may be filled."""
        return inventory.Ratios(
            percent={
                resources.MEMORY_MB: self.memory_ratio_percent,
                resources.VCPUS: self.vcpu_ratio_percent,
                resources.DISK_GB: self.disk_ratio_percent,
            }
        )
