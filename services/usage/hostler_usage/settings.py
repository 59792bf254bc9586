"""Settings of the usage service, and of the brokers it listens to.

`sources` is JSON in the environment and an array of tables in TOML. A source without a URL is on
hostler's own broker, where `vhost` may name another virtual host of it.
"""

from typing import Annotated, ClassVar, Self
from urllib.parse import quote, urlsplit, urlunsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from hostler_common import settings
from hostler_usage.envelope import MAX_BODY_BYTES

CLOUD_EXCHANGES = ("nova", "cinder", "openstack", "glance", "neutron", "keystone")
_NAME = r"^[a-z0-9][a-z0-9_-]{0,40}$"


class Source(BaseModel):
    """A broker that a cloud's services publish notifications to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=_NAME, description="part of its queue's name")]
    region: Annotated[str, Field(min_length=1, max_length=100)]
    url: SecretStr | None = Field(
        None, description="amqp(s)://...; hostler's own broker if absent"
    )
    vhost: str | None = Field(None, description="instead of the URL's virtual host")
    exchanges: tuple[str, ...] = Field(CLOUD_EXCHANGES, min_length=1)
    durable: bool = Field(
        False, description="durability of exchanges that are absent (amqp_durable_queues there)"
    )

    @property
    def is_own(self) -> bool:
        """Whether it is on hostler's own virtual host, so that it needs no connection of its own."""
        return self.url is None and self.vhost is None

    def address(self, own: SecretStr) -> SecretStr:
        """The broker's URL, made from hostler's `own` where the source has none."""
        text = (self.url or own).get_secret_value()
        if self.vhost is not None:
            parts = urlsplit(text)
            text = urlunsplit(parts._replace(path="/" + quote(self.vhost, safe="")))
        return SecretStr(text)


class Settings(settings.Settings):
    """Settings of the usage service."""

    service: ClassVar[str] = "usage"

    http_port: int = Field(8302, ge=0, le=65535)
    sources: tuple[Source, ...] = Field(
        (Source(name="cloud", region="RegionOne"),),
        description="the clouds' brokers, one for each region or cell",
    )
    batch_size: int = Field(500, ge=1, le=5000, description="notifications per transaction")
    batch_seconds: float = Field(0.1, gt=0, le=5, description="how long a batch waits to fill")
    max_body_bytes: int = Field(MAX_BODY_BYTES, ge=1024, description="larger ones are quarantined")
    fold_seconds: float = Field(0.5, gt=0, le=60, description="pause between folds")
    fold_limit: int = Field(200, ge=1, le=5000, description="resources per fold's transaction")
    months_ahead: int = Field(2, ge=1, le=24, description="partitions made ahead")

    @model_validator(mode="after")
    def _sources_are_distinct(self) -> Self:
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names) or not names:
            raise ValueError("sources must be at least one, each with a name of its own")
        return self
