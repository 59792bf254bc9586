import pytest

from hostler_common import errors


class NodeNotFound(errors.NotFound):
    code = "example.node.not_found"


def test_a_problem_has_the_members_of_rfc_9457_and_its_code() -> None:
    problem = NodeNotFound("no node n1", node="n1").problem()
    assert problem["type"] == "urn:hostler:error:example.node.not_found"
    assert problem["title"] == "Not Found"
    assert problem["status"] == 404
    assert problem["detail"] == "no node n1"
    assert problem["node"] == "n1"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (404, errors.NotFound),
        (409, errors.Conflict),
        (422, errors.Invalid),
        (503, errors.Unavailable),
        (418, errors.HostlerError),
    ],
)
def test_a_peers_problem_comes_back_as_the_error_it_was(
    status: int, kind: type[errors.HostlerError]
) -> None:
    error = errors.from_problem(status, {"code": "peer.own_code", "detail": "why", "more": 1})
    assert type(error) is kind
    assert error.code == "peer.own_code"
    assert error.status == status
    assert error.detail == "why"
    assert error.fields == {"more": 1}


def test_every_kind_of_error_says_what_to_do_and_the_wire_does_not_change() -> None:
    kinds = (
        *(errors.Invalid, errors.Unauthenticated, errors.Forbidden, errors.NotFound),
        *(errors.Conflict, errors.TooMany, errors.Unavailable, errors.HostlerError),
    )
    advice = {kind("why").advice for kind in kinds}
    assert len(advice) == len(kinds)
    assert all(text.endswith(".") for text in advice)
    unknown = errors.from_problem(418, {"detail": "why"})
    assert unknown.advice not in advice  # it is not ours, and asking again does not help
    assert "advice" not in unknown.problem()
