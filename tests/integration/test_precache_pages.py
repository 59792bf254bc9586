"""The pages of precache in a real browser: the heat map is drawn from its table, and both stay current.

A page that breaks its own content security policy, or whose script fails, fails the test that looked at it.
"""

import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest_asyncio

from hostler_common import servers, testing
from hostler_common.browser_testing import OpenTab, open_browser
from hostler_precache import app
from hostler_precache import testing as precache_testing
from hostler_precache.settings import Settings

MIB = 1 << 20
PIXEL = """(() => {
  const canvas = document.querySelector("canvas.map");
  const at = (x, y) => [...canvas.getContext("2d").getImageData(x, y, 1, 1).data.slice(0, 3)].join();
  const height = canvas.height / %d;
  return [...Array(%d).keys()].map(row => [at(4, row * height + 1), at(canvas.width - 4, row * height + 1)]);
})()"""


@pytest_asyncio.fixture
async def browser() -> AsyncIterator[OpenTab]:
    async with open_browser() as opened:
        yield opened


async def test_the_heat_map_shows_which_host_has_what_and_follows_the_reports(
    run_service: testing.RunService, tmp_path: Path, browser: OpenTab
) -> None:
    async with (
        precache_testing.http_source() as source,
        run_service(
            app.serve,
            Settings,
            "hostler_precache",
            data_dir=tmp_path / "seed",
            blob_port=servers.free_port(),
            reserve_bytes=0,
            log_level="WARNING",
        ) as service,
    ):
        image_id = str(uuid.uuid4())
        url = source.add("image", precache_testing.image_of(2 * MIB))
        hosts = ["h1", "h2", "h3"]
        made = await service.api.post(
            "/v1/distributions",
            {
                "image_id": image_id,
                "image": {"image_id": image_id, "fetcher": "http", "location": url},
                "hosts": hosts,
            },
        )

        async def ready() -> dict[str, Any] | None:
            found: dict[str, Any] = await service.api.get(f"/v1/images/{image_id}")
            return found if found["state"] == "ready" else None

        image = await testing.eventually(ready)
        keys = {"distribution_id": made["distribution_id"], "blob_id": image["blob_id"]}

        async def report(host: str, **told: Any) -> None:
            await service.api.put(
                f"/v1/hosts/{host}/report",
                {
                    "url": f"http://{host}:8310",
                    "session_id": str(uuid.uuid5(uuid.NAMESPACE_DNS, host)),
                    "blobs": [{**keys, **told}],
                },
            )

        half = "f" * 32 + "0" * 32
        await report("h1", state="transferring", bytes_done=MIB, coverage=half)
        async with browser() as tab:
            await tab.go(f"{service.url}/distributions/{made['distribution_id']}")

            async def rows() -> list[list[str]]:
                found: list[list[str]] = await tab.evaluate(PIXEL % (3, 3))
                return found

            first = await rows()
            full, empty = first[0]
            assert full != empty
            assert first[1] == first[2] == [empty, empty]
            assert "waits" not in await tab.text()
            await report("h2", state="cached", bytes_done=2 * MIB)
            await report("h3", state="error", reason="storage.no_space: 0 bytes are free")

            async def follows() -> bool:
                now = await rows()
                return now[1] == [full, full] and now[2][0] not in (full, empty)

            await testing.eventually(follows)
            text = await tab.text()
            assert "storage.no_space: 0 bytes are free" in text
            await report("h1", state="cached", bytes_done=2 * MIB, coverage="f" * 64)

            async def over() -> bool:
                says: str = await tab.evaluate(
                    "document.querySelector('[data-says=state]').textContent"
                )
                return says == "done"

            await testing.eventually(over)
            assert (await rows())[0] == [full, full]
            assert "the limit is" in await tab.text()
            (tmp_path / "page.png").write_bytes(await tab.picture())
            await tab.go(service.url)
            assert image_id in await tab.text()
            assert tab.complaints == []
