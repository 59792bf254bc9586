"""What baremetal refuses or cannot do, as leaves of the suite's tree.

    NotFound      NodeNotFound  OperationNotFound  LeaseNotFound
    Conflict      NodeExists  StaleGeneration  NodeLatched  NodeBusy  NodeLeased  Fenced
                  BmcAuthenticationFailed  BmcRefused
    Unavailable   BmcUnreachable > BmcSilent
    HostlerError  CredentialsUnreadable

Codes are stable; operations that fail carry them too.
"""

from hostler_common import errors


class NodeNotFound(errors.NotFound):
    """There is no such node."""

    code = "baremetal.node.not_found"


class OperationNotFound(errors.NotFound):
    """There is no such operation, or it is older than they are kept."""

    code = "baremetal.operation.not_found"


class LeaseNotFound(errors.NotFound):
    """The node is not leased."""

    code = "baremetal.lease.not_found"


class NodeExists(errors.Conflict):
    """Another node has this name, id or BMC address."""

    code = "baremetal.node.exists"


class StaleGeneration(errors.Conflict):
    """The node was changed since the caller read it."""

    code = "baremetal.node.stale_generation"


class NodeLatched(errors.Conflict):
    """The BMC refused our credentials: it is left alone until they are changed."""

    code = "baremetal.node.latched"


class NodeBusy(errors.Conflict):
    """Another operation is under way on the node."""

    code = "baremetal.node.busy"


class NodeLeased(errors.Conflict):
    """Somebody else has the node."""

    code = "baremetal.lease.held"


class Fenced(errors.Conflict):
    """The fencing token is not the one of the node's present lease."""

    code = "baremetal.lease.fenced"


class BmcUnreachable(errors.Unavailable):
    """Nothing answers at the BMC's address."""

    code = "baremetal.bmc.unreachable"


class BmcSilent(BmcUnreachable):
    """No answer in time: what was asked may have been done."""

    code = "baremetal.bmc.timeout"


class BmcAuthenticationFailed(errors.Conflict):
    """The BMC does not accept the node's credentials."""

    code = "baremetal.bmc.authentication_failed"


class BmcRefused(errors.Conflict):
    """The BMC answered, and would not."""

    code = "baremetal.bmc.refused"


class CredentialsUnreadable(errors.HostlerError):
    """The node's credentials were sealed with a key that this process does not have."""

    code = "baremetal.credentials.unreadable"
