"""The HTTP API of operators: images and hosts."""

from datetime import datetime
from typing import Self

from fastapi import APIRouter
from pydantic import Field

from hostler_common import auth, db
from hostler_common.auth import Role
from hostler_precache.deps import Limit, StoreDep, SwarmsDep, TrackerDep
from hostler_precache.distribution.distributions import HostRecord, ImageRecord
from hostler_precache.sources.listers import ListedImage
from hostler_precache.wire import View, image_of

router = APIRouter(prefix="/v1")


# --- images


class ImageView(View):
    """An image, and the state of its bytes at the seed."""

    image_id: str
    name: str | None
    fetcher: str
    location: str
    size_bytes: int | None
    disk_format: str | None
    state: str = Field(description="listed, fetching, ready or error")
    reason: str | None
    fetched_bytes: int
    blob_id: str | None
    root: str | None
    verification: str | None = Field(description="hash, checksum or unverifiable")
    created_at: datetime

    @classmethod
    def of(cls, record: ImageRecord) -> Self:
        """The view of a record."""
        image, blob = record.image, record.blob
        size = blob.size_bytes if blob and blob.size_bytes is not None else image.size_bytes
        return cls(
            image_id=image.image_id,
            name=image.name,
            fetcher=image.fetcher,
            location=image.location,
            size_bytes=size,
            disk_format=image.disk_format,
            state=blob.state.value if blob else "listed",
            reason=blob.reason if blob else None,
            fetched_bytes=blob.fetched_bytes if blob else 0,
            blob_id=blob.blob_id if blob else None,
            root=blob.root.hex() if blob and blob.root else None,
            verification=blob.verification.value if blob and blob.verification else None,
            created_at=record.created_at,
        )


class ImageList(View):
    """Images by id."""

    images: list[ImageView]
    next_marker: str | None


@router.post(
    "/images", status_code=201, dependencies=[auth.require(Role.OPERATOR, every_project=True)]
)
async def register_image(body: ListedImage, store: StoreDep) -> ImageView:
    """Make an image known; its bytes are fetched when a distribution wants them."""
    image = image_of(body)
    async with db.transaction(store.pool) as connection:
        await store.add_image(connection, image)
    return ImageView.of(await store.image(image.image_id))


@router.get("/images", dependencies=[auth.require(Role.READER, every_project=True)])
async def list_images(store: StoreDep, limit: Limit = 100, marker: str | None = None) -> ImageList:
    """Images by id."""
    records = await store.images(limit=limit, marker=marker)
    last = records[-1].image.image_id if len(records) == limit else None
    return ImageList(images=[ImageView.of(record) for record in records], next_marker=last)


@router.get("/images/{image_id}", dependencies=[auth.require(Role.READER, every_project=True)])
async def show_image(image_id: str, store: StoreDep) -> ImageView:
    """One image."""
    return ImageView.of(await store.image(image_id))


@router.delete(
    "/images/{image_id}",
    status_code=204,
    dependencies=[auth.require(Role.OPERATOR, every_project=True)],
)
async def delete_image(image_id: str, store: StoreDep, tracker: TrackerDep) -> None:
    """The image is deleted at its source: no host keeps it longer than a guest uses it."""
    async with db.transaction(store.pool) as connection:
        blob_id = await store.image_deleted(connection, image_id)
    if blob_id is not None:
        tracker.forget(blob_id)


# --- hosts


class HostView(View):
    """A host that an agent has spoken for."""

    host: str
    url: str
    free_bytes: int | None
    link_bytes_per_second: int | None = Field(description="what its network card can do")
    labels: dict[str, str]
    images: int = Field(description="images of ours that it has")
    first_seen_at: datetime
    seen_at: datetime


class HostList(View):
    """Hosts by name."""

    hosts: list[HostView]
    next_marker: str | None


@router.get("/hosts", dependencies=[auth.require(Role.READER, every_project=True)])
async def list_hosts(swarms: SwarmsDep, limit: Limit = 100, marker: str | None = None) -> HostList:
    """Hosts by name."""
    records: list[HostRecord] = await swarms.hosts(limit=limit, marker=marker)
    return HostList(
        hosts=[HostView.model_validate(record) for record in records],
        next_marker=records[-1].host if len(records) == limit else None,
    )
