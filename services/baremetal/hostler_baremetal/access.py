"""Who may see the fleet at all: what the API and the page both ask before anything else."""

from hostler_common import auth, errors


async def whole_fleet(caller: auth.Caller) -> None:
    """Lets through who is not limited to projects: a node belongs to none.

    Raises Forbidden.
    """
    if caller.projects is not None:
        raise errors.Forbidden(
            f"nodes belong to no project, and {caller.name} may see projects only"
        )
