import json
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import Field

from hostler_common import settings


class Example(settings.Settings):
    service: ClassVar[str] = "example"
    http_port: int = 9999
    ratio: float = Field(1.0, gt=0)
    models: dict[str, str] = Field(default_factory=dict)


GOOD = {
    "HOSTLER_AMQP_URL": "amqp://user:brokerword@localhost/",
    "HOSTLER_DATABASE_URL": "postgresql://user:baseword@localhost/x",
    "HOSTLER_AUTH_MODE": "none",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    monkeypatch.setattr(settings, "CONFIG_DIRECTORY", tmp_path)
    for name, value in GOOD.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_a_services_own_variable_wins_over_the_suites(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("HOSTLER_LOG_LEVEL", "WARNING")
    assert settings.load(Example).log_level == "WARNING"
    environment.setenv("HOSTLER_EXAMPLE_LOG_LEVEL", "DEBUG")
    assert settings.load(Example).log_level == "DEBUG"


def test_the_file_is_used_where_no_variable_is_set(tmp_path: Path) -> None:
    (tmp_path / "example.toml").write_text('ratio = 2.5\nlog_level = "ERROR"\n')
    assert settings.load(Example).ratio == 2.5


def test_every_wrong_setting_is_named_at_once_and_no_value_is_shown(
    environment: pytest.MonkeyPatch,
) -> None:
    environment.delenv("HOSTLER_AMQP_URL")
    environment.setenv("HOSTLER_EXAMPLE_RATIO", "-3.25")
    environment.setenv("HOSTLER_HTTP_PORT", "seventy")
    with pytest.raises(settings.SettingsError) as caught:
        settings.load(Example)
    assert "HOSTLER_EXAMPLE_AMQP_URL: is not set" in caught.value.detail
    assert "HOSTLER_EXAMPLE_RATIO" in caught.value.detail
    assert "HOSTLER_EXAMPLE_HTTP_PORT" in caught.value.detail
    assert "seventy" not in caught.value.detail
    assert "baseword" not in caught.value.detail


def test_a_malformed_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "example.toml").write_text("ratio = = 2\n")
    with pytest.raises(settings.SettingsError, match=r"example\.toml"):
        settings.load(Example)


def test_shown_settings_hold_no_secret() -> None:
    shown = json.dumps(settings.redacted(settings.load(Example)))
    assert "brokerword" not in shown
    assert "baseword" not in shown


def test_auth_off_must_be_said_twice_off_loopback(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("HOSTLER_HTTP_HOST", "0.0.0.0")
    with pytest.raises(settings.SettingsError, match="said twice"):
        settings.load(Example)
    environment.setenv("HOSTLER_AUTH_ALLOW_NONE", "true")
    assert settings.load(Example).auth_mode == "none"


def test_token_auth_needs_its_file(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("HOSTLER_AUTH_MODE", "token")
    with pytest.raises(settings.SettingsError, match="auth_tokens_file"):
        settings.load(Example)


def test_jwt_auth_needs_an_issuer_an_audience_and_one_source_of_keys(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment.setenv("HOSTLER_AUTH_MODE", "jwt")
    with pytest.raises(settings.SettingsError) as caught:
        settings.load(Example)
    named = {line.partition(":")[0] for line in caught.value.detail.splitlines()}
    assert named == {f"HOSTLER_EXAMPLE_JWT_{name}" for name in ("ISSUER", "AUDIENCE", "JWKS_URL")}
    environment.setenv("HOSTLER_JWT_ISSUER", "https://idp.example/")
    environment.setenv("HOSTLER_JWT_AUDIENCE", "hostler")
    environment.setenv("HOSTLER_JWT_JWKS_URL", "https://idp.example/keys")
    assert settings.load(Example).auth_mode == "jwt"
    environment.setenv("HOSTLER_JWT_KEY_FILE", str(tmp_path / "key"))
    with pytest.raises(settings.SettingsError, match="one of jwt_key_file"):
        settings.load(Example)


def test_a_faulty_auth_is_named_beside_other_faults(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("HOSTLER_AUTH_MODE", "token")
    environment.setenv("HOSTLER_EXAMPLE_RATIO", "-1")
    with pytest.raises(settings.SettingsError) as caught:
        settings.load(Example)
    assert "HOSTLER_EXAMPLE_RATIO" in caught.value.detail
    assert "HOSTLER_EXAMPLE_AUTH_TOKENS_FILE" in caught.value.detail


def test_a_list_is_written_with_commas(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("HOSTLER_JWT_ALGORITHMS", "ES256, RS512,")
    assert settings.load(Example).jwt_algorithms == ["ES256", "RS512"]


def test_a_token_file_that_cannot_be_read_is_named(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert settings.read_token(settings.load(Example)) is None
    environment.setenv("HOSTLER_TOKEN_FILE", str(tmp_path / "absent"))
    with pytest.raises(settings.SettingsError, match="HOSTLER_TOKEN_FILE: No such file"):
        settings.read_token(settings.load(Example))
    (tmp_path / "absent").write_text("the-token\n")
    assert settings.read_token(settings.load(Example)) == "the-token"


def test_a_variable_that_is_no_json_is_named_beside_other_faults(
    environment: pytest.MonkeyPatch,
) -> None:
    environment.setenv("HOSTLER_EXAMPLE_MODELS", "{xen: sevenfold")
    environment.setenv("HOSTLER_EXAMPLE_RATIO", "-3.25")
    with pytest.raises(settings.SettingsError) as caught:
        settings.load(Example)
    assert "HOSTLER_EXAMPLE_MODELS" in caught.value.detail
    assert "HOSTLER_EXAMPLE_RATIO" in caught.value.detail
    assert "toml" not in caught.value.detail
    assert "sevenfold" not in caught.value.detail
