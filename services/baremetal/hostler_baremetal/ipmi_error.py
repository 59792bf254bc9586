"""What can go wrong between us and a BMC, grouped by what a caller can do about it.

    IpmiError
    ├── MalformedPacket         drop the packet, go on waiting
    ├── BmcUnreachable          nothing answers: try again later
    │   └── BmcTimeout          it answered once, or the deadline passed: the outcome is not known
    ├── AuthenticationFailed    stop asking until the credentials change (accounts get locked)
    ├── SessionRefused          the BMC has no room or does not like the request: try again later
    │   └── SuiteRefused        it does not speak this cipher suite: try the next one allowed
    │       └── Downgraded      it said yes and chose other algorithms than asked
    └── CommandRefused          the command was answered with a completion code other than 00h

These are the driver's own; `bmc` turns them into the service's errors.
"""


class IpmiError(Exception):
    """Something went wrong in the exchange with a BMC."""


class MalformedPacket(IpmiError):
    """A packet cannot be read, or is not from the party it claims to be from."""


class BmcUnreachable(IpmiError):
    """Nothing answers at the BMC's address."""


class BmcTimeout(BmcUnreachable):
    """No answer within the deadline. What was asked may have been done."""


class AuthenticationFailed(IpmiError):
    """The BMC does not accept our user or password, or cannot prove that it knows them."""


class SessionRefused(IpmiError):
    """The BMC answers, and does not open a session."""

    def __init__(self, detail: str, *, status: int) -> None:
        super().__init__(detail)
        self.status = status


class SuiteRefused(SessionRefused):
    """The BMC does not take the cipher suite that was asked for."""


class Downgraded(SuiteRefused):
    """The BMC accepted the session with other algorithms than the ones asked for."""


class CommandRefused(IpmiError):
    """A command was answered with a completion code other than 00h (section 5.2)."""

    def __init__(self, detail: str, *, completion_code: int) -> None:
        super().__init__(detail)
        self.completion_code = completion_code
