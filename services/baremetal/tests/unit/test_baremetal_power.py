"""The power tables: what is done, and when it counts as done."""

import itertools

import pytest

from hostler_baremetal import power
from hostler_baremetal.ipmi_command import ChassisAction
from hostler_baremetal.power import OperationState, Plan, PowerAction, PowerState, Verdict


def judge(
    action: PowerAction,
    observed: PowerState,
    *,
    acknowledged: bool = True,
    seen_off: bool = False,
    seconds: float = 1.0,
) -> Verdict:
    return power.judge(
        action,
        observed=observed,
        acknowledged=acknowledged,
        seen_off=seen_off,
        seconds_since_issue=seconds,
    )


class TestPlan:
    @pytest.mark.parametrize("action", list(PowerAction))
    def test_nothing_is_done_into_the_dark(self, action: PowerAction) -> None:
        assert power.plan(action, PowerState.UNKNOWN) is Plan.LOOK_AGAIN

    def test_every_action_has_a_plan_in_every_known_state(self) -> None:
        for action, state in itertools.product(PowerAction, (PowerState.ON, PowerState.OFF)):
            assert power.plan(action, state) is not Plan.LOOK_AGAIN

    @pytest.mark.parametrize(
        ("action", "state"),
        [
            (PowerAction.ON, PowerState.ON),
            (PowerAction.OFF, PowerState.OFF),
            (PowerAction.SOFT, PowerState.OFF),
        ],
    )
    def test_what_is_so_already_needs_no_command(
        self, action: PowerAction, state: PowerState
    ) -> None:
        assert power.plan(action, state) is Plan.NOTHING

    def test_a_cycle_of_a_node_that_is_off_powers_it_on(self) -> None:
        assert power.plan(PowerAction.CYCLE, PowerState.OFF) is ChassisAction.POWER_UP

    def test_a_reset_of_a_node_that_is_off_is_refused(self) -> None:
        assert power.plan(PowerAction.RESET, PowerState.OFF) is Plan.REFUSE


class TestJudge:
    @pytest.mark.parametrize("action", list(PowerAction))
    def test_unknown_is_never_the_end(self, action: PowerAction) -> None:
        assert judge(action, PowerState.UNKNOWN, seconds=1e6) is Verdict.WAIT

    def test_on_is_reached_when_on_is_seen_even_unacknowledged(self) -> None:
        assert judge(PowerAction.ON, PowerState.ON, acknowledged=False) is Verdict.REACHED
        assert judge(PowerAction.ON, PowerState.OFF) is Verdict.WAIT

    def test_a_cycle_is_not_over_because_the_node_is_still_on(self) -> None:
        assert judge(PowerAction.CYCLE, PowerState.ON, seconds=0.1) is Verdict.WAIT

    def test_a_cycle_is_over_when_off_was_seen_and_on_again(self) -> None:
        seen = judge(PowerAction.CYCLE, PowerState.ON, acknowledged=False, seen_off=True)
        assert seen is Verdict.REACHED

    @pytest.mark.parametrize(
        ("acknowledged", "verdict"), [(True, Verdict.REACHED), (False, Verdict.UNPROVEN)]
    )
    def test_a_cycle_that_was_not_seen_counts_only_if_the_bmc_took_it(
        self, acknowledged: bool, verdict: Verdict
    ) -> None:
        seen = judge(PowerAction.CYCLE, PowerState.ON, acknowledged=acknowledged, seconds=60)
        assert seen is verdict

    def test_a_reset_that_the_bmc_did_not_take_cannot_be_proven(self) -> None:
        assert judge(PowerAction.RESET, PowerState.ON) is Verdict.REACHED
        assert judge(PowerAction.RESET, PowerState.ON, acknowledged=False) is Verdict.UNPROVEN


class TestOperationStates:
    def test_every_state_has_its_row(self) -> None:
        assert set(power.TRANSITIONS) == set(OperationState)

    def test_nothing_follows_an_end_and_every_state_can_reach_one(self) -> None:
        for state, following in power.TRANSITIONS.items():
            assert (following == frozenset()) == (state in power.FINISHED)
            assert state in power.FINISHED or following >= power.FINISHED

    def test_nothing_goes_back_to_queued(self) -> None:
        for following in power.TRANSITIONS.values():
            assert OperationState.QUEUED not in following

    def test_what_was_taken_cannot_be_sent_again(self) -> None:
        assert OperationState.ISSUING not in power.TRANSITIONS[OperationState.WAITING]


@pytest.mark.parametrize(
    ("last", "observed", "expected"),
    [
        (None, PowerState.ON, False),
        (PowerState.ON, PowerState.ON, False),
        (PowerState.ON, PowerState.OFF, True),
        (PowerState.OFF, PowerState.ON, True),
        (PowerState.ON, PowerState.UNKNOWN, False),
    ],
)
def test_drift_is_a_change_between_two_known_states(
    last: PowerState | None, observed: PowerState, expected: bool
) -> None:
    assert power.is_drift(last, observed) is expected
