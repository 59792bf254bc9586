"""What the lists of the HTTP API have in common: pages, names to choose by, groups, and the messages rows rest on."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, TypeVar

from fastapi import Depends, Path, Query
from pydantic import BaseModel, Field

from hostler_common import errors

Limit = Annotated[int, Query(ge=1, le=1000)]
Marker = Annotated[
    str | None,
    Query(max_length=2000, pattern=r"^[^\x00]*$", description="next_marker of the last page"),
]
Name = Annotated[str | None, Query(max_length=255, pattern=r"^[^\x00]*$")]
PathName = Annotated[str, Path(max_length=255, pattern=r"^[^\x00]*$")]
GroupT = TypeVar("GroupT", bound=StrEnum)


class Cited(BaseModel):
    """A message that a row rests on."""

    message_id: str
    event_id: str = Field(description="its name at /v1/events")


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Of whose resources, where and of what type; None does not restrict."""

    project_id: Name = None
    region: Name = None
    resource_type: Name = None


Selected = Annotated[Selection, Depends()]


def names(given: Iterable[str] | None) -> list[str]:
    """The names in a parameter that takes several, each once: with commas, or given again."""
    return list(dict.fromkeys(name for text in given or () for name in text.split(",") if name))


def groups(
    given: Iterable[str] | None, known: type[GroupT], refusal: type[errors.Invalid]
) -> list[GroupT]:
    """The groups that are asked for, each once.

    Raises:
        Invalid: one of them is not known; as `refusal`, which has a code of its own.
    """
    asked = names(given)
    unknown = sorted(set(asked) - set(known))
    if unknown:
        raise refusal(
            f"there is no group {', '.join(unknown)[:200]}: there are {', '.join(known)}"
        )
    return [known(name) for name in asked]
