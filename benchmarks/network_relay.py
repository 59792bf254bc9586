"""Connections carried on to a port of loopback: hosts of a `network_rig` reach servers that listen only there."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast


class _End(asyncio.Protocol):
    """One end of a carried connection; what it hears goes out at the other."""

    def __init__(self, other: "_End | None" = None) -> None:
        self.other = other
        self.transport: asyncio.Transport | None = None
        self.early: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        if self.other is not None and self.other.early:
            self.transport.writelines(self.other.early)

    def data_received(self, data: bytes) -> None:
        if self.other is None or self.other.transport is None:
            self.early.append(data)
        else:
            self.other.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()

    def pause_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.resume_reading()


class _Accepted(_End):
    """The end that somebody has connected to."""

    def __init__(self, port: int, connecting: "set[asyncio.Task[None]]") -> None:
        super().__init__()
        self._port = port
        self._connecting = connecting

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        task = asyncio.get_running_loop().create_task(self._connect())
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _connect(self) -> None:
        assert self.transport is not None
        other = self.other = _End(self)
        try:
            await asyncio.get_running_loop().create_connection(
                lambda: other, "127.0.0.1", self._port
            )
        except OSError:
            self.transport.close()
            return
        if self.transport.is_closing():
            self.connection_lost(None)


@asynccontextmanager
async def relay(port: int, *, address: str | Path) -> AsyncIterator[int]:
    """Who connects to the address talks to the port of loopback; the address's own port.

    An IP address is listened on at a free port; a path is a Unix socket, whose port is 0.
    """
    loop = asyncio.get_running_loop()
    connecting: set[asyncio.Task[None]] = set()
    ends: list[_Accepted] = []

    def accept() -> _Accepted:
        ends.append(_Accepted(port, connecting))
        return ends[-1]

    if isinstance(address, Path):
        server = await loop.create_unix_server(accept, address)
    else:
        server = await loop.create_server(accept, address, 0)
    try:
        own = 0 if isinstance(address, Path) else int(server.sockets[0].getsockname()[1])
        yield own
    finally:
        server.close()
        for task in connecting:
            task.cancel()
        for end in ends:
            if end.transport is not None:
                end.transport.close()
        await server.wait_closed()
