"""Settings stop the service at start, and say what is wrong."""

from typing import Any

import pytest

from hostler_capacity.settings import Settings
from hostler_common import settings

GOOD: dict[str, Any] = {
    "amqp_url": "amqp://localhost",
    "database_url": "postgresql://localhost/x",
    "auth_mode": "none",
}


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        ({"xen": "xen-wiki-fit"}, "7 of 49 guests of xen-2013-12, by up to 2 MB"),
        ({"xen": "xen-nova-2013-07"}, "9 of 49 guests of xen-2013-12, by up to 4 MB"),
        ({"xen": "nonsense"}, "there is no overhead model 'nonsense'"),
    ],
)
def test_an_unsafe_or_unknown_default_model_stops_the_service(
    chosen: dict[str, str], reason: str
) -> None:
    with pytest.raises(settings.SettingsError) as caught:
        settings.load(Settings, **GOOD, overhead_models=chosen)
    assert "HOSTLER_CAPACITY_OVERHEAD_MODELS" in caught.value.detail
    assert reason in caught.value.detail


def test_a_safe_model_can_be_chosen_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOSTLER_CAPACITY_OVERHEAD_MODELS", '{"XenServer": "xen-nova-2013-12"}')
    loaded = settings.load(Settings, **GOOD)
    assert loaded.catalogue.default_for("xenserver").id == "xen-nova-2013-12"
    assert loaded.catalogue.default_for("xen").id == "xapi-exact-2026"
