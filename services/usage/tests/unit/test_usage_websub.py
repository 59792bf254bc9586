"""What a WebSub hub may accept, sends, and makes of answers."""

import hashlib
import hmac
import ipaddress
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostler_usage.feeds import websub
from hostler_usage.feeds.websub import BadRequestError, Lease, Mode, Outcome, read_request

TOPIC = "http://usage.example/feeds/all.atom"
CALLBACK = "https://reader.example:8443/in?key=1&hub.mode=x"


def ask(**changes: Any) -> websub.Request:
    values: dict[str, Any] = {"mode": "subscribe", "topic": TOPIC, "callback": CALLBACK, **changes}
    return read_request(**values)


def test_a_request_is_read() -> None:
    assert ask(lease_seconds="600", secret="s" * 199) == websub.Request(
        mode=Mode.SUBSCRIBE, topic=TOPIC, callback=CALLBACK, lease_seconds=600, secret="s" * 199
    )
    assert ask(mode="unsubscribe", lease_seconds="nonsense").lease_seconds is None
    assert ask(secret="").secret is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": None},
        {"mode": "publish"},
        {"topic": None},
        {"topic": "/feeds/all.atom"},
        {"callback": ""},
        {"callback": "ftp://reader.example/"},
        {"callback": "file:///etc/passwd"},
        {"callback": "http:///path"},
        {"callback": "http://user:password@reader.example/"},
        {"callback": "http://reader.example/#part"},
        {"callback": "http://reader.example:99999/"},
        {"callback": "http://reader.example:0/"},
        {"callback": "http://[::1/"},
        {"callback": "http://reader.example/ space"},
        {"callback": "http://reader.example/\r\nHost: x"},
        {"callback": "http://reader.example\\@other.example/"},
        {"callback": "http://bücher.example/"},
        {"callback": "http://reader.example/" + "a" * 1000},
        {"lease_seconds": "0"},
        {"lease_seconds": "-5"},
        {"lease_seconds": "1.5"},
        {"lease_seconds": "\uff19"},
        {"lease_seconds": "9" * 5000},
        {"secret": "s" * 200},
        {"secret": "é" * 100},
        {"secret": "\ud800"},
        {"secret": "a\x00"},
    ],
)
def test_what_cannot_be_meant_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadRequestError):
        ask(**wrong)


@given(st.none() | st.text(max_size=50), st.none() | st.text(max_size=50), st.text(max_size=50))
def test_any_text_is_read_or_refused(topic: str | None, callback: str | None, text: str) -> None:
    try:
        found = ask(topic=topic, callback=callback, lease_seconds=text, secret=text)
    except BadRequestError:
        return
    assert found.lease_seconds is None or found.lease_seconds > 0


@given(st.none() | st.integers(1, 10**18))
def test_no_lease_is_for_ever_or_for_nothing(asked: int | None) -> None:
    lease = Lease(least=60, usual=3600, most=86_400)
    assert 60 <= lease.seconds(asked) <= 86_400
    if asked is not None and 60 <= asked <= 86_400:
        assert lease.seconds(asked) == asked


@given(st.none() | st.integers(1, 10**18), st.integers(-(10**9), 10**9))
def test_a_lease_ends_with_the_token_that_was_shown(asked: int | None, lasts: int) -> None:
    lease = Lease(least=60, usual=3600, most=86_400)
    granted = lease.seconds(asked, lasts)
    assert 1 <= granted <= lease.seconds(asked)
    assert granted <= max(1, lasts)
    assert granted in (lease.seconds(asked), max(1, lasts))


def test_verification_asks_with_all_that_the_recommendation_names_and_keeps_the_query() -> None:
    url = websub.verification_url(
        CALLBACK, mode=Mode.SUBSCRIBE, topic=TOPIC + "?a=b&c", challenge="c-1", lease_seconds=60
    )
    assert url.startswith(CALLBACK + "&")
    assert parse_qsl(urlsplit(url).query) == [
        ("key", "1"),
        ("hub.mode", "x"),
        ("hub.mode", "subscribe"),
        ("hub.topic", TOPIC + "?a=b&c"),
        ("hub.challenge", "c-1"),
        ("hub.lease_seconds", "60"),
    ]


def test_a_denial_names_the_topic_and_the_reason() -> None:
    url = websub.denial_url("http://reader.example/in", topic=TOPIC, reason="not any more")
    assert url.startswith("http://reader.example/in?")
    assert parse_qsl(urlsplit(url).query) == [
        ("hub.mode", "denied"),
        ("hub.topic", TOPIC),
        ("hub.reason", "not any more"),
    ]


@pytest.mark.parametrize(
    ("status", "body", "holds"),
    [
        (200, b"c-1", True),
        (299, b"c-1", True),
        (200, b"c-1\n", False),
        (200, b"", False),
        (200, "ç-1".encode(), False),
        (302, b"c-1", False),
        (404, b"c-1", False),
        (500, b"c-1", False),
    ],
)
def test_only_a_success_that_echoes_the_challenge_verifies(
    status: int, body: bytes, holds: bool
) -> None:
    assert websub.is_verified(status, body, "c-1") is holds


def test_a_signature_is_the_hmac_of_the_body() -> None:
    expected = hmac.new("geheimniß".encode(), b"<feed/>", hashlib.sha256).hexdigest()
    assert websub.signature("geheimniß", b"<feed/>") == f"sha256={expected}"
    # RFC 4231, test case 2
    assert websub.signature("Jefe", b"what do ya want for nothing?") == (
        "sha256=5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
    )


@pytest.mark.parametrize(
    ("status", "meaning"),
    [
        (200, Outcome.DELIVERED),
        (204, Outcome.DELIVERED),
        (410, Outcome.GONE),
        (301, Outcome.FAILED),
        (404, Outcome.FAILED),
        (503, Outcome.FAILED),
    ],
)
def test_what_an_answer_means(status: int, meaning: Outcome) -> None:
    assert websub.outcome(status) is meaning


@given(st.integers(1, 10**6), st.floats(0, 1))
def test_the_hub_waits_longer_after_each_failure_up_to_an_hour(
    failures: int, spread: float
) -> None:
    delay = websub.backoff_seconds(failures, spread)
    assert 3 <= delay <= 4500
    assert delay <= websub.backoff_seconds(failures + 1, spread)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.255.255.254",
        "0.0.0.0",
        "0.1.2.3",
        "169.254.169.254",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::127.0.0.1",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "64:ff9b::a9fe:a9fe",
        "2002:7f00:1::",
        "2001:0:7f00:1::",
        "fe80::1",
        "ff02::1",
    ],
)
def test_the_hub_does_not_call_this_machine_or_its_link(address: str) -> None:
    assert not websub.may_call(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address",
    ["10.1.2.3", "192.168.1.1", "172.16.0.1", "93.184.216.34", "fd00::1", "2606:4700::1"],
)
def test_the_hub_calls_hosts_of_private_clouds_and_of_the_world(address: str) -> None:
    assert websub.may_call(ipaddress.ip_address(address))


def test_what_is_allowed_may_be_called() -> None:
    allowed = [ipaddress.ip_network("127.0.0.0/8")]
    assert websub.may_call(ipaddress.ip_address("127.0.0.1"), allowed)
    assert websub.may_call(ipaddress.ip_address("::ffff:127.0.0.1"), allowed)
    assert not websub.may_call(ipaddress.ip_address("::1"), allowed)


@given(st.ip_addresses())
def test_every_address_has_an_answer(address: Any) -> None:
    assert websub.may_call(address) in (True, False)


@pytest.mark.parametrize(
    ("granted", "named", "left"),
    [
        (None, [None], None),
        (None, [frozenset({"p1"})], frozenset({"p1"})),
        (None, [], frozenset()),
        (frozenset({"p1"}), [None], frozenset({"p1"})),
        (frozenset({"p1", "p2"}), [frozenset({"p2", "p3"})], frozenset({"p2"})),
        (frozenset({"p1", "p2"}), [frozenset({"p1"}), frozenset({"p2"})], frozenset({"p1", "p2"})),
        (frozenset({"p1"}), [], frozenset()),
    ],
)
def test_a_subscription_sees_what_its_maker_might_see_then_and_may_see_now(
    granted: frozenset[str] | None,
    named: list[frozenset[str] | None],
    left: frozenset[str] | None,
) -> None:
    assert websub.present_scope(granted, named) == left
