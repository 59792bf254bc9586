"""The server of a seed is a strategy: what it is given, the URL that it gives, and when it ends."""

import os
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from hostler_common import servers
from hostler_common.settings import SettingsError
from hostler_precache import testing
from hostler_precache.sources import plugins
from hostler_precache.sources.plugins import SeedSite
from hostler_precache.swarming.swarm import SeedPolicy
from hostler_precache.swarming.tokens import Grant, mint
from hostler_precache.transfer.blobs import Blob, BlobServer
from hostler_precache.transfer.manifest import BlobId
from hostler_precache.transfer.seed_server import HttpServer

BLOB = BlobId("5a0e1d0e-0000-4000-8000-000000000001")
DATA = testing.image_of(1000)
KEY = bytes(32)
DISTRIBUTION = "5a0e1d0e-0000-4000-8000-00000000000d"


def site_of(directory: Path, **fields: Any) -> SeedSite:
    values: dict[str, Any] = {
        "directory": directory, "blobs": BlobServer(slots=2), "host": "127.0.0.1",
        "port": servers.free_port(), "url": None, "tls": None, "drain_seconds": 1.0, **fields,
    }  # fmt: skip
    return SeedSite(**values)


async def test_hosts_get_pieces_at_the_url_that_it_gives_until_it_is_left(tmp_path: Path) -> None:
    (tmp_path / BLOB).write_bytes(DATA)
    listed = testing.described(DATA)
    site = site_of(tmp_path)
    fd = os.open(tmp_path / BLOB, os.O_RDONLY)
    site.blobs.serve(
        Blob(BLOB, manifest=listed, key=KEY, fd=fd, have=1, policy=SeedPolicy(listed.count))
    )
    grant = Grant(blob_id=BLOB, distribution_id=DISTRIBUTION, expires_at=1 << 40)
    headers = {"Authorization": f"Bearer {mint(grant, KEY)}", "Range": "bytes=0-999"}
    try:
        async with aiohttp.ClientSession() as session:
            async with HttpServer(site).serving() as url:
                assert url == f"http://127.0.0.1:{site.port}"
                path = f"{url}/v1/blobs/{BLOB}"
                async with session.get(path, headers=headers) as answer:
                    assert (answer.status, await answer.read()) == (206, DATA)
            with pytest.raises(aiohttp.ClientConnectionError):
                await session.get(path, headers=headers)
    finally:
        os.close(fd)


async def test_the_url_that_the_operator_says_is_what_hosts_are_told(tmp_path: Path) -> None:
    async with HttpServer(site_of(tmp_path, url="https://seed.example:8443")).serving() as url:
        assert url == "https://seed.example:8443"


@pytest.mark.parametrize("name", ["bittorrent", "", "../http"])
def test_a_server_that_is_not_installed_is_none(tmp_path: Path, name: str) -> None:
    with pytest.raises(plugins.UnknownPluginError, match="is not installed"):
        plugins.server(name, site_of(tmp_path))


async def test_a_server_that_is_not_installed_is_named_with_those_that_are(precache: Any) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        async with precache(server="bittorrent"):
            pass
    assert caught.group_contains(
        SettingsError, match="'bittorrent' is not installed; there are: http"
    )
