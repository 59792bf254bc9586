"""The bare pipe: the least that can be done to bring a queue's messages durably into PostgreSQL from Python.

    python benchmarks/bare_pipe.py AMQP_URL QUEUE DATABASE_URL [BATCH]

aio-pika consume with multiple-ack -> COPY into a temporary table -> INSERT ... ON CONFLICT DO NOTHING into one
plain table keyed by md5(body), and nothing else: no envelope is opened, nothing is checked. `usage_ingest` runs it,
as the mark that the real service is measured against. It ends with SIGTERM.
"""

import asyncio
import contextlib
import signal
import sys

import aio_pika
import asyncpg
from aio_pika.abc import AbstractIncomingMessage

BATCH_SECONDS = 0.1


async def pipe(amqp_url: str, queue: str, database_url: str, batch: int) -> None:
    """Run until cancelled."""
    database = await asyncpg.connect(database_url)
    await database.execute(
        "CREATE TABLE IF NOT EXISTS pipe (id text PRIMARY KEY, body bytea NOT NULL)"
    )
    await database.execute("CREATE TEMPORARY TABLE incoming (body bytea) ON COMMIT DELETE ROWS")
    insert = await database.prepare(
        "INSERT INTO pipe SELECT md5(body), body FROM incoming ON CONFLICT DO NOTHING"
    )
    inbox: asyncio.Queue[AbstractIncomingMessage] = asyncio.Queue()

    async def receive(message: AbstractIncomingMessage) -> None:
        inbox.put_nowait(message)

    async with await aio_pika.connect(amqp_url) as connection:
        channel = await connection.channel()
        await channel.set_qos(prefetch_count=3 * batch)
        await (await channel.get_queue(queue, ensure=False)).consume(receive)
        while True:
            taken = [await inbox.get()]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BATCH_SECONDS):
                    while len(taken) < batch:
                        taken.append(await inbox.get())
            async with database.transaction():
                await database.copy_records_to_table(
                    "incoming", records=[(message.body,) for message in taken], columns=["body"]
                )
                await insert.fetch()
            await taken[-1].ack(multiple=True)


async def main() -> None:
    """Run until told to stop."""
    amqp_url, queue, database_url, *rest = sys.argv[1:]
    running = asyncio.ensure_future(
        pipe(amqp_url, queue, database_url, int(rest[0]) if rest else 1000)
    )
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await running


if __name__ == "__main__":
    asyncio.run(main())
