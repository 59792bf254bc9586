"""Sources: one broker a region, from JSON in the environment, wrong ones named, secrets never shown."""

import json

import pytest
from pydantic import SecretStr

from hostler_common import bus, settings
from hostler_usage import messages
from hostler_usage.settings import CLOUD_EXCHANGES, Settings, Source

OWN = SecretStr("amqp://hostler:own-secret@mq:5672/hostler")


def load(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Settings:
    needed = {
        "HOSTLER_AMQP_URL": OWN.get_secret_value(),
        "HOSTLER_USAGE_DATABASE_URL": "postgresql://u:db-secret@db/x",
        "HOSTLER_AUTH_MODE": "none",
    }
    for name, value in (needed | variables).items():
        monkeypatch.setenv(name, value)
    return settings.load(Settings)


def test_without_sources_the_cloud_is_on_hostlers_own_broker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (source,) = load(monkeypatch).sources
    assert source.is_own
    assert source.address(OWN).get_secret_value() == OWN.get_secret_value()
    assert source.exchanges == CLOUD_EXCHANGES


def test_a_source_has_a_broker_a_virtual_host_or_both_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = [
        {"name": "r1", "region": "R1", "vhost": "/"},
        {"name": "r2", "region": "R2", "url": "amqps://n:s@far:5671/nova", "exchanges": ["nova"]},
    ]
    loaded = load(monkeypatch, HOSTLER_USAGE_SOURCES=json.dumps(given))
    assert [source.address(OWN).get_secret_value() for source in loaded.sources] == [
        "amqp://hostler:own-secret@mq:5672/%2F",
        "amqps://n:s@far:5671/nova",
    ]
    assert not any(source.is_own for source in loaded.sources)


@pytest.mark.parametrize(
    ("sources", "complaint"),
    [
        ([], "at least one"),
        ([{"name": "a", "region": "R"}, {"name": "a", "region": "S"}], "a name of its own"),
        ([{"name": "A b", "region": "R"}], "SOURCES.0.NAME"),
        ([{"name": "a"}], "SOURCES.0.REGION"),
        ([{"name": "a", "region": "R", "exchanges": []}], "SOURCES.0.EXCHANGES"),
        ([{"name": "a", "region": "R", "colour": "red"}], "SOURCES.0.COLOUR"),
    ],
)
def test_a_wrong_source_stops_the_service_and_is_named(
    monkeypatch: pytest.MonkeyPatch, sources: object, complaint: str
) -> None:
    with pytest.raises(settings.SettingsError) as caught:
        load(monkeypatch, HOSTLER_USAGE_SOURCES=json.dumps(sources))
    assert complaint in caught.value.detail


def test_no_secret_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [{"name": "r1", "region": "R1", "url": "amqp://n:far-secret@far/nova"}]
    loaded = load(monkeypatch, HOSTLER_USAGE_SOURCES=json.dumps(given))
    assert "secret" not in json.dumps(settings.redacted(loaded))


def test_a_source_has_one_queue_of_its_own_bound_to_every_priority_of_both_topics() -> None:
    source = Source(name="r1", region="R1", exchanges=("nova", "openstack"), durable=True)
    queue = messages.queue(source)
    assert (queue.name, queue.type) == ("usage.notifications.r1", "quorum")
    assert {(b.exchange.name, b.routing_key) for b in queue.bindings} == {
        (exchange, key)
        for exchange in ("nova", "openstack")
        for key in ("notifications.*", "versioned_notifications.*")
    }
    assert {(b.exchange.declare, b.exchange.durable) for b in queue.bindings} == {
        (bus.Declare.PASSIVE_FIRST, True)
    }
    assert messages.replay_queue(source).bindings == ()
