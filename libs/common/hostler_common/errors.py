"""The one error tree of the suite, and what each error looks like on the wire.

    HostlerError                     500  something of ours is wrong
    +-- Invalid                      422  the request cannot be meant: change it
    +-- Unauthenticated              401  nobody we know: send a token
    +-- Forbidden                    403  known, but not allowed
    +-- NotFound                     404
    +-- Conflict                     409  the state does not allow it: read again, then decide
    +-- TooMany                      429  later, see Retry-After
    +-- Unavailable                  503  a server we need is away: the same call may work later

Services subclass the leaves and give each error a stable, dotted ``code``. A code is never changed and never reused:
clients branch on it, people read the detail. `hostler_common.http` renders the tree as RFC 9457 problem details.
"""

from collections.abc import Mapping
from http import HTTPStatus
from typing import ClassVar

_ADVICE: Mapping[int, str] = {
    401: "Sign in with a token that this service knows.",
    403: "Sign in with a token that may do this, or ask whoever gave you yours for one.",
    404: "Check the address. What it named may be gone, or be of projects that your token may not see.",
    405: "Use the buttons and links of the pages, or the API.",
    409: "Look at it again, as it is by now, and then decide.",
    413: "Send less at once.",
    422: "Change what the message names, and ask again.",
    429: "Wait a moment, and ask again.",
    503: "Wait a moment, and load this page again: a server that this one needs is away.",
}


class HostlerError(Exception):
    """Root of the tree. ``fields`` are further members of the problem document: no secrets, no SQL."""

    code: ClassVar[str] = "hostler.internal"
    status: ClassVar[int] = 500
    retry_after_seconds: ClassVar[int | None] = None

    def __init__(self, detail: str, **fields: object) -> None:
        super().__init__(detail)
        self.detail = detail
        self.fields: Mapping[str, object] = fields

    @property
    def title(self) -> str:
        """The HTTP status in words."""
        return HTTPStatus(self.status).phrase

    @property
    def advice(self) -> str:
        """What somebody who meets the error in a browser can do."""
        if self.status in _ADVICE:
            return _ADVICE[self.status]
        if self.status < 500:
            return "Go back, and ask for something else."
        return "Tell whoever runs this service: its log has more under the request named here."

    def problem(self) -> dict[str, object]:
        """The error as an RFC 9457 document, without the request's own members."""
        return {
            "type": f"urn:hostler:error:{self.code}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
            **self.fields,
        }


class Invalid(HostlerError):
    """The request cannot be meant; sending it again changes nothing."""

    code = "request.invalid"
    status = 422


class Unauthenticated(HostlerError):
    """The caller is nobody we know."""

    code = "auth.unauthenticated"
    status = 401


class Forbidden(HostlerError):
    """The caller is known and may not do this."""

    code = "auth.forbidden"
    status = 403


class NotFound(HostlerError):
    """There is no such thing, or none that the caller may see."""

    code = "request.not_found"
    status = 404


class Conflict(HostlerError):
    """The state of the thing does not allow the request."""

    code = "request.conflict"
    status = 409


class TooMany(HostlerError):
    """The caller asks faster than it may."""

    code = "request.too_many"
    status = 429
    retry_after_seconds = 1


class Unavailable(HostlerError):
    """A server that we need is away; the same call may succeed later."""

    code = "service.unavailable"
    status = 503
    retry_after_seconds = 5


def from_problem(status: int, problem: Mapping[str, object]) -> HostlerError:
    """The error that a peer's problem document describes, as the nearest class of this tree.

    ``code`` and every further member are the peer's own.
    """
    leaves = (Invalid, Unauthenticated, Forbidden, NotFound, Conflict, TooMany, Unavailable)
    kind = next((leaf for leaf in leaves if leaf.status == status), HostlerError)
    detail = str(problem.get("detail") or problem.get("title") or f"HTTP status {status}")
    known = {"type", "title", "status", "detail", "code"}
    error = kind(detail, **{key: value for key, value in problem.items() if key not in known})
    # instance attributes shadow the class's: the peer's answer, not our guess, is what is shown
    error.__dict__["code"] = str(problem.get("code") or kind.code)
    error.__dict__["status"] = status
    return error
