"""The table of a claim's life: every legal step, and every illegal one refused."""

import pytest

from hostler_capacity.claim import LIVE, TRANSITIONS, Action, IllegalStepError, State, after

ILLEGAL = [
    (State.RELEASED, Action.CONFIRM),
    (State.RELEASED, Action.EXPIRE),
    (State.EXPIRED, Action.CONFIRM),
    (State.EXPIRED, Action.EXPIRE),
    (State.CONFIRMED, Action.EXPIRE),
]


def test_every_pair_of_state_and_action_is_either_a_step_or_refused() -> None:
    pairs = {(state, action) for state in State for action in Action}
    assert set(TRANSITIONS) | set(ILLEGAL) == pairs
    assert set(TRANSITIONS).isdisjoint(ILLEGAL)


@pytest.mark.parametrize(("state", "action"), ILLEGAL)
def test_an_illegal_step_is_refused(state: State, action: Action) -> None:
    with pytest.raises(IllegalStepError, match=f"{state} cannot {action}"):
        after(state, action)


def test_a_confirmed_claim_never_expires() -> None:
    assert (State.CONFIRMED, Action.EXPIRE) not in TRANSITIONS


def test_nothing_leads_from_an_ended_claim_back_to_a_live_one() -> None:
    assert {
        reached
        for (state, _), reached in TRANSITIONS.items()
        if state not in LIVE and reached in LIVE
    } == set()


def test_repeating_an_action_changes_nothing() -> None:
    for (state, action), reached in TRANSITIONS.items():
        if action is not Action.EXPIRE:
            assert after(reached, action) == reached, (state, action)
