"""Debian's headless Chromium, told what to do over its DevTools protocol, for tests of the pages.

A page that breaks its own content security policy, or whose script fails, fails the test that
looked at it.
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
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from hostler_common.testing import eventually

CHROMIUM = ("chromium-headless-shell", "chromium", "chromium-browser")
OpenTab = Callable[..., AbstractAsyncContextManager["Tab"]]
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
        """Take in what the browser says, until the tab is closed."""
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

    async def call(self, method: str, **params: object) -> dict[str, Any]:
        """The result of a method of the DevTools protocol."""
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

    async def evaluate(self, expression: str) -> Any:  # noqa: ANN401  what the page answers
        """The value of a JavaScript expression, awaited."""
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
        """What a reader of the page sees."""
        return str(await self.evaluate("document.body.innerText"))

    async def picture(self) -> bytes:
        """The whole page as a PNG."""
        size = (await self.call("Page.getLayoutMetrics"))["cssContentSize"]
        said = await self.call(
            "Page.captureScreenshot", captureBeyondViewport=True, clip={**size, "scale": 1}
        )
        return base64.b64decode(said["data"])


@asynccontextmanager
async def open_browser() -> AsyncIterator[OpenTab]:
    """`async with browser(dark=..., scripts=...) as tab`; the browser ends when this does."""
    with tempfile.TemporaryDirectory(
        prefix="hostler-browser-", ignore_cleanup_errors=True
    ) as name:
        async with _running(Path(name)) as opened:
            yield opened


@asynccontextmanager
async def _running(directory: Path) -> AsyncIterator[OpenTab]:
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


async def sign_in(tab: Tab, url: str, token: str) -> None:
    """Open a page that wants a sign-in, and sign in."""
    await tab.call("Network.clearBrowserCookies")
    await tab.go(url)
    await tab.evaluate(f"document.querySelector('#token').value = {json.dumps(token)}")
    await tab.act("document.querySelector('button').click()")
    assert await tab.evaluate("location.href") == url
