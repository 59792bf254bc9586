"""Documents as bodies of requests: YAML or JSON, read without loss, refused with every fault by its path."""

import asyncio
from typing import Annotated, Final

from fastapi import Path, Query, Request

from hostler_usage.money import document_text
from hostler_usage.money.document import DocumentError
from hostler_usage.money.price_book import NAME

DocumentName = Annotated[str, Path(pattern=f"^{NAME}$")]
Replaces = Annotated[
    int | None, Query(ge=0, description="refuse unless this is the version now; 0: there is none")
]
DESCRIPTION: Final = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"type": "object"}},
            "application/yaml": {"schema": {"type": "object"}},
        },
    }
}
"""What OpenAPI says of a route that takes a document."""


async def read(request: Request) -> object:
    """The document that the request brings.

    Raises:
        DocumentUnreadable: it is too long, or in neither language.
    """
    text = await request.body()
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return await asyncio.to_thread(
        document_text.read, text, is_json=media_type == "application/json"
    )


def faults(exc: DocumentError) -> list[dict[str, str]]:
    """What is wrong with a document, as members of a problem."""
    return [{"path": fault.path, "detail": fault.problem} for fault in exc.faults]
