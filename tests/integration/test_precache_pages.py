"""The pages of precache in a real browser: the heat map is drawn from its table, and both stay current.

A page that breaks its own content security policy, or whose script fails, fails the test that looked at it.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from hostler_common import servers, testing
from hostler_common.browser_testing import OpenTab, Tab, open_browser
from hostler_precache import app, pages
from hostler_precache import testing as precache_testing
from hostler_precache.settings import Settings

MIB = 1 << 20
SIZE = 2 * MIB
PIXEL = """(() => {
  const canvas = document.querySelector("canvas.map");
  const at = (x, y) => [...canvas.getContext("2d").getImageData(x, y, 1, 1).data.slice(0, 3)].join();
  const height = canvas.height / %d;
  return [...Array(%d).keys()].map(row => [at(4, row * height + Math.min(1, height - 1)),
    at(canvas.width - 4, row * height + Math.min(1, height - 1))]);
})()"""
CELLS = """[...document.querySelectorAll("table.hosts tbody tr")].map(row =>
  [row.dataset.host, row.cells[1].textContent, row.querySelector("progress")?.value ?? null])"""


@pytest_asyncio.fixture
async def browser() -> AsyncIterator[OpenTab]:
    async with open_browser() as opened:
        yield opened


class Site:
    """A service, and hosts that say what the test makes them say."""

    def __init__(self, service: testing.RunningService, source: precache_testing.Source) -> None:
        self.service, self.source = service, source
        self.api, self.url = service.api, service.url
        self.keys: dict[str, str] = {}
        self.image_id = str(uuid.uuid4())

    async def distribute(self, **fields: Any) -> str:
        """The page of a distribution of an image of two MiB."""
        url = self.source.add("image", precache_testing.image_of(SIZE))
        image = {"image_id": self.image_id, "fetcher": "http", "location": url}
        made = await self.api.post(
            "/v1/distributions", {"image_id": self.image_id, "image": image, **fields}
        )
        self.keys["distribution_id"] = made["distribution_id"]
        return f"{self.url}/distributions/{made['distribution_id']}"

    async def fetched(self) -> None:
        """The image is at the seed."""

        async def ready() -> dict[str, Any] | None:
            found: dict[str, Any] = await self.api.get(f"/v1/images/{self.image_id}")
            return found if found["state"] == "ready" else None

        self.keys["blob_id"] = (await testing.eventually(ready))["blob_id"]

    async def report(self, host: str, **told: Any) -> None:
        """One report of the host."""
        await self.api.put(
            f"/v1/hosts/{host}/report",
            {
                "url": f"http://{host}:8310",
                "session_id": str(uuid.uuid5(uuid.NAMESPACE_DNS, host)),
                "blobs": [{**self.keys, **told}],
            },
        )


OpenSite = Callable[[], AbstractAsyncContextManager[Site]]


@pytest.fixture
def open_site(run_service: testing.RunService, tmp_path: Path) -> OpenSite:
    """`async with open_site() as site`."""

    @asynccontextmanager
    async def opened() -> AsyncIterator[Site]:
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
            yield Site(service, source)

    return opened


async def shown(tab: Tab, hosts: int) -> list[list[str]]:
    """The colours of the first and the last bucket of each row of the map."""
    found: list[list[str]] = await tab.evaluate(PIXEL % (hosts, hosts))
    return found


async def says(tab: Tab, name: str) -> str:
    """What the page says of itself there."""
    found: str = await tab.evaluate(f"document.querySelector('[data-says={name}]').textContent")
    return found


async def test_the_heat_map_shows_which_host_has_what_and_follows_the_reports(
    open_site: OpenSite, tmp_path: Path, browser: OpenTab
) -> None:
    async with open_site() as site, browser() as tab:
        page = await site.distribute(hosts=["h1", "h2", "h3"])
        await site.fetched()
        half = "f" * 32 + "0" * 32
        await site.report("h1", state="transferring", bytes_done=MIB, coverage=half)
        await tab.go(page)
        first = await shown(tab, 3)
        full, empty = first[0]
        assert full != empty
        assert first[1] == first[2] == [empty, empty]
        assert "waits" not in await tab.text()
        assert await tab.evaluate(CELLS) == [
            ["h1", "transferring", MIB],
            ["h2", "waiting, not heard of", 0],
            ["h3", "waiting, not heard of", 0],
        ]
        await site.report("h2", state="cached", bytes_done=SIZE)
        await site.report("h3", state="error", reason="storage.no_space: 0 bytes are free")

        async def follows() -> bool:
            now = await shown(tab, 3)
            return now[1] == [full, full] and now[2][0] not in (full, empty)

        await testing.eventually(follows)
        assert "storage.no_space: 0 bytes are free" in await tab.text()
        await site.report("h1", state="cached", bytes_done=SIZE, coverage="f" * 64)

        async def over() -> bool:
            return await says(tab, "state") == "done"

        await testing.eventually(over)
        assert (await shown(tab, 3))[0] == [full, full]
        answer = await site.api.get(f"/v1/distributions/{site.keys['distribution_id']}")
        assert "the limit is" in answer["pace"]
        assert (await says(tab, "pace"), await says(tab, "left")) == (answer["pace"], "-")
        (tmp_path / "page.png").write_bytes(await tab.picture())
        await tab.go(site.url)
        assert site.image_id in await tab.text()


async def test_a_page_that_was_open_before_the_image_was_there_shows_how_far_hosts_are(
    open_site: OpenSite, browser: OpenTab
) -> None:
    async with open_site() as site, browser() as tab:
        site.source.pause_after = 0  # the source says nothing yet, not even how much it has
        await tab.go(await site.distribute(labels={}))
        assert await says(tab, "state") == "fetching"
        assert await tab.evaluate(CELLS) == []
        site.source.go_on.set()
        await site.fetched()
        await site.api.get("/v1/desired", host="h1")
        await site.report("h1", state="transferring", bytes_done=MIB, coverage="f" * 32)

        async def follows() -> bool:
            return bool(await tab.evaluate(CELLS) == [["h1", "transferring", MIB]])

        await testing.eventually(follows)
        assert await says(tab, "state") == "distributing"
        assert await says(tab, "fetched") == "2.0 MiB"


async def test_of_more_hosts_than_rows_the_map_has_all_and_shows_the_one_that_failed(
    open_site: OpenSite, tmp_path: Path, browser: OpenTab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "HOSTS_SHOWN", 5)
    names = [f"h{number:04}" for number in range(1000)]
    async with open_site() as site, browser() as tab:
        page = await site.distribute(hosts=names)
        await site.fetched()
        first, *others = names

        async def report(name: str) -> None:
            await site.report(name, state="cached", bytes_done=SIZE)

        for start in range(0, len(others), 100):
            await asyncio.gather(*(report(name) for name in others[start : start + 100]))
        await tab.go(page)
        bands = 334  # of three hosts each

        async def all_are_drawn() -> bool:
            height = await tab.evaluate("document.querySelector('canvas.map').height")
            return bool(height == bands)

        await testing.eventually(all_are_drawn)
        drawn = await shown(tab, bands)
        assert drawn[0][0] != drawn[1][0]  # one of three has nothing
        assert len({pixel for row in drawn[1:] for pixel in row}) == 1
        assert await says(tab, "row") == "a row 3 hosts, red where one of them failed"
        assert len(await tab.evaluate(CELLS)) == 5
        await site.report(first, state="error", reason="storage.no_space: 0 bytes are free")

        async def is_over() -> bool:
            return await says(tab, "state") == "done"

        await testing.eventually(is_over)
        failed = (await shown(tab, bands))[0]
        assert failed not in drawn
        # what is over is drawn whole, too
        await tab.go(page)
        await testing.eventually(all_are_drawn)
        assert (await shown(tab, bands))[0] == failed
        await tab.evaluate(
            "document.querySelector('canvas.map').dispatchEvent("
            "new MouseEvent('mousemove', {clientX: 0, clientY: 0}))"
        )
        (tmp_path / "many.png").write_bytes(await tab.picture())
