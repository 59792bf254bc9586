"""A sender and a receiver of pieces in processes of their own, made of the agent's own parts.

    python benchmarks/piece_hosts.py seed FILE PIECE_BYTES PORT [CERTIFICATE KEY]
    python benchmarks/piece_hosts.py receive URL TOKEN MANIFEST DIRECTORY [CERTIFICATE KEY]

`seed` serves FILE as the blob `BLOB_ID` with the key `KEY`, writes its manifest to FILE.manifest and says when it
listens. `receive` takes every piece once, six at a time, and says what CPU it took. With a certificate, which is
its own authority, both speak TLS. `precache_cost` runs them.
"""

import asyncio
import json
import os
import sys
import time
from pathlib import Path

from aiohttp import web

from bare_transfer import cpu_seconds
from hostler_precache.swarming import swarm, tokens
from hostler_precache.transfer import manifest, pieces, tls
from hostler_precache.transfer.blobs import Blob, BlobServer
from hostler_precache.transfer.connections import Connections
from hostler_precache.transfer.manifest import BlobId
from hostler_precache.transfer.peers import HttpPeerClient

BLOB_ID = BlobId("5a0e1d0e-0000-4000-8000-000000000001")
DISTRIBUTION_ID = "5a0e1d0e-0000-4000-8000-00000000000d"
KEY = bytes(range(32))
REQUESTS = 6


def token() -> str:
    """One that opens the blob for a day."""
    grant = tokens.Grant(
        blob_id=BLOB_ID, distribution_id=DISTRIBUTION_ID, expires_at=int(time.time()) + 86400
    )
    return tokens.mint(grant, KEY)


def _tls(files: list[str]) -> tls.Tls | None:
    if not files:
        return None
    certificate, key = map(Path, files)
    return tls.load(certificate, key, certificate)


async def seed(path: str, piece_bytes: int, port: int, files: list[str]) -> None:
    """Serve until killed."""
    contexts = _tls(files)
    fd = os.open(path, os.O_RDONLY)
    listed = await asyncio.to_thread(pieces.describe, fd, piece_bytes)
    await asyncio.to_thread(Path(f"{path}.manifest").write_bytes, listed.to_json())
    server = BlobServer(slots=8)
    policy = swarm.SeedPolicy(listed.count)
    server.serve(
        Blob(BLOB_ID, manifest=listed, key=KEY, fd=fd, have=listed.all_pieces, policy=policy)
    )
    application = web.Application()
    server.attach(application)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    site = web.TCPSite(
        runner, "127.0.0.1", port, ssl_context=contexts.server if contexts else None
    )
    await site.start()
    print("listens", flush=True)
    await asyncio.Event().wait()


async def receive(url: str, secret: str, listing: str, directory: str, files: list[str]) -> None:
    """Every piece is verified and in the file."""
    contexts = _tls(files)
    listed = manifest.parse(await asyncio.to_thread(Path(listing).read_bytes))
    before = cpu_seconds()
    store = pieces.PieceStore.open(Path(directory), BLOB_ID, listed)
    left = list(range(listed.count))
    async with Connections(tls=contexts.client if contexts else None) as connections:
        client = HttpPeerClient(
            connections, store=store, blob_id=BLOB_ID, token=lambda: secret, host="bench"
        )

        async def work() -> None:
            while left:
                piece = left.pop()
                store.write(piece, await client.fetch(url, piece, timeout_seconds=600))

        async with asyncio.TaskGroup() as group:
            for _ in range(REQUESTS):
                group.create_task(work())
    store.flush()
    print(json.dumps({"cpu_seconds": cpu_seconds() - before}))
    store.close()


def main() -> None:
    """Run one of the two."""
    what, *rest = sys.argv[1:]
    if what == "seed":
        asyncio.run(seed(rest[0], int(rest[1]), int(rest[2]), rest[3:]))
    else:
        asyncio.run(receive(rest[0], rest[1], rest[2], rest[3], rest[4:]))


if __name__ == "__main__":
    main()
