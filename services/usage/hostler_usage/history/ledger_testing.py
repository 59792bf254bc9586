"""The ledger's stores over one database, for tests: told of messages and asked, without a broker or a service."""

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from hostler_common import db
from hostler_usage.history.fold_store import FoldStore
from hostler_usage.history.report_store import ReportStore
from hostler_usage.reading.envelope import open_body
from hostler_usage.reading.event import Event, Origin
from hostler_usage.reading.mapping_file import packaged
from hostler_usage.reading.normalise import Normaliser
from hostler_usage.store import Store
from hostler_usage.testing import (
    LARGE,
    SMALL,
    InstanceLife,
    Message,
    Step,
    VolumeLife,
    VolumeStep,
)

_NORMALISER = Normaliser(packaged())
_HOUR = timedelta(hours=1)


def event(body: bytes, encoding: str = "") -> Event:
    """A body as ingest reads it, from region r1; compressed, if an encoding is named."""
    notification = open_body(body, compression=encoding or None)
    return Event(
        notification=notification,
        normalised=_NORMALISER.read(notification, region="r1"),
        body=body,
        region="r1",
        origin=Origin("cloud", "nova", "notifications.info", "application/json", encoding),
        headers={},
    )


def with_bandwidth(messages: Sequence[Message]) -> list[Message]:
    """The messages; legacy audits say what went over two networks, too."""
    return [
        replace(
            message,
            payload={
                **message.payload,
                "bandwidth": {
                    "public": {"bw_in": 1000 + n, "bw_out": 7 * n},
                    "private": {"bw_in": n, "bw_out": 1},
                },
            },
        )
        if message.event_type == "compute.instance.exists"
        else message
        for n, message in enumerate(messages)
    ]


def instance(number: int, *steps: Step, project: str = "p1") -> InstanceLife:
    """The life of instance `number`."""
    return InstanceLife(
        instance_id=f"00000000-0000-4000-8000-{number:012}", project_id=project, steps=steps
    )


def brief_instance(number: int, project: str, start: datetime) -> InstanceLife:
    """From an hour after `start`: small for two hours, large for one, large and stopped for two."""
    return instance(
        number,
        Step(at=start + _HOUR, action="create", flavor=SMALL),
        Step(at=start + 3 * _HOUR, action="resize", flavor=LARGE),
        Step(at=start + 4 * _HOUR, action="stop"),
        Step(at=start + 6 * _HOUR, action="delete"),
        project=project,
    )


def brief_volume(project: str, start: datetime) -> VolumeLife:
    """A volume of 10 GB that lasts an hour."""
    return VolumeLife(
        volume_id="00000000-0000-4000-9000-000000000001",
        project_id=project,
        steps=(
            VolumeStep(at=start, action="create", size_gb=10),
            VolumeStep(at=start + _HOUR, action="delete"),
        ),
    )


class Ledger:
    """The service's stores over one database."""

    def __init__(self, pool: db.Pool) -> None:
        self.pool = pool
        self.store = Store(pool=pool, writer=uuid.uuid4())
        self.folds = FoldStore(pool=pool, mapping=packaged())
        self.reports = ReportStore(pool=pool, mapping=packaged())

    async def told(self, messages: Iterable[Message | Event]) -> None:
        """They are stored and folded."""
        await self.store.ingest(
            [one if isinstance(one, Event) else event(one.body()) for one in messages]
        )
        await self.fold()

    async def fold(self) -> None:
        """All that is stored is folded."""
        while await self.folds.fold_some():
            pass
