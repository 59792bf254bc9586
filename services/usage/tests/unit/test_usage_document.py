"""Documents as people send them: nothing is lost or guessed, and nothing makes the reader fail otherwise."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostler_common import errors
from hostler_usage.money.document_text import MAX_BYTES, DocumentUnreadable, plain, read


def yaml(text: str) -> object:
    return read(text.encode(), is_json=False)


def test_yaml_has_none_of_its_surprises() -> None:
    assert yaml(
        """
        country: NO
        switch: on
        octal: 010
        sexagesimal: 1:30
        date: 2026-01-31
        moment: 2026-01-31T00:00:00Z
        price: 0.10
        power: 1e5
        hex: 0x10
        underscore: 1_000
        merge: <<
        whole: -7
        truth: [true, false, null, ~]
        quoted: "0.10"
        """
    ) == {
        "country": "NO",
        "switch": "on",
        "octal": "010",
        "sexagesimal": "1:30",
        "date": "2026-01-31",
        "moment": "2026-01-31T00:00:00Z",
        "price": Decimal("0.10"),
        "power": "1e5",
        "hex": "0x10",
        "underscore": "1_000",
        "merge": "<<",
        "whole": -7,
        "truth": [True, False, None, None],
        "quoted": "0.10",
    }


def test_a_number_with_a_point_is_never_a_float() -> None:
    assert plain(read(b'{"price": 0.1}', is_json=True)) == {"price": "0.1"}
    assert plain(yaml("price: 0.10")) == {"price": "0.10"}
    assert plain([Decimal("1e999999999"), Decimal("nan")]) == ["1E+999999999", "NaN"]


@pytest.mark.parametrize(
    ("text", "is_json", "problem"),
    [
        ('{"price": 1, "price": 2}', True, "'price' is there twice"),
        ("price: 1\nprice: 2", False, "line 2, column 1: 'price' is there twice"),
        ("a: &a [1]\nb: *a", False, "aliases are not taken here"),
        ("a: !!python/object/apply:os.system [ls]", False, "could not determine a constructor"),
        ("? [1]\n: 2", False, "a name must be a text"),
        ("1: 2", False, "a name must be a text"),
        ("a: [", False, "not YAML: line 1"),
        ("{", True, "cannot be read"),
        ('{"a": NaN}', True, "NaN is no number"),
        ('{"a": -Infinity}', True, "-Infinity is no number"),
        ("[" * 100_000, True, "nested too deeply"),
        ("[" * 100_000, False, "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", True, "cannot be read"),
        ("a: " + "9" * 5000, False, "cannot be read"),
        ("a: 1\n---\nb: 2", False, "not YAML"),
        (" " * (MAX_BYTES + 1), True, "may have 1048576 bytes"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_place(
    text: str, is_json: bool, problem: str
) -> None:
    with pytest.raises(DocumentUnreadable) as caught:
        read(text.encode(), is_json=is_json)
    assert problem in caught.value.detail


def test_text_that_is_not_utf_8_is_refused() -> None:
    with pytest.raises(DocumentUnreadable):
        read(b"a: \xff", is_json=False)


@given(st.binary(max_size=60) | st.text("a:-[]{}&*!?|>'\"%@`#, \n01.", max_size=40), st.booleans())
def test_no_text_makes_the_reader_fail_otherwise(text: bytes | str, is_json: bool) -> None:
    try:
        plain(read(text if isinstance(text, bytes) else text.encode(), is_json=is_json))
    except errors.Invalid as exc:
        assert exc.code == "usage.document.unreadable"  # noqa: PT017
