"""A week of some projects that change their groups, for tests."""

import random
from datetime import UTC, datetime, timedelta

from hostler_usage.history.ledger_testing import with_bandwidth
from hostler_usage.money.budget import Membership
from hostler_usage.testing import LARGE, SMALL, InstanceLife, Message, Step

DAY, HOUR = timedelta(days=1), timedelta(hours=1)
MAY = datetime(2026, 5, 4, tzinfo=UTC)
PROJECTS = ("p0", "p1", "p2")
KINDS = ("domain", "cost_centre")


def life(number: int) -> InstanceLife:
    """The life of instance `number`: it is resized and stopped, and every other one is deleted."""
    born = MAY + number * 5 * HOUR
    steps = [
        Step(at=born, action="create", flavor=SMALL),
        Step(at=born + (20 + number) * HOUR, action="resize", flavor=LARGE),
        Step(at=born + 50 * HOUR, action="stop"),
    ]
    if number % 2:
        steps.append(Step(at=born + (70 + number) * HOUR, action="delete"))
    return InstanceLife(
        instance_id=f"00000000-0000-4000-8000-{number:012}",
        project_id=f"p{number % 4}",  # p3 never is in a group
        steps=tuple(steps),
    )


def said(number: int) -> list[Message]:
    """What is said of it; of the first four with audits and what they moved."""
    until = MAY + 4 * DAY if number < 4 else None
    return with_bandwidth(life(number).messages(audits_until=until))


ALL = [message for number in range(12) for message in said(number)]


def moments(chance: random.Random, count: int) -> list[datetime]:
    """Instants within a week: some of them midnights, some a microsecond beside one."""
    found: set[datetime] = set()
    while len(found) < count:
        moment = MAY + chance.randrange(7 * 24 * 60) * timedelta(minutes=1)
        if chance.random() < 0.4:
            moment = moment.replace(hour=0, minute=0)
            moment += timedelta(microseconds=chance.choice((-1, 0, 0, 1)))
        found.add(moment)
    return sorted(found)


def memberships(chance: random.Random) -> list[Membership]:
    """A random history of some projects, with times between in which they are in no group."""
    found = []
    for kind in KINDS:
        for project in PROJECTS[: chance.randrange(1, 4)]:
            edges = moments(chance, chance.choice((2, 4, 6)))
            for start, end in zip(edges[::2], edges[1::2], strict=True):
                found.append(
                    Membership(
                        kind=kind,
                        group=chance.choice(("research", "sales")),
                        project=project,
                        start=start,
                        end=None if end == edges[-1] and chance.random() < 0.5 else end,
                    )
                )
    return found
