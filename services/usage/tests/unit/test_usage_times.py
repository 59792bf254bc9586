"""Every spelling of section "times" that real senders use, and the ones that are broken."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostler_usage.reading.times import (
    EPOCH,
    MICROSECOND,
    BadTimeError,
    epoch_microseconds,
    microseconds,
    parse_time,
)

WHOLE = datetime(2026, 5, 7, 22, 16, 18, tzinfo=UTC)
FINE = WHOLE.replace(microsecond=28195)


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        ("2026-05-07 22:16:18.028195", FINE),  # envelope: str(utcnow())
        ("2026-05-07 22:16:18", WHOLE),  # the same with no microseconds
        ("2026-05-07 22:16:18+00:00", WHOLE),  # legacy created_at: str(aware)
        ("2026-05-07T22:16:18.028195", FINE),  # strtime
        ("2026-05-07T22:16:18.000000", WHOLE),
        ("2026-05-07T22:16:18Z", WHOLE),  # versioned, glance
        ("2026-05-07T22:16:18+00:00", WHOLE),  # cinder
        ("2026-05-07T22:16:18.028195+0000", FINE),  # CADF
        ("2026-05-08T00:16:18+02:00", WHOLE),
        ("2026-05-07 16:46:18-0530", WHOLE),
        ("2026-05-07 22:16:18.0281959", FINE),  # finer than we keep: cut
        ("2026-05-07 22:16:18 UTC", WHOLE),
        (" 2026-05-07 22:16:18 ", WHOLE),
        (1778192178, WHOLE),  # l3.meter
        ({"__type__": "datetime", "__value__": "2026-05-07T22:16:18"}, WHOLE),  # kombu
        ("", None),
        ("None", None),
        (None, None),
    ],
)
def test_a_known_spelling_is_read_exactly(spelling: object, expected: datetime | None) -> None:
    assert parse_time(spelling) == expected


@pytest.mark.parametrize(
    "broken",
    [
        "2014-05-3107: 19: 43.463101",  # as in Ceilometer's own fixture
        "yesterday",
        "2026-02-30 00:00:00",
        "2026-05-07",
        "2026-05-07 25:00:00",
        "9999-12-31 23:59:59-23:00",
        "0000-01-01 00:00:00",
        "2026-05-07 22:16:18+99:99",
        "\u0662\u0660\u0662\u0666-05-07 22:16:18",  # digits, but not ours
        True,
        10**39,
        -1e300,
        float("nan"),
        [],
        {},
        {"__value__": {"__value__": "2026-05-07 22:16:18"}},
        "0001-01-01 00:00:00",  # asyncpg's infinities
        "9999-12-31T23:59:59.999999Z",
    ],
)
def test_a_broken_time_is_an_error(broken: object) -> None:
    with pytest.raises(BadTimeError):
        parse_time(broken)


@given(st.integers(0, 7_226_582_400_000_000).map(lambda us: EPOCH + us * MICROSECOND))
def test_all_spellings_of_a_moment_are_one_moment(moment: datetime) -> None:
    naive = moment.replace(tzinfo=None)
    assert {
        parse_time(str(naive)),
        parse_time(str(moment)),
        parse_time(naive.isoformat()),
        parse_time(naive.strftime("%Y-%m-%dT%H:%M:%S.%fZ")),
    } == {moment}


@given(st.text() | st.floats() | st.integers() | st.none() | st.booleans())
def test_anything_else_is_a_moment_or_nothing_or_a_bad_time(value: object) -> None:
    try:
        moment = parse_time(value)
    except BadTimeError:
        return
    assert moment is None or moment.utcoffset() == timedelta(0)


def test_microseconds_are_exact_far_from_the_epoch() -> None:
    moment = datetime(2099, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)
    assert epoch_microseconds(moment) == 4102444799999999
    assert microseconds(moment - moment.replace(microsecond=0)) == 999999
