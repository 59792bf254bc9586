"""What thousands of hosts are told of in one answer is told in parts, and is the same."""

import asyncio
import json
import uuid
from datetime import UTC, datetime
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from hostler_precache.distribution.distribution_store import HOSTS_AT_ONCE
from hostler_precache.distribution.distributions import DistributionState, HostProgress
from hostler_precache.distribution.distributions_api import (
    DistributionDetail,
    DistributionNow,
    HostProgressView,
    json_of,
)
from hostler_precache.protocol import HostState

NOW = datetime(2026, 11, 21, 1, 2, 3, 456, tzinfo=UTC)


def host_of(number: int, state: HostState, reason: str | None) -> HostProgress:
    return HostProgress(
        host=f"h{number}", is_there=bool(number % 3), state=state.value, reason=reason, wave=1, pieces_done=number,
        bytes_done=1 << 50, coverage="f0", sent_bytes=1, received_from_seed_bytes=2,
        received_from_peers_bytes=3, received_from_rack_bytes=4, wasted_bytes=5,
        link_bytes_per_second=6 if number % 2 else None, started_at=None, updated_at=NOW,
        finished_at=NOW if state.is_final else None,
    )  # fmt: skip


@given(
    st.integers(0, 2 * HOSTS_AT_ONCE + 1), st.sampled_from(list(HostState)), st.text() | st.none()
)
def test_json_made_in_parts_is_that_of_the_whole(
    count: int, state: HostState, reason: str | None
) -> None:
    fields: dict[str, Any] = {
        "distribution_id": uuid.UUID(int=1),
        "image_id": "]}",
        "state": DistributionState.DISTRIBUTING,
        "reason": reason,
        "hosts": ["a"],
        "estimate": None,
    }
    hosts = [host_of(number, state, reason) for number in range(count)]

    made: list[str] = []

    async def parts(shared: list[str] | None) -> str:
        view = DistributionNow.model_construct(**fields)
        return "".join([part async for part in json_of(view, hosts, shared)])

    async def told() -> list[str]:
        return list(await asyncio.gather(parts(None), *(parts(made) for _ in range(3))))

    whole = DistributionDetail.model_construct(
        **fields, progress=[HostProgressView.model_validate(host) for host in hosts]
    )
    first, *others = asyncio.run(told())
    assert json.loads(first) == json.loads(whole.model_dump_json())
    assert others == [first] * 3
    assert len(made) == -(-count // HOSTS_AT_ONCE)
