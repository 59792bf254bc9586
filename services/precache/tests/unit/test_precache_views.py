"""What thousands of hosts are told of in one answer is told in parts, and is the same."""

import asyncio
import json
import uuid
from datetime import UTC, datetime
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from hostler_precache.distribution.distributions import DistributionState
from hostler_precache.distribution.distributions_api import (
    HOSTS_AT_ONCE,
    DistributionDetail,
    HostProgressView,
    json_of,
)
from hostler_precache.protocol import HostState

NOW = datetime(2026, 11, 21, tzinfo=UTC)


def host_of(number: int, reason: str | None) -> HostProgressView:
    return HostProgressView.model_construct(
        host=f"h{number}", state=HostState.ERROR, reason=reason, wave=1, pieces_done=number,
        bytes_done=0, coverage="", sent_bytes=0, received_from_seed_bytes=0,
        received_from_peers_bytes=0, received_from_rack_bytes=0, wasted_bytes=0, started_at=None,
        updated_at=NOW, finished_at=NOW,
    )  # fmt: skip


@given(st.integers(0, 2 * HOSTS_AT_ONCE + 1), st.text() | st.none())
def test_json_made_in_parts_is_that_of_the_whole(count: int, reason: str | None) -> None:
    fields: dict[str, Any] = {
        "distribution_id": uuid.UUID(int=1),
        "image_id": "]}",
        "state": DistributionState.DISTRIBUTING,
        "reason": reason,
        "hosts": ["a"],
        "estimate": None,
        "progress": [host_of(number, reason) for number in range(count)],
    }
    view = DistributionDetail.model_construct(**fields)
    assert json.loads(asyncio.run(json_of(view))) == json.loads(view.model_dump_json())
