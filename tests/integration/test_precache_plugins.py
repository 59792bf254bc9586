"""Listers, fetchers, servers and placers of another package, found by its entry points in real processes."""

import gzip
import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from hostler_common import client, db
from hostler_common.testing import eventually
from hostler_precache import app, testing

MODULE = Path(__file__).parent / "peers" / "foreign_plugins.py"
ENTRY_POINTS = """\
[hostler.precache.listers]
foreign-archive = foreign_plugins:Archive
foreign-unlicensed = foreign_unlicensed:Lister
foreign-nothing = foreign_plugins:Nothing
foreign-liar = foreign_plugins:Liar
foreign-ender = foreign_plugins:Ender
[hostler.precache.fetchers]
foreign-gzip = foreign_plugins:Gzip
foreign-unlicensed = foreign_unlicensed:Fetcher
foreign-nothing = foreign_plugins:Nothing
foreign-absent = foreign_absent:Fetcher
foreign-ender = foreign_plugins:Ender
[hostler.precache.servers]
foreign-name = foreign_plugins:ByName
foreign-unlicensed = foreign_unlicensed:Server
[hostler.precache.placers]
foreign-cellar = foreign_plugins:Cellar
foreign-nothing = foreign_plugins:Nothing
foreign-exit = foreign_exit:Placer
"""
DATA = testing.image_of((2 << 20) + 99, seed=9)

Start = Callable[..., AbstractAsyncContextManager[testing.Program]]


@pytest.fixture
def foreign_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that are started from now on have the package installed."""
    site = tmp_path / "site"
    described = site / "foreign_plugins-1.0.dist-info"
    described.mkdir(parents=True)
    (described / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: foreign-plugins\nVersion: 1.0\n"
    )
    (described / "entry_points.txt").write_text(ENTRY_POINTS)
    shutil.copy(MODULE, site)
    (site / "foreign_unlicensed.py").write_text("raise RuntimeError('the licence ran out')\n")
    (site / "foreign_exit.py").write_text("raise SystemExit('no licence')\n")
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)


@pytest_asyncio.fixture
async def service(
    foreign_package: None, amqp_url: str, database_url: str, tmp_path: Path
) -> Start:
    """`async with service(**settings) as program`: the service, on a migrated database."""
    await db.migrate(database_url, schema="precache", package=app.PACKAGE)
    return lambda **settings: testing.service_process(
        tmp_path / "seed", amqp_url=amqp_url, database_url=database_url, settings=settings
    )


@pytest.fixture
def agent(foreign_package: None, amqp_url: str, tmp_path: Path) -> Start:
    """`async with agent(precache_url, **settings) as program`: the agent of `host-1`."""
    return lambda precache_url, **settings: testing.agent_process(
        "host-1", tmp_path / "host-1", amqp_url=amqp_url, precache_url=precache_url,
        settings=settings,
    )  # fmt: skip


async def has_run(api: client.Api, policy: dict[str, Any]) -> dict[str, Any]:
    """The policy is made, and has run."""
    made = await api.post("/v1/policies", policy)

    async def ran() -> dict[str, Any] | None:
        shown: dict[str, Any] = await api.get(f"/v1/policies/{made['policy_id']}")
        return shown if shown["last_outcome"] else None

    found: dict[str, Any] = await eventually(ran)
    return found


async def is_over(api: client.Api, image_id: str) -> dict[str, Any]:
    """The image's only distribution, once it is over."""

    async def over() -> dict[str, Any] | None:
        listed: list[dict[str, Any]] = (await api.get("/v1/distributions"))["distributions"]
        found = [one for one in listed if one["image_id"] == image_id]
        return found[0] if found and found[0]["state"] in ("done", "error") else None

    found: dict[str, Any] = await eventually(over)
    return found


async def is_fetched(api: client.Api, image_id: str) -> None:
    """Return when all of the image is at the seed."""

    async def is_ready() -> bool:
        return bool((await api.get(f"/v1/images/{image_id}"))["state"] == "ready")

    await eventually(is_ready)


def archived(directory: Path) -> str:
    """There is one image in the archive; its id."""
    directory.mkdir()
    image_id = str(uuid.uuid4())
    (directory / f"{image_id}.gz").write_bytes(gzip.compress(DATA))
    return image_id


async def test_an_image_goes_by_foreign_plugins_of_all_kinds_from_its_archive_to_a_host(
    service: Start, agent: Start, tmp_path: Path
) -> None:
    archive = tmp_path / "archive"
    image_id = archived(archive)
    policy = {
        "name": "archive",
        "lister": "foreign-archive",
        "options": {"directory": str(archive)},
        "hosts": ["host-1"],
    }
    async with (
        service(server="foreign-name") as running,
        agent(running.url, placer="foreign-cellar") as host,
        client.open_api(running.url) as api,
    ):
        ran = await has_run(api, policy)
        assert (ran["last_outcome"], ran["last_detail"]) == (
            "ok", "1 images, 1 new, 0 moved or withdrawn",
        )  # fmt: skip
        distribution = await is_over(api, image_id)
        assert (distribution["state"], distribution["verification"]) == ("done", "hash")
        assert (await api.get(f"/v1/images/{image_id}"))["fetcher"] == "foreign-gzip"
        (wanted,) = (await api.get("/v1/desired", host="host-1"))["images"]
        assert [seed.rpartition(":")[0] for seed in wanted["seeds"]] == ["http://localhost"]
        (received,) = (await api.get(f"/v1/distributions/{distribution['distribution_id']}"))[
            "progress"
        ]
        assert received["received_from_seed_bytes"] == len(DATA)
        placed = [path.name for path in host.directory.iterdir() if path.is_file()]
        assert placed == [f"cellar-{image_id}"]
        assert (host.directory / placed[0]).read_bytes() == DATA


async def test_broken_listers_and_fetchers_are_said_to_be_and_the_service_goes_on_without_them(
    service: Start, tmp_path: Path
) -> None:
    unlicensed = "cannot be had: RuntimeError: the licence ran out"
    listers = {
        "foreign-unlicensed": f"'foreign-unlicensed' (foreign_unlicensed:Lister) {unlicensed}",
        "foreign-nothing": "'foreign-nothing' (foreign_plugins:Nothing) is no Lister: it has no list",
    }
    lies = {
        "nothing": "it lists a NoneType, which is no sequence of images",
        "text": "it lists a str, which is no sequence of images",
        "texts": "it lists a str, which is no Image",
        "path": "it lists what is not an image id: '../../etc/passwd'",
        "number": "it lists an Image whose image_id is a int",
        "size": "it lists an Image whose size_bytes is a str",
        "hash": "it lists an Image whose source_hash is a str",
    }
    fetchers = {
        "foreign-unlicensed": f"'foreign-unlicensed' (foreign_unlicensed:Fetcher) {unlicensed}",
        "foreign-nothing": "'foreign-nothing' (foreign_plugins:Nothing) is no Fetcher: it has no open",
        "foreign-absent": (
            "'foreign-absent' (foreign_absent:Fetcher) cannot be had: ModuleNotFoundError:"
            " No module named 'foreign_absent'"
        ),
    }
    archive = tmp_path / "archive"
    image_id = archived(archive)
    async with service() as running, client.open_api(running.url) as api:
        for name, why in listers.items():
            ran = await has_run(api, {"name": name, "lister": name})
            assert (ran["last_outcome"], ran["last_detail"]) == ("failed", f"lister.broken: {why}")
        for lists, why in lies.items():
            policy = {"name": lists, "lister": "foreign-liar", "options": {"lists": lists}}
            ran = await has_run(api, policy)
            assert (ran["last_outcome"], ran["last_detail"]) == ("failed", f"lister.broken: {why}")
        for name, why in fetchers.items():
            image = {"image_id": name, "fetcher": name}
            await api.post("/v1/distributions", {"image_id": name, "image": image})
            ended = await is_over(api, name)
            assert (ended["state"], ended["reason"]) == ("error", f"fetcher.broken: {why}")

        options = {"directory": str(archive)}
        policy = {"name": "good", "lister": "foreign-archive", "options": options}
        assert (await has_run(api, policy))["last_outcome"] == "ok"
        await is_fetched(api, image_id)
        await api.get("/readyz")
        assert running.process.returncode is None


async def test_a_lister_or_fetcher_that_would_end_the_service_ends_what_it_was_asked_for(
    service: Start, tmp_path: Path
) -> None:
    enders = {
        "exit": "SystemExit",
        "interrupt": "KeyboardInterrupt",
        "cancel": "CancelledError",
        "own": "Ended",
    }
    archive = tmp_path / "archive"
    image_id = archived(archive)
    async with service(fetch_concurrency=1) as running, client.open_api(running.url) as api:
        for by, raised in enders.items():
            policy = {"name": by, "lister": "foreign-ender", "options": {"by": by}}
            ran = await has_run(api, policy)
            assert (ran["last_outcome"], ran["last_detail"]) == (
                "failed", f"lister.broken: it raised {raised}",
            )  # fmt: skip
            image = {"image_id": by, "fetcher": "foreign-ender", "location": by}
            await api.post("/v1/distributions", {"image_id": by, "image": image})
            ended = await is_over(api, by)
            assert (ended["state"], ended["reason"]) == (
                "error", f"fetcher.broken: it raised {raised}",
            )  # fmt: skip
        options = {"directory": str(archive)}
        await has_run(api, {"name": "good", "lister": "foreign-archive", "options": options})
        await is_fetched(api, image_id)


@pytest.mark.parametrize(
    ("placer", "why"),
    [
        ("foreign-nothing", "is no Placer: it has no cleaner_age_seconds, directory, exclusively"),
        ("foreign-exit", "cannot be had: SystemExit: no licence"),
    ],
)
async def test_an_agent_whose_placer_is_broken_does_not_begin_and_says_why(
    agent: Start, placer: str, why: str
) -> None:
    with pytest.raises(RuntimeError) as caught:
        async with agent("http://127.0.0.1:1", placer=placer):
            pass
    assert f"HOSTLER_PRECACHE_PLACER: '{placer}' (foreign_" in str(caught.value)
    assert why in str(caught.value)


async def test_a_service_whose_server_is_broken_does_not_begin_and_says_why(
    service: Start,
) -> None:
    with pytest.raises(RuntimeError) as caught:
        async with service(server="foreign-unlicensed"):
            pass
    assert "HOSTLER_PRECACHE_SERVER: 'foreign-unlicensed'" in str(caught.value)
    assert "the licence ran out" in str(caught.value)
