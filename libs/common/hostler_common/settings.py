"""Settings of a service: ``HOSTLER_<SERVICE>_<NAME>``, else ``HOSTLER_<NAME>``, else ``/etc/hostler/<service>.toml``.

A process starts with every setting right or not at all: `load` reports every bad one at once, never its value.
"""

import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from hostler_common import errors
from hostler_common.logs import LogFormat

CONFIG_DIRECTORY = Path("/etc/hostler")
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class SettingsError(errors.HostlerError):
    """One or more settings are wrong; the detail names each of them on a line of its own."""

    code = "settings.invalid"


def _split(value: object) -> object:
    return (
        [part.strip() for part in value.split(",") if part.strip()]
        if isinstance(value, str)
        else value
    )


CommaList = Annotated[list[str], NoDecode, BeforeValidator(_split)]
"""A list that is written ``a,b,c`` in the environment and as an array in TOML."""


class _Environment(EnvSettingsSource):
    """Variables. One that should be JSON and is not is left to its field, which names it beside every other fault."""

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:  # noqa: ANN401  pydantic's signature
        """The variable's JSON, or else its text."""
        try:
            return super().decode_complex_value(field_name, field, value)
        except ValueError:
            return value


class ProcessSettings(BaseSettings):
    """What every process of the suite has: broker, logs, HTTP. Subclasses name their ``service``."""

    service: ClassVar[str] = "hostler"

    model_config = SettingsConfigDict(extra="ignore", validate_default=True, frozen=True)

    amqp_url: SecretStr = Field(
        description="amqp(s)://user:password@host:port/vhost of hostler's own vhost"
    )
    http_host: str = Field("127.0.0.1", description="address that the HTTP server binds")
    http_port: int = Field(
        0, ge=0, le=65535, description="port of the HTTP server; 0 takes a free one"
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: LogFormat = "auto"
    token_file: Path | None = Field(
        None, description="this service's own token for calls to others"
    )
    drain_seconds: float = Field(
        20.0, gt=0, description="how long SIGTERM waits for work in flight"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, the service's own variables, the suite's, the file: the first that has a value wins."""
        return (
            init_settings,
            _Environment(settings_cls, env_prefix=f"HOSTLER_{cls.service.upper()}_"),
            _Environment(settings_cls, env_prefix="HOSTLER_"),
            TomlConfigSettingsSource(settings_cls, CONFIG_DIRECTORY / f"{cls.service}.toml"),
        )


class Settings(ProcessSettings):
    """Settings of one of the four services: a process with a database schema and callers of its own."""

    database_url: SecretStr = Field(description="postgresql://user:password@host:port/database")
    database_pool_size: int = Field(10, ge=2, le=100)
    auth_mode: Literal["token", "jwt", "none"] = "token"
    auth_tokens_file: Path | None = Field(
        None, description="a line each: name:role:project|*:sha256 of the token"
    )
    auth_allow_none: bool = Field(
        False, description="say that auth_mode=none is meant, off loopback too"
    )
    jwt_issuer: str | None = None
    jwt_audience: str | None = None
    jwt_algorithms: CommaList = ["RS256", "ES256"]
    jwt_key_file: Path | None = Field(None, description="PEM public key that signs the tokens")
    jwt_jwks_url: str | None = Field(None, description="key set to fetch instead of jwt_key_file")

    @field_validator(
        "auth_tokens_file", "auth_allow_none", "jwt_issuer", "jwt_audience", "jwt_jwks_url"
    )
    @classmethod
    def _auth_is_complete(cls, value: object, info: ValidationInfo) -> object:
        # a validator of fields, not of the model: pydantic skips the model's while any field is wrong
        match (info.data.get("auth_mode"), info.field_name):
            case ("token", "auth_tokens_file") if value is None:
                raise ValueError("auth_mode=token needs auth_tokens_file")
            case ("jwt", "jwt_issuer" | "jwt_audience") if not value:
                raise ValueError("auth_mode=jwt needs jwt_issuer and jwt_audience")
            case ("jwt", "jwt_jwks_url") if (value is None) == (
                info.data.get("jwt_key_file") is None
            ):
                raise ValueError("auth_mode=jwt needs one of jwt_key_file and jwt_jwks_url")
            case ("none", "auth_allow_none") if not (
                value or info.data.get("http_host") in LOOPBACK
            ):
                raise ValueError(
                    "auth_mode=none off loopback has to be said twice: set auth_allow_none=true"
                )
            case _:
                return value


SettingsT = TypeVar("SettingsT", bound=ProcessSettings)


def load(settings_type: type[SettingsT], **overrides: Any) -> SettingsT:  # noqa: ANN401  any field of the type
    """The settings of this process, complete and valid.

    Raises:
        SettingsError: naming every setting that is missing or wrong, without its value.
    """
    try:
        return settings_type(**overrides)
    except ValidationError as exc:
        prefix = f"HOSTLER_{settings_type.service.upper()}_"
        lines = []
        for error in exc.errors(include_url=False, include_context=False, include_input=False):
            name = ".".join(str(part) for part in error["loc"])
            message = "is not set" if error["type"] == "missing" else error["msg"]
            lines.append(f"{prefix}{name.upper()}: {message}" if name else message)
        raise SettingsError("\n".join(lines)) from exc
    except (OSError, ValueError) as exc:  # an unreadable or malformed TOML file
        raise SettingsError(
            f"{CONFIG_DIRECTORY / settings_type.service}.toml: {type(exc).__name__}"
        ) from exc


def redacted(settings: ProcessSettings) -> dict[str, object]:
    """Every setting by name, with secrets masked: what ``config show`` prints."""
    return settings.model_dump(mode="json")


def read_token(settings: ProcessSettings) -> str | None:
    """This process's own token for calls to other services, or None where it has none.

    Raises:
        SettingsError: the file is named but cannot be read.
    """
    if settings.token_file is None:
        return None
    try:
        return settings.token_file.read_text().strip()
    except OSError as exc:
        raise SettingsError(
            f"HOSTLER_TOKEN_FILE: {os.strerror(exc.errno or 0)}: {settings.token_file}"
        ) from exc
    except UnicodeDecodeError as exc:
        raise SettingsError(f"HOSTLER_TOKEN_FILE: is not text: {settings.token_file}") from exc
