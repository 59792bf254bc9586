"""A POST that is sent twice is done once: the transaction around every such request of the API."""

from collections.abc import Awaitable, Callable

from fastapi.responses import JSONResponse

from hostler_baremetal.resources import Resource
from hostler_common import auth, db, idempotency


async def once(
    pool: db.Pool,
    key: str | None,
    caller: auth.Principal,
    request: object,
    status: int,
    work: Callable[[db.Connection], Awaitable[Resource]],
) -> JSONResponse:
    """Answers with what `work` gives; under a key that was used, with what it gave then."""
    async with db.transaction(pool) as connection:
        if key is not None:
            stored = await idempotency.begin(connection, key, caller=caller.name, request=request)
            if stored is not None:
                return JSONResponse(stored.body, stored.status)
        resource = await work(connection)
        body = resource.model_dump(mode="json")
        if key is not None:
            await idempotency.finish(connection, key, caller=caller.name, status=status, body=body)
    return JSONResponse(body, status)
