"""Images come from real services of a cloud: Glance and Swift behind Keystone, Swift alone; and usage says which.

Keystone, Glance and Swift are whole ones, in environments of their own; what the seed is given is an
application credential.
"""

import asyncio
import hashlib
import io
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aio_pika
import aiohttp
import pytest
import pytest_asyncio
from pydantic import SecretStr

from hostler_common import bus
from hostler_common.testing import RunService, eventually, open_bus
from hostler_precache import images, testing
from hostler_precache.images import Image, Verification
from hostler_precache.sources import (
    access,
    demand,
    fetchers,
    glance_events,
    keystone,
    listers,
    plugins,
)
from hostler_precache.sources.fetch import Fetched, fetch
from hostler_precache.sources.plugins import Surroundings
from hostler_precache.sources.source import SourceError
from hostler_usage import app as usage_app
from hostler_usage import testing as usage_testing
from hostler_usage.settings import Settings as UsageSettings

MIB = 1 << 20
DATA = testing.image_of(5 * MIB + 77, seed=5)
RunPeer = Callable[..., AbstractAsyncContextManager[str]]
Upload = Callable[..., Awaitable[dict[str, Any]]]


async def call(
    session: aiohttp.ClientSession,
    method: str,
    url: str,
    expected: int,
    *,
    token: str | None = None,
    **sent: Any,
) -> tuple[Any, Any]:
    """The JSON of an answer, and its headers."""
    headers = {**sent.pop("headers", {}), **({"X-Auth-Token": token} if token else {})}
    if isinstance(sent.get("data"), bytes):
        sent["data"] = io.BytesIO(sent["data"])
    async with session.request(method, url, headers=headers, **sent) as response:
        assert response.status == expected, await response.text()
        is_json = response.content_type == "application/json"
        return await response.json() if is_json else None, response.headers


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A Keystone as its administrator uses it."""

    session: aiohttp.ClientSession
    url: str
    token: str
    user_id: str
    project_id: str

    async def offer(self, kind: str, url: str) -> None:
        """The catalogue has a service of that type at the address."""
        body = {"service": {"name": kind, "type": kind}}
        made, _ = await call(
            self.session, "POST", f"{self.url}/v3/services", 201, token=self.token, json=body
        )
        endpoint = {
            "service_id": made["service"]["id"],
            "interface": "internal",
            "region_id": "RegionOne",
            "url": url,
        }
        await call(
            self.session, "POST", f"{self.url}/v3/endpoints", 201, token=self.token,
            json={"endpoint": endpoint},
        )  # fmt: skip

    async def application_credential(
        self, name: str = "precache"
    ) -> keystone.ApplicationCredential:
        """A fresh application credential of the administrator."""
        body = {"application_credential": {"name": name}}
        url = f"{self.url}/v3/users/{self.user_id}/application_credentials"
        made, _ = await call(self.session, "POST", url, 201, token=self.token, json=body)
        return keystone.ApplicationCredential(
            credential_id=made["application_credential"]["id"],
            secret=SecretStr(made["application_credential"]["secret"]),
        )

    async def revoke(self, token: str) -> None:
        """The token is good for nothing any more."""
        headers = {"X-Subject-Token": token}
        url = f"{self.url}/v3/auth/tokens"
        await call(self.session, "DELETE", url, 204, token=self.token, headers=headers)

    async def revoke_credential(self, credential: keystone.ApplicationCredential) -> None:
        """The application credential is no more."""
        url = f"{self.url}/v3/users/{self.user_id}/application_credentials"
        await call(
            self.session, "DELETE", f"{url}/{credential.credential_id}", 204, token=self.token
        )

    def account(self, credential: Any) -> keystone.Keystone:
        return keystone.Keystone(
            self.session, f"{self.url}/v3", credential, region="RegionOne", interface="internal"
        )


@pytest_asyncio.fixture
async def identity(
    run_peer: RunPeer, session: aiohttp.ClientSession, tmp_path: Path
) -> AsyncIterator[Identity]:
    directory = tmp_path / "keystone"
    directory.mkdir()
    async with run_peer("keystone", directory) as url:
        domain = {"name": "Default"}
        user = {"name": "admin", "domain": domain, "password": "admin"}
        auth = {
            "identity": {"methods": ["password"], "password": {"user": user}},
            "scope": {"project": {"name": "admin", "domain": domain}},
        }
        said, headers = await call(
            session, "POST", f"{url}/v3/auth/tokens", 201, json={"auth": auth}
        )
        yield Identity(
            session=session,
            url=url,
            token=headers["X-Subject-Token"],
            user_id=said["token"]["user"]["id"],
            project_id=said["token"]["project"]["id"],
        )


async def refused(work: Awaitable[Any]) -> SourceError:
    with pytest.raises(SourceError) as caught:
        await work
    return caught.value


@pytest.mark.timeout(480)  # two peers, one after the other
async def test_glance_behind_keystone_is_listed_and_fetched_with_a_credential_that_can_be_revoked(
    run_peer: RunPeer,
    session: aiohttp.ClientSession,
    identity: Identity,
    tmp_path: Path,
    upload: Upload,
) -> None:
    directory = tmp_path / "glance"
    directory.mkdir()
    async with run_peer("glance", directory, "--keystone-url", f"{identity.url}/v3") as glance:
        await identity.offer("image", glance)
        await upload(glance, DATA, token=identity.token, visibility="private")
        account = identity.account(await identity.application_credential())
        surroundings = Surroundings(session=session, keystone=account)
        lister = listers.GlanceLister(surroundings)
        (image,) = await lister.list({"owner": identity.project_id, "visibility": "private"})
        assert await lister.list({"owner": "somebody-else"}) == []

        # a token that somebody revoked is renewed, and nobody notices
        before = (await account.token()).value.get_secret_value()
        await identity.revoke(before)
        fetched = await fetch(fetchers.GlanceFetcher(surroundings), image, tmp_path / "blob")
        assert (tmp_path / "blob").read_bytes() == DATA
        assert fetched.verification is Verification.HASH
        assert (await account.token()).value.get_secret_value() != before

        # a user with a password does as well
        for password, expected in (("admin", None), ("wrong", "source.unauthenticated")):
            account = identity.account(
                keystone.Password(username="admin", password=SecretStr(password), project="admin")
            )
            lister = listers.GlanceLister(Surroundings(session=session, keystone=account))
            if expected is None:
                assert len(await lister.list({})) == 1
            else:
                assert (await refused(lister.list({}))).reason == expected

        # without a token Glance says nothing; with a credential that is gone, Keystone says why
        nobody = listers.GlanceLister(Surroundings(session=session, glance_url=glance))
        assert (await refused(nobody.list({}))).reason == "source.forbidden"
        credential = await identity.application_credential("short-lived")
        account = identity.account(credential)
        lister = listers.GlanceLister(Surroundings(session=session, keystone=account))
        assert len(await lister.list({})) == 1
        await identity.revoke_credential(credential)
        account.refused(await account.token())
        error = await refused(lister.list({}))
        assert (error.reason, error.is_transient) == ("source.unauthenticated", False)


# --- Swift


async def put_objects(session: aiohttp.ClientSession, account: str, token: str) -> None:
    """Container `images`: `plain`, `static` of three segments, `dynamic` of the same, `nested` of `static`."""
    for container in ("images", "segments"):
        await call(session, "PUT", f"{account}/{container}", 201, token=token)
    await call(session, "PUT", f"{account}/images/plain", 201, token=token, data=DATA)
    cuts = [DATA[: 2 * MIB], DATA[2 * MIB : 2 * MIB + 5], DATA[2 * MIB + 5 :]]
    segments = []
    for number, cut in enumerate(cuts):
        _, headers = await call(
            session, "PUT", f"{account}/segments/static_{number}", 201, token=token, data=cut
        )
        segments.append(
            {
                "path": f"/segments/static_{number}",
                "etag": headers["ETag"].strip('"'),
                "size_bytes": len(cut),
            }
        )
    put = f"{account}/images/static?multipart-manifest=put"
    await call(session, "PUT", put, 201, token=token, data=json.dumps(segments))
    nested = f"{account}/images/nested?multipart-manifest=put"
    await call(
        session, "PUT", nested, 201, token=token, data=json.dumps([{"path": "/images/static"}])
    )
    headers = {"X-Object-Manifest": "segments/static_"}
    await call(
        session, "PUT", f"{account}/images/dynamic", 201, token=token, data=b"", headers=headers
    )


async def get_object(surroundings: Surroundings, name: str, path: Path, **fields: Any) -> Fetched:
    image = Image(
        image_id=images.image_id("golden"), fetcher="swift", location=f"images/{name}", **fields
    )
    return await fetch(fetchers.SwiftFetcher(surroundings), image, path)


async def test_swift_objects_plain_and_large_are_fetched_and_checked_as_far_as_swift_says(
    run_peer: RunPeer, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    directory = tmp_path / "swift"
    directory.mkdir()
    async with run_peer("swift", directory) as url:
        auth = access.TempAuth(
            session, f"{url}/auth/v1.0", user="test:tester", key=SecretStr("testing")
        )
        grant = await ready(auth, session)
        token = grant.headers()["X-Auth-Token"]
        await put_objects(session, grant.url, token)
        surroundings = Surroundings(session=session, swift_tempauth=auth)
        expected = {
            "plain": Verification.CHECKSUM,
            "static": Verification.CHECKSUM,
            "dynamic": Verification.UNVERIFIABLE,
            "nested": Verification.UNVERIFIABLE,
        }
        for name, verification in expected.items():
            fetched = await get_object(surroundings, name, tmp_path / name)
            assert (tmp_path / name).read_bytes() == DATA
            assert (name, fetched.verification) == (name, verification)

        # what an image says of its bytes goes before what Swift says of the object's parts
        said = images.source_hash("sha512", hashlib.sha512(DATA).hexdigest(), None)
        fetched = await get_object(surroundings, "dynamic", tmp_path / "said", source_hash=said)
        assert fetched.verification is Verification.HASH
        wrong = images.source_hash("sha512", "0" * 128, None)
        error = await refused(
            get_object(surroundings, "static", tmp_path / "wrong", source_hash=wrong)
        )
        assert error.reason == "source.hash_mismatch"

        # bit rot in one segment, which Swift itself serves
        (segment,) = (
            path
            for path in directory.glob("devices/d1/objects/**/*.data")
            if path.stat().st_size == 2 * MIB
        )
        with segment.open("r+b") as file:
            file.seek(MIB)
            file.write(b"rot")
        error = await refused(get_object(surroundings, "static", tmp_path / "rotten"))
        # Swift may see it first, break off and take the segment away
        assert error.reason in ("source.hash_mismatch", "source.truncated", "source.incomplete")

        # a segment that is gone, an object that never was
        await call(session, "DELETE", f"{grant.url}/segments/static_1", 204, token=token)
        error = await refused(get_object(surroundings, "static", tmp_path / "gone"))
        assert error.reason in ("source.incomplete", "source.truncated")
        error = await refused(get_object(surroundings, "never", tmp_path / "never"))
        assert (error.reason, error.is_transient) == ("source.not_found", False)
        for name in ("wrong", "rotten", "gone", "never"):
            assert not (tmp_path / name).exists()


async def ready(auth: access.TempAuth, session: aiohttp.ClientSession) -> access.Grant:
    """The account, once all of Swift's servers answer."""

    async def answers() -> access.Grant | None:
        grant = await auth.grant()
        async with session.put(f"{grant.url}/ready", headers=grant.headers()) as response:
            return grant if response.status in (201, 202) else None

    found: access.Grant = await eventually(answers)
    return found


async def test_swift_goes_on_with_a_range_where_the_connection_broke(
    run_peer: RunPeer, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    directory = tmp_path / "swift"
    directory.mkdir()
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(run_peer("swift", directory))
        breaking = await stack.enter_async_context(breaking_proxy(url))
        auth = access.TempAuth(
            session, f"{url}/auth/v1.0", user="test:tester", key=SecretStr("testing")
        )
        grant = await ready(auth, session)
        await put_objects(session, grant.url, grant.headers()["X-Auth-Token"])
        behind = access.Fixed(
            grant.url.replace(url, breaking.url), SecretStr(grant.headers()["X-Auth-Token"])
        )
        for name, verification in (
            ("plain", Verification.CHECKSUM),
            ("static", Verification.CHECKSUM),
            ("dynamic", Verification.UNVERIFIABLE),
        ):
            breaking.arm(3 * MIB)
            fetched = await fetch(
                SwiftAt(access.Service("Swift", session, behind)),
                Image(
                    image_id=images.image_id("golden"), fetcher="swift", location=f"images/{name}"
                ),
                tmp_path / name,
            )
            assert (tmp_path / name).read_bytes() == DATA
            assert fetched.verification is verification
            assert len(breaking.ranges) == 1
            # what a killed process left is gone on with where Swift says what it hashes to
            breaking.ranges.clear()
            told = left_by_a_killed_process(tmp_path / f"{name}-again", fetched)
            again = await fetch(
                SwiftAt(access.Service("Swift", session, behind)),
                Image(
                    image_id=images.image_id("golden"), fetcher="swift", location=f"images/{name}"
                ),
                tmp_path / f"{name}-again",
                told=told,
            )
            assert (tmp_path / f"{name}-again").read_bytes() == DATA
            is_checked = verification is Verification.CHECKSUM
            assert (again.left_bytes, len(breaking.ranges)) == (2 * MIB * is_checked, is_checked)


def left_by_a_killed_process(path: Path, fetched: Fetched) -> bytes:
    """The first 2 MiB are beside the path, and others were told of them; the digests."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(DATA[: 2 * MIB])
    os.truncate(part, len(DATA))
    return fetched.manifest.digests[: 2 * MIB // fetched.manifest.piece_bytes * 32]


class SwiftAt(fetchers.SwiftFetcher):
    """The fetcher with a service of the test's own."""

    def __init__(self, service: access.Service) -> None:
        self._surroundings = _Only(service)  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class _Only:
    service: access.Service

    def swift(self) -> access.Service:
        return self.service


@dataclass(slots=True)
class Breaking:
    """A TCP proxy that closes a connection once so many bytes have come back since it was armed."""

    url: str
    upstream_port: int
    left_bytes: int | None = None
    ranges: list[str] = field(default_factory=list)

    def arm(self, after_bytes: int) -> None:
        """The next break is after so many bytes."""
        self.left_bytes = after_bytes
        self.ranges.clear()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self.upstream_port)

        async def up() -> None:
            while data := await reader.read(65536):
                for line in data.split(b"\r\n"):
                    if line.lower().startswith(b"range:"):
                        self.ranges.append(line.decode())
                back.write(data)
                await back.drain()

        async def down() -> None:
            while data := await there.read(65536):
                if self.left_bytes is not None:
                    self.left_bytes -= len(data)
                    if self.left_bytes < 0:
                        self.left_bytes = None
                        return
                writer.write(data)
                await writer.drain()

        tasks = {asyncio.ensure_future(up()), asyncio.ensure_future(down())}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for side in (writer, back):
                side.close()


@asynccontextmanager
async def breaking_proxy(url: str) -> AsyncIterator[Breaking]:
    made = Breaking(url="", upstream_port=int(url.rpartition(":")[2]))
    server = await asyncio.start_server(made.handle, "127.0.0.1", 0)
    made.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        yield made


@pytest.mark.timeout(480)  # two peers, one after the other
async def test_swift_behind_keystone_is_the_projects_own_account(
    run_peer: RunPeer, session: aiohttp.ClientSession, identity: Identity, tmp_path: Path
) -> None:
    directory = tmp_path / "swift"
    directory.mkdir()
    async with run_peer("swift", directory, "--keystone-url", f"{identity.url}/v3") as url:
        account_url = f"{url}/v1/AUTH_{identity.project_id}"
        await identity.offer("object-store", f"{url}/v1/AUTH_$(project_id)s")

        async def answers() -> bool:
            headers = {"X-Auth-Token": identity.token}
            async with session.put(f"{account_url}/ready", headers=headers) as response:
                return response.status in (201, 202)

        await eventually(answers)
        await put_objects(session, account_url, identity.token)
        account = identity.account(await identity.application_credential())
        surroundings = Surroundings(session=session, keystone=account)
        fetched = await get_object(surroundings, "static", tmp_path / "static")
        assert (tmp_path / "static").read_bytes() == DATA
        assert fetched.verification is Verification.CHECKSUM


# --- what Glance says on the broker


async def test_glance_says_on_the_broker_what_happens_to_its_images(
    run_peer: RunPeer,
    session: aiohttp.ClientSession,
    amqp_url: str,
    tmp_path: Path,
    upload: Upload,
) -> None:
    directory = tmp_path / "glance"
    directory.mkdir()
    due: list[str] = []
    gone: list[str] = []
    bad: list[str] = []

    async def policies_due(lister: str) -> None:
        due.append(lister)

    async def image_deleted(image_id: str) -> None:
        gone.append(image_id)

    class Kept:
        async def put(self, delivery: bus.Delivery, *, code: str, reason: str) -> None:
            del delivery, reason
            bad.append(code)

    consumer = glance_events.GlanceConsumer(policies_due=policies_due, image_deleted=image_deleted)
    subscription = bus.Subscription(
        queue=glance_events.queue(durable_exchange=False),
        handler=consumer.handle,
        quarantine=Kept(),
    )
    # the queue is there before Glance, whose exchange takes the durability that was named
    async with (
        open_bus(amqp_url, subscription),
        run_peer("glance", directory, "--amqp-url", amqp_url) as glance,
    ):
        image = await upload(glance, DATA)

        async def heard() -> bool:
            return "glance" in due

        await eventually(heard)
        assert gone == []
        await call(session, "DELETE", f"{glance}/v2/images/{image['id']}", 204)

        async def let_go() -> bool:
            return gone == [image["id"]]

        await eventually(let_go)
        connection = await aio_pika.connect(amqp_url)
        async with connection:
            channel = await connection.channel()
            exchange = await channel.get_exchange("glance")
            await exchange.publish(aio_pika.Message(b"no json"), "notifications.info")

        async def quarantined() -> bool:
            return bad == [glance_events.MALFORMED]

        await eventually(quarantined)


# --- Glance itself: no bytes, and bytes that go away


async def test_glance_images_without_bytes_deleted_and_in_another_format_end_as_they_should(
    session: aiohttp.ClientSession, glance: str, tmp_path: Path, upload: Upload
) -> None:
    surroundings = Surroundings(session=session, glance_url=glance)
    fetcher = fetchers.GlanceFetcher(surroundings)
    service = surroundings.glance()

    async def described(image_id: str) -> Image:
        image = await listers.glance_image(service, image_id)
        assert image is not None
        return image

    # no bytes
    empty = await described((await upload(glance, b""))["id"])
    fetched = await fetch(fetcher, empty, tmp_path / "empty")
    assert ((tmp_path / "empty").read_bytes(), fetched.manifest.size_bytes) == (b"", 0)

    # a qcow2, which reaches hosts as the raw disk it holds
    (tmp_path / "raw").write_bytes(DATA + bytes(MIB - 77))
    convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2"]
    process = await asyncio.create_subprocess_exec(
        *convert, str(tmp_path / "raw"), str(tmp_path / "qcow2")
    )
    assert await process.wait() == 0
    content = (tmp_path / "qcow2").read_bytes()
    shaped = await described((await upload(glance, content, disk_format="qcow2"))["id"])
    fetched = await fetch(fetcher, shaped, tmp_path / "converted")
    assert (tmp_path / "converted").read_bytes() == (tmp_path / "raw").read_bytes()
    assert (fetched.disk_format, fetched.verification) == ("raw", Verification.HASH)

    # deactivated: listed no more; deleted: not there
    image = await upload(glance, DATA, tags=["here"])
    known = await described(image["id"])
    lister = listers.GlanceLister(surroundings)
    assert [each.image_id for each in await lister.list({"tags": ["here"]})] == [image["id"]]
    url = f"{glance}/v2/images/{image['id']}"
    await call(session, "POST", f"{url}/actions/deactivate", 204)
    assert await lister.list({"tags": ["here"]}) == []
    assert await listers.glance_image(service, image["id"]) is None
    await call(session, "DELETE", url, 204)
    error = await refused(fetch(fetcher, known, tmp_path / "deleted"))
    assert (error.reason, error.is_transient) == ("source.not_found", False)
    assert not (tmp_path / "deleted").exists()


async def test_glance_goes_on_with_a_range_where_its_store_serves_them(
    session: aiohttp.ClientSession, glance: str, tmp_path: Path, upload: Upload
) -> None:
    image = await upload(glance, DATA)
    async with breaking_proxy(glance) as breaking:
        breaking.arm(2 * MIB)
        surroundings = Surroundings(session=session, glance_url=breaking.url)
        known = await listers.glance_image(surroundings.glance(), image["id"])
        assert known is not None
        fetcher = fetchers.GlanceFetcher(surroundings)
        fetched = await fetch(fetcher, known, tmp_path / "blob")
        assert (tmp_path / "blob").read_bytes() == DATA
        assert len(breaking.ranges) == 1

        # what a killed process left
        breaking.ranges.clear()
        told = left_by_a_killed_process(tmp_path / "again", fetched)
        again = await fetch(fetcher, known, tmp_path / "again", told=told)
        assert (tmp_path / "again").read_bytes() == DATA
        assert (again.left_bytes, breaking.ranges) == (2 * MIB, [f"Range: bytes={2 * MIB}-"])

        # deleted between the break and the range
        breaking.arm(2 * MIB)
        fetching = plugins.Surroundings(session=session, glance_url=breaking.url)

        async with fetchers.GlanceFetcher(fetching).open(known) as source:
            chunks = aiter(source.chunks)
            await anext(chunks)
            await call(session, "DELETE", f"{glance}/v2/images/{image['id']}", 204)

            async def rest() -> None:
                async for _ in chunks:
                    pass

            error = await refused(rest())
        assert (error.reason, error.is_transient) == ("source.not_found", False)


# --- demand


def launches(image: str, count: int, start: datetime, prefix: str) -> list[usage_testing.Message]:
    said: list[usage_testing.Message] = []
    for number in range(count):
        life = usage_testing.InstanceLife(
            instance_id=f"{prefix}-{number}",
            project_id="p1",
            steps=(
                usage_testing.Step(
                    at=start + timedelta(minutes=number), action="create", image=image
                ),
            ),
        )
        said += life.messages()
    return said


async def test_the_images_launched_most_lately_are_listed_as_glance_describes_them(
    session: aiohttp.ClientSession,
    glance: str,
    run_service: RunService,
    amqp_url: str,
    upload: Upload,
) -> None:
    made = [await upload(glance, DATA[: n + 1], name=f"image-{n}") for n in range(4)]
    ids = [image["id"] for image in made]
    now = datetime.now(UTC).replace(microsecond=0)
    lately, before = now - timedelta(days=1), now - timedelta(days=20)
    said = [
        *launches(ids[0], 1, lately, "one"),
        *launches(ids[1], 3, lately, "three"),
        *launches(ids[2], 5, before, "old"),  # they run on, and were launched long ago
        *launches(ids[3], 2, lately, "two"),
        *launches("00000000-0000-0000-0000-00000000dead", 9, lately, "deleted"),
    ]
    settings = {"fold_seconds": 0.1, "log_level": "WARNING"}
    async with (
        run_service(usage_app.serve, UsageSettings, usage_app.PACKAGE, **settings) as usage,
        await aio_pika.connect(amqp_url) as connection,
    ):
        channel = await connection.channel()
        exchange = await channel.get_exchange("nova")
        for message in said:
            await exchange.publish(aio_pika.Message(message.body()), f"{message.topic}.info")

        async def folded() -> bool:
            events = await usage.api.get("/v1/events", limit=1)
            shown = await usage.api.get(
                "/v1/usage", start=before.isoformat(), end=now.isoformat(), group_by="image"
            )
            return (
                bool(events["events"])
                and len(shown["usage"]) == 5
                and not shown["unfolded_resources"]
            )

        await eventually(folded)
        lister = demand.DemandLister(
            Surroundings(session=session, glance_url=glance, usage_url=usage.url)
        )

        async def listed(**options: Any) -> list[str]:
            return [image.image_id for image in await lister.list(options)]

        assert await listed() == [ids[1], ids[3], ids[0]]
        assert await listed(top=2) == [ids[1], ids[3]]
        assert await listed(min_launches=2) == [ids[1], ids[3]]
        assert await listed(days=30) == [ids[2], ids[1], ids[3], ids[0]]
        assert await listed(region="elsewhere") == []
        (most,) = await lister.list({"top": 1})
        assert (most.fetcher, most.size_bytes, most.name) == ("glance", 2, "image-1")
        assert most.source_hash is not None

    # usage is gone, or not configured
    error = await refused(lister.list({}))
    assert (error.reason, error.is_transient) == ("source.unreachable", True)
    unset = demand.DemandLister(Surroundings(session=session, glance_url=glance))
    assert (await refused(unset.list({}))).reason == "source.not_configured"
    assert (await refused(lister.list({"top": 0}))).reason == "lister.options"
