"""The pages of usage in a real browser: charts are drawn from their tables, and buttons do what they say.

Debian's headless Chromium is told what to do over its DevTools protocol. A page that breaks its own
content security policy, or whose script fails, fails the test that looked at it.
"""

import asyncio
import base64
import contextlib
import itertools
import json
import os
import shutil
import signal
import struct
import tempfile
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aio_pika
import aiohttp
import pytest
import pytest_asyncio

from hostler_common import auth, client
from hostler_common.testing import RunningService, RunService, eventually
from hostler_usage import app
from hostler_usage.settings import Settings
from hostler_usage.testing import (
    LARGE,
    MEDIUM,
    SMALL,
    InstanceLife,
    Message,
    Step,
    VolumeLife,
    VolumeStep,
)

CHROMIUM = ("chromium-headless-shell", "chromium", "chromium-browser")
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
NOW = datetime.now(UTC).replace(microsecond=0)
PROJECTS = ("analytics", "webshop", "research")


# --- the browser


@dataclass(slots=True)
class Tab:
    """A tab of the browser. `complaints` are errors of scripts and of the security policy."""

    socket: aiohttp.ClientWebSocketResponse
    complaints: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)
    answers_dialogs: bool = True
    _serial: "itertools.count[int]" = field(default_factory=itertools.count)
    _answers: dict[int, "asyncio.Future[dict[str, Any]]"] = field(default_factory=dict)
    _loaded: asyncio.Event = field(default_factory=asyncio.Event)

    async def listen(self) -> None:
        async for message in self.socket:
            said = json.loads(message.data)
            if said.get("id") in self._answers:
                self._answers.pop(said["id"]).set_result(said)
            match said.get("method"):
                case "Page.loadEventFired":
                    self._loaded.set()
                case "Page.javascriptDialogOpening":
                    self.dialogs.append(said["params"]["message"])
                    answer = {"accept": self.answers_dialogs}
                    # its answer is nobody's: this is the only reader
                    await self._send("Page.handleJavaScriptDialog", answer)
                case "Runtime.exceptionThrown":
                    self.complaints.append(json.dumps(said["params"]))
                case "Log.entryAdded" if said["params"]["entry"]["level"] == "error":
                    self.complaints.append(json.dumps(said["params"]))

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._serial)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        await self._send(method, params, number)
        said = await answer
        assert "error" not in said, said
        result: dict[str, Any] = said["result"]
        return result

    async def _send(self, method: str, params: dict[str, Any], number: int | None = None) -> None:
        number = next(self._serial) if number is None else number
        await self.socket.send_json({"id": number, "method": method, "params": params})

    async def evaluate(self, expression: str) -> Any:
        said = await self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in said, said
        return said["result"].get("value")

    async def go(self, url: str) -> None:
        """Open a page, and wait until it is loaded and painted."""
        self._loaded.clear()
        await self.call("Page.navigate", url=url)
        await self._settle()

    async def act(self, expression: str) -> None:
        """Do something on the page that leads to another one."""
        self._loaded.clear()
        await self.evaluate(expression)
        await self._settle()

    async def _settle(self) -> None:
        await self._loaded.wait()
        await self.call("Page.captureScreenshot")  # painted, with scripts or without

    async def text(self) -> str:
        return str(await self.evaluate("document.body.innerText"))

    async def picture(self) -> bytes:
        """The whole page as a PNG."""
        size = (await self.call("Page.getLayoutMetrics"))["cssContentSize"]
        said = await self.call(
            "Page.captureScreenshot", captureBeyondViewport=True, clip={**size, "scale": 1}
        )
        return base64.b64decode(said["data"])


@asynccontextmanager
async def open_browser(directory: Path) -> AsyncIterator[Callable[..., Any]]:
    """`async with browser(dark=..., scripts=...) as tab`; the browser ends with the test."""
    program = next((found for name in CHROMIUM if (found := shutil.which(name))), None)
    assert program, "no Chromium: run scripts/bootstrap test"
    process = await asyncio.create_subprocess_exec(
        program,
        "--headless",
        *(["--no-sandbox"] if os.geteuid() == 0 else []),
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--hide-scrollbars",
        "--window-size=1320,900",
        "--remote-debugging-port=0",
        f"--user-data-dir={directory}",
        "about:blank",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, "HOME": str(directory)},
        start_new_session=True,  # the program may be a script around it: they end together
    )
    try:

        async def port() -> str | None:
            assert process.returncode is None, "the browser ended at once"
            found = directory / "DevToolsActivePort"
            return found.read_text().split("\n")[0] if found.exists() else None

        address = f"http://127.0.0.1:{await eventually(port)}"
        async with aiohttp.ClientSession() as session:

            @asynccontextmanager
            async def open_tab(*, dark: bool = False, scripts: bool = True) -> AsyncIterator[Tab]:
                async with session.put(f"{address}/json/new?about:blank") as answer:
                    target = await answer.json()
                async with session.ws_connect(
                    target["webSocketDebuggerUrl"], max_msg_size=0
                ) as socket:
                    tab = Tab(socket)
                    listening = asyncio.create_task(tab.listen())
                    for domain in ("Page", "Runtime", "Log"):
                        await tab.call(f"{domain}.enable")
                    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
                    await tab.call("Emulation.setEmulatedMedia", features=[scheme])
                    if not scripts:
                        await tab.call("Emulation.setScriptExecutionDisabled", value=True)
                    yield tab
                    assert tab.complaints == []
                await listening

            yield open_tab
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def pixels(png: bytes) -> tuple[int, int, list[bytes]]:
    """Width, height and rows of a PNG of 8 bits a channel, without alpha or with it."""
    width, height, depth, kind = struct.unpack(">IIBB", png[16:26])
    assert (depth, kind) in {(8, 2), (8, 6)}
    data, at = b"", 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        if png[at + 4 : at + 8] == b"IDAT":
            data += png[at + 8 : at + 8 + length]
        at += length + 12
    raw = zlib.decompress(data)
    size = 3 if kind == 2 else 4
    stride = width * size + 1
    return width, height, [raw[n * stride : (n + 1) * stride] for n in range(height)]


# --- the cloud


def lives(days: int = 4) -> tuple[list[InstanceLife], list[VolumeLife]]:
    """Instances and volumes of three projects, up to now: resizes, stops, deletes."""
    born = (NOW - days * DAY).replace(minute=0, second=0)
    instances = []
    for number in range(6):
        start = born + number * 3 * HOUR
        steps = [Step(at=start, action="create", flavor=(SMALL, MEDIUM, LARGE)[number % 3])]
        if number % 2:
            steps.append(Step(at=start + 20 * HOUR, action="resize", flavor=LARGE))
        if number % 3 == 0:
            steps.append(Step(at=start + 30 * HOUR, action="stop"))
            steps.append(Step(at=start + 40 * HOUR, action="start"))
        if number == 4:
            steps.append(Step(at=start + 50 * HOUR, action="delete"))
        instances.append(
            InstanceLife(
                instance_id=f"00000000-0000-4000-8000-{number:012}",
                project_id=PROJECTS[number % 3],
                steps=tuple(steps),
                host=f"cmp-{number:03}",
            )
        )
    volumes = [
        VolumeLife(
            volume_id="00000000-0000-4000-9000-000000000001",
            project_id="webshop",
            steps=(
                VolumeStep(at=born, action="create", size_gb=20),
                VolumeStep(at=born + 24 * HOUR, action="extend", size_gb=50),
            ),
        )
    ]
    return instances, volumes


def messages(days: int = 4) -> list[Message]:
    until = NOW - HOUR
    instances, volumes = lives(days)
    sent = [m for life in instances for m in life.messages(audits_until=until)]
    return sent + [m for life in volumes for m in life.messages(audits_until=until)]


FAILED = Message(
    topic="notifications",
    event_type="compute.instance.resize.error",
    publisher_id="compute.cmp-001",
    timestamp=NOW - 2 * HOUR,
    message_id="11111111-1111-4111-8111-111111111111",
    priority="ERROR",
    payload={
        "tenant_id": "webshop",
        "instance_id": "00000000-0000-4000-8000-000000000001",
        "message": "No space left",
    },
)

RunUsage = Callable[..., AbstractAsyncContextManager[RunningService]]


@pytest.fixture
def run_usage(run_service: RunService) -> RunUsage:
    def run(**settings: Any) -> AbstractAsyncContextManager[RunningService]:
        values = {"fold_seconds": 0.05, "batch_seconds": 0.02, "log_level": "WARNING", **settings}
        return run_service(app.serve, Settings, app.PACKAGE, **values)

    return run


@pytest_asyncio.fixture
async def browser() -> AsyncIterator[Callable[..., Any]]:
    with tempfile.TemporaryDirectory(
        prefix="hostler-browser-", ignore_cleanup_errors=True
    ) as name:
        async with open_browser(Path(name)) as opened:
            yield opened


async def send(url: str, bodies: Sequence[bytes]) -> None:
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel(publisher_confirms=True)
        nova = await channel.get_exchange("nova")
        for body in bodies:
            await nova.publish(
                aio_pika.Message(body, content_type="application/json"), "notifications.info"
            )


async def folded(api: client.Api, events: int) -> None:
    """Return when all are stored and folded."""

    async def holds() -> bool:
        usage = await api.get(
            "/v1/usage",
            start=(NOW - 60 * DAY).isoformat(),
            end=(NOW + DAY).isoformat(),
            group_by="project",
        )
        metrics = await api.get("/metrics")
        stored = sum(
            float(line.rpartition(" ")[2])
            for line in metrics.splitlines()
            if line.startswith("hostler_usage_notifications_total") and 'outcome="stored"' in line
        )
        return usage["unfolded_resources"] == 0 and stored >= events

    await eventually(holds)


INSTANCE = "00000000-0000-4000-8000-000000000001"
COLOURS = """[...document.querySelectorAll("canvas")].map(canvas => {
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  const seen = {};
  for (let at = 0; at < data.length; at += 4)
    if (data[at + 3] === 255) {
      const name = "#" + [0, 1, 2].map(n => data[at + n].toString(16).padStart(2, "0")).join("");
      seen[name] = (seen[name] || 0) + 1;
    }
  return seen;
})"""
"""How many pixels of each colour each chart has."""
COLUMNS = """Object.fromEntries([...document.querySelectorAll("table.drawn thead th")].slice(1)
  .map((head, n) => [head.textContent, {
    colour: getComputedStyle(document.documentElement)
      .getPropertyValue("--series-" + (head.dataset.colour || n + 1)).trim(),
    sum: [...document.querySelectorAll("table.drawn tbody tr")]
      .reduce((sum, row) => sum + Number(row.cells[n + 1].dataset.value), 0),
  }]))"""
"""The columns of the page's chart's table: their colours, and what they add up to."""


async def fold_all(service: RunningService, amqp_url: str) -> None:
    sent = [*messages(), FAILED]
    await send(amqp_url, [message.body() for message in sent])
    await folded(service.api, len(sent))


async def test_bars_are_as_large_as_the_numbers_in_the_table(
    run_usage: RunUsage, amqp_url: str, browser: Callable[..., Any]
) -> None:
    async with run_usage() as service:
        await fold_all(service, amqp_url)

        async def vcpu_hours() -> dict[str, float]:
            usage = await service.api.get(
                "/v1/usage",
                start=NOW.replace(day=1, hour=0, minute=0, second=0).isoformat(),
                end=(NOW + DAY).isoformat(),
                group_by="project",
            )
            return {row["group"]["project"]: row["hours"]["vcpu_hours"] for row in usage["usage"]}

        for dark in (False, True):
            before = await vcpu_hours()
            async with browser(dark=dark) as tab:
                await tab.go(f"{service.url}/?measure=vcpu_hours&month={NOW:%Y-%m}")
                (areas,) = await tab.evaluate(COLOURS)
                columns = await tab.evaluate(COLUMNS)
            after = await vcpu_hours()
            assert sorted(columns) == sorted(before) == sorted(PROJECTS)
            whole = sum(column["sum"] for column in columns.values())
            painted = sum(areas[column["colour"]] for column in columns.values())
            for name, column in columns.items():
                assert before[name] - 1e-6 <= column["sum"] <= after[name] + 1e-6  # time went on
                share = areas[column["colour"]] / painted
                assert share == pytest.approx(column["sum"] / whole, abs=0.03), (areas, columns)


async def test_every_chart_has_its_table_and_every_page_keeps_its_security_policy(
    run_usage: RunUsage, amqp_url: str, browser: Callable[..., Any]
) -> None:
    async with run_usage() as service:
        await fold_all(service, amqp_url)
        event = (await service.api.get("/v1/events", limit=1))["events"][0]["id"]
        charts = {
            "/": 1,
            "/projects": 0,
            "/projects/webshop": 1,
            f"/resources/instance/{INSTANCE}": 1,
            "/audits": 1,
            "/operations": 1,
            "/events": 0,
            f"/events/{event}": 0,
            "/quarantine": 0,
        }
        for path, count in charts.items():
            async with browser() as tab:
                await tab.go(service.url + path)
                assert await tab.evaluate("document.querySelectorAll('canvas').length") == count
                tables = await tab.evaluate(
                    "document.querySelectorAll('figure table.drawn').length"
                )
                assert tables == count, path
                for areas in await tab.evaluate(COLOURS):
                    assert len(areas) > 1, path
                width = await tab.evaluate(
                    "document.documentElement.scrollWidth - document.documentElement.clientWidth"
                )
                assert width == 0, path  # wide tables scroll by themselves


async def test_a_resources_intervals_are_drawn_to_scale_and_its_events_lead_to_their_messages(
    run_usage: RunUsage, amqp_url: str, browser: Callable[..., Any]
) -> None:
    async with run_usage() as service:
        await fold_all(service, amqp_url)
        history = await service.api.get(f"/v1/resources/instance/{INSTANCE}/intervals")
        events = await service.api.get("/v1/events", resource_id=INSTANCE, limit=1000)
        async with browser() as tab:
            await tab.go(f"{service.url}/resources/instance/{INSTANCE}")
            bars = await tab.evaluate(
                "[...document.querySelectorAll('[data-lane=state] a')].map(bar =>"
                " ({width: bar.querySelector('rect').width.baseVal.value,"
                "   hint: bar.querySelector('title').textContent}))"
            )
            flavors = await tab.evaluate(
                "[...document.querySelectorAll('[data-lane=flavor] title')].map(t => t.textContent)"
            )
            assert [text.split(",")[0] for text in flavors] == ["m1.medium", "m1.large"]
            rows = await tab.evaluate("document.querySelectorAll('#intervals tbody tr').length")
            assert rows == len(history["intervals"])
            whole = history["intervals"][0]["start"], history["intervals"][-1]["end"]
            assert whole[1] is None  # it lasts
            held = NOW - datetime.fromisoformat(whole[0])
            width = sum(bar["width"] for bar in bars)
            picture = await tab.evaluate(
                "document.querySelector('.timeline').viewBox.baseVal.width"
            )
            # 2 % of the window are room before its birth
            assert width == pytest.approx((picture - 110) / 1.02, rel=0.02), (held, bars)
            marks = await tab.evaluate("document.querySelectorAll('.timeline .mark').length")
            assert marks == len(events["events"])
            error = await tab.evaluate(
                "document.querySelector('.timeline .mark.error').parentNode"
                ".querySelector('title').textContent"
            )
            assert error.startswith("compute.instance.resize.error, ")
            await tab.act(
                "document.querySelector('.timeline .mark.error').dispatchEvent("
                "new MouseEvent('click', {bubbles: true}))"
            )
            text = await tab.text()
            assert "compute.instance.resize.error" in text
            assert "No space left" in text  # its body
            await tab.go(f"{service.url}/resources/instance/{INSTANCE}")
            cited = history["intervals"][0]["opened_by"][0]["message_id"]
            await tab.act("document.querySelector('#interval-1 a.cite').click()")
            assert cited in await tab.text()


async def test_without_scripts_the_tables_are_open_and_the_timeline_is_drawn(
    run_usage: RunUsage, amqp_url: str, browser: Callable[..., Any]
) -> None:
    async with run_usage() as service:
        await fold_all(service, amqp_url)
        async with browser(scripts=False) as tab:
            await tab.go(f"{service.url}/resources/instance/{INSTANCE}")
            found = await tab.call("DOM.getDocument", depth=-1)
            root = found["root"]["nodeId"]

            async def count(selector: str) -> int:
                nodes = await tab.call("DOM.querySelectorAll", nodeId=root, selector=selector)
                return len(nodes["nodeIds"])

            assert await count("canvas") == 0
            assert await count("details[open] table.drawn td[data-value]") > 0
            assert await count(".timeline [data-lane=state] rect") > 0
            picture = await tab.picture()
        _, height, rows = pixels(picture)
        assert len({bytes(row) for row in rows}) > height // 10  # there is something on it


async def test_an_operator_signs_in_and_replays_and_discards_by_the_buttons(
    run_usage: RunUsage, amqp_url: str, tmp_path: Path, browser: Callable[..., Any]
) -> None:
    tokens = tmp_path / "tokens"
    issued = {
        name: auth.new_token(name=name, role=role, projects=projects)
        for name, role, projects in (
            ("admin", auth.Role.ADMIN, "*"),
            ("operator", auth.Role.OPERATOR, "*"),
            ("alice", auth.Role.READER, "webshop"),
        )
    }
    tokens.write_text("\n".join(line for _, line in issued.values()))
    secrets = {name: token for name, (token, _) in issued.items()}
    settings = {"auth_mode": "token", "auth_tokens_file": tokens}
    async with (
        run_usage(**settings) as service,
        client.open_api(service.url, token=secrets["admin"]) as api,
    ):
        await send(amqp_url, [b"not json", b'{"oslo.version": "3.0", "oslo.message": ""}'])

        async def entries() -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = (await api.get("/v1/quarantine"))["entries"]
            return found

        async def both() -> Any:
            found = await entries()
            return len(found) == 2 and found

        first, second = await eventually(both)

        async with browser() as tab:
            await _sign_in(tab, f"{service.url}/quarantine", secrets["operator"])
            text = await tab.text()
            assert "usage.notification.not_json" in text
            assert "Discard" not in text  # that is for admins, as in the API
            await tab.go(f"{service.url}/quarantine/{first['id']}")
            assert "not json" in await tab.text()
            await tab.act("document.querySelector('form[action$=\"/replay\"] button').click()")
            assert "on its way to its queue again" in await tab.text()

            async def back() -> Any:
                found = [entry for entry in await entries() if entry["id"] > second["id"]]
                return found if len(await entries()) == 2 else None

            (again,) = await eventually(back)
            assert again["code"] == first["code"]  # still not JSON
            assert again["queue"] == first["queue"]

            await _sign_in(tab, f"{service.url}/quarantine", secrets["admin"])
            discard = f"document.querySelector('form[action=\"/quarantine/{again['id']}/discard\"] button')"
            tab.answers_dialogs = False
            await tab.evaluate(f"{discard}.click()")
            assert tab.dialogs == [f"Forget message {again['id']} for ever?"]
            assert len(await entries()) == 2  # not meant
            tab.answers_dialogs = True
            await tab.act(f"setTimeout(() => {discard}.click())")
            assert "The message is gone" in await tab.text()
        assert [entry["id"] for entry in await entries()] == [second["id"]]

        async with browser() as tab:
            await _sign_in(tab, f"{service.url}/", secrets["alice"])
            text = await tab.text()
            assert "Ingest" not in text
            await tab.go(f"{service.url}/quarantine")
            assert "auth.forbidden" in await tab.text()
            tab.complaints.clear()  # the 403 itself


async def test_another_sites_form_changes_nothing(
    run_usage: RunUsage, amqp_url: str, browser: Callable[..., Any]
) -> None:
    async with run_usage() as service:  # without authentication there is nothing else in the way
        await send(amqp_url, [b"not json"])

        async def one() -> Any:
            return (await service.api.get("/v1/quarantine"))["entries"]

        (entry,) = await eventually(one)
        action = f"{service.url}/quarantine/{entry['id']}/discard"
        async with browser() as tab:
            await tab.go(
                f"data:text/html,<form method=post action={action}><button>win</button></form>"
            )
            await tab.act("document.querySelector('button').click()")
            assert "usage.page.other_site" in await tab.text()
            tab.complaints.clear()  # the 403 itself
        assert len(await one()) == 1


async def _sign_in(tab: Tab, url: str, token: str) -> None:
    await tab.call("Network.clearBrowserCookies")
    await tab.go(url)
    await tab.evaluate(f"document.querySelector('#token').value = {json.dumps(token)}")
    await tab.act("document.querySelector('button').click()")
    assert await tab.evaluate("location.href") == url
