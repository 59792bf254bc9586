"""A token opens one blob until it expires, and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostler_precache.swarming import tokens

KEY = bytes(range(32))
DISTRIBUTION = "5a0e1d0e-0000-4000-8000-00000000000d"
GRANT = tokens.Grant(blob_id="blob-1", distribution_id=DISTRIBUTION, expires_at=1000)


def test_a_token_gives_back_its_grant() -> None:
    assert tokens.verify(tokens.mint(GRANT, KEY), KEY, blob_id="blob-1", now=999) == GRANT


@pytest.mark.parametrize(
    ("blob", "now", "key", "reason"),
    [
        ("blob-2", 1.0, KEY, "another blob"),
        ("blob-1", 1000.0, KEY, "expired"),
        ("blob-1", 1.0, bytes(32), "signed"),
    ],
)
def test_a_token_opens_nothing_else(blob: str, now: float, key: bytes, reason: str) -> None:
    with pytest.raises(tokens.TokenError, match=reason):
        tokens.verify(tokens.mint(GRANT, KEY), key, blob_id=blob, now=now)


def test_a_token_that_is_no_text_is_refused() -> None:
    with pytest.raises(tokens.TokenError, match="malformed"):
        tokens.verify("blob-1.\udcff.1.AAAA", KEY, blob_id="blob-1", now=1.0)


@pytest.mark.parametrize(
    "name", ["x", "", DISTRIBUTION.upper(), f"{{{DISTRIBUTION}}}", "5a0e1d0e"]
)
def test_a_member_of_the_swarm_cannot_sign_for_what_is_no_distribution(name: str) -> None:
    grant = tokens.Grant(blob_id="blob-1", distribution_id=name, expires_at=1000)
    with pytest.raises(tokens.TokenError, match="malformed"):
        tokens.verify(tokens.mint(grant, KEY), KEY, blob_id="blob-1", now=1.0)


@given(st.text(max_size=80))
def test_any_text_is_refused_without_another_error(text: str) -> None:
    with pytest.raises(tokens.TokenError):
        tokens.verify(text, KEY, blob_id="blob-1", now=1.0)


@given(st.integers(min_value=0, max_value=30), st.characters(codec="ascii"))
def test_a_changed_character_before_the_signature_is_noticed(place: int, character: str) -> None:
    token = tokens.mint(GRANT, KEY)
    body = token.rsplit(".", 1)[0]
    place %= len(body)
    changed = token[:place] + character + token[place + 1 :]
    if changed != token:
        with pytest.raises(tokens.TokenError):
            tokens.verify(changed, KEY, blob_id="blob-1", now=1.0)
