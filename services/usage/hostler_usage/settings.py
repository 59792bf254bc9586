"""Settings of the usage service, and of the brokers it listens to.

`sources` is JSON in the environment and an array of tables in TOML. A source without a URL is on
hostler's own broker, where `vhost` may name another virtual host of it.
"""

from pathlib import Path
from typing import Annotated, ClassVar, Self
from urllib.parse import quote, urlsplit, urlunsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    IPvAnyNetwork,
    SecretStr,
    field_validator,
    model_validator,
)

from hostler_common import settings
from hostler_usage.history import calendar_span
from hostler_usage.reading.envelope import MAX_BODY_BYTES

OWN = "hostler"
"""The source of what hostler's own services and agents say."""

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
    own_region: str | None = Field(
        None,
        min_length=1,
        max_length=100,
        description="of what hostler's own agents and services say; the first source's if absent",
    )
    mapping_file: Path | None = Field(
        None, description="YAML laid over the packaged mapping: what is metered, and how"
    )
    batch_size: int = Field(1000, ge=1, le=5000, description="notifications per transaction")
    batch_seconds: float = Field(0.2, gt=0, le=5, description="how long a batch waits to fill")
    max_body_bytes: int = Field(MAX_BODY_BYTES, ge=1024, description="larger ones are quarantined")
    fold_seconds: float = Field(0.2, gt=0, le=60, description="pause between folds")
    fold_limit: int = Field(2000, ge=1, le=20000, description="resources per fold's transaction")
    audit_settle_seconds: float = Field(
        600.0, ge=0, le=86400, description="how long after its end an audit period is judged"
    )
    audit_silent_after: int = Field(
        3, ge=1, le=1000, description="periods without a word until usage is unconfirmed"
    )
    budget_seconds: float = Field(
        60.0, gt=0, le=3600, description="pause between looks at the budgets"
    )
    provider: Annotated[str, Field(min_length=1, max_length=100)] = Field(
        "hostler", description="who charges, in FOCUS exports"
    )
    billing_account: Annotated[str, Field(min_length=1, max_length=100)] = Field(
        "private-cloud", description="who is charged, in FOCUS exports"
    )
    currency: str = Field(
        "USD", pattern="^[A-Z]{3}$", description="of FOCUS exports without a price book"
    )
    public_url: str | None = Field(
        None,
        pattern=r"^https?://[^/?#]+(/[^?#]*[^/?#])?$",
        description="where feed readers and subscribers reach this service; each request's own"
        " address if absent",
    )
    feed_seconds: float = Field(1.0, gt=0, le=60, description="pause between looks for news")
    feed_page_events: int = Field(200, ge=2, le=1000, description="events on a page of a feed")
    hub_lease_seconds: int = Field(86_400, ge=300, description="of who asks for no other")
    hub_max_lease_seconds: int = Field(864_000, ge=300, description="the longest lease")
    hub_callback_networks: tuple[IPvAnyNetwork, ...] = Field(
        (),
        description="where the hub calls subscribers though they are on this machine or its link",
    )
    retention_months: int | None = Field(
        None,
        ge=1,
        le=1200,
        description="messages of whole months older than that are dropped; for ever if absent",
    )
    months_ahead: int = Field(2, ge=1, le=24, description="partitions made ahead")
    period_time_zone: str = Field("UTC", description="of the months that usage is closed by")
    period_settle_days: float = Field(
        3.0, ge=0, le=60, description="how long after its end a month waits for what is late"
    )
    period_kinds: dict[str, str] = Field(
        {"instance": "flavor", "volume": "volume_type"},
        description="of resource types the attribute that tells the lines of a month apart",
    )

    @property
    def own_source(self) -> Source:
        """Hostler's own services and agents, as a source."""
        return Source(
            name=OWN,
            region=self.own_region or self.sources[0].region,
            exchanges=(OWN,),
        )

    @field_validator("period_time_zone")
    @classmethod
    def _time_zone_is_known(cls, name: str) -> str:
        calendar_span.zone(name)
        return name

    @model_validator(mode="after")
    def _sources_are_distinct(self) -> Self:
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names) or not names or OWN in names:
            raise ValueError(
                f"sources must be at least one, each with a name of its own, none named {OWN}"
            )
        return self
