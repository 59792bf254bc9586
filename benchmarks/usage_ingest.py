"""How fast a full queue becomes billing-grade rows, beside the bare pipe and beside Ceilometer.

    python benchmarks/usage_ingest.py [--messages 20000] [--turns 3] [--backlog 100000] [--without-ceilometer]

Every turn publishes the same backlog of Nova's `compute.instance.exists` to a durable quorum queue of a fresh
virtual host, and then one process drains it:

- **bare pipe** (`bare_pipe.py`): aio-pika, multiple-ack, COPY, INSERT ... ON CONFLICT DO NOTHING into one plain
  table;
- **hostler-usage**: `python -m hostler_usage serve` with batches of the same size, everything on: envelope opened,
  deduplicated, normalised, histories made, HTTP served;
- **Ceilometer**'s notification agent, one worker, file publisher without fsync and without database: at its best
  (event pipeline alone, batches of 1,000), with batches of 100 and its own prefetch, and as it comes (meters and
  events, one notification at a time).

The first two write to fresh databases of one PostgreSQL with fsync on, and are timed by PostgreSQL itself: the
moments at which their transactions were committed, from the first commit to the last, without the messages of the
first. So neither start-up nor asking is in the figure. Ceilometer is timed from its first output line to its last
in the same way.

`settled` goes on until `/v1/usage` of the running service says that nothing is unfolded and gives the hours that
the cloud's plan gives; its clock starts one batch before the first commit.

`rss_mb` is the most memory that the service's process ever held, with backlogs of `--backlog` messages, too: one of
many instances over the same hours, and one of few over a month, whose histories are long. Of the first,
`large_backlog_per_second` is the rate of reading (histories are made meanwhile, if it outlasts their patience), and
`large_settled_share` the rate of settling as a share of that of the turns' backlog.
"""

import argparse
import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg

import bench
import ceilometer_agent
import usage_cloud
import usage_service
from hostler_common import client

HOURS, MONTH_HOURS = 20, 720
HERE = Path(__file__).parent
PIPE, SERVICE = "bare pipe", "hostler-usage"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one program did with one backlog."""

    program: str
    messages_per_second: float
    cpu_us_per_message: dict[str, float]
    rss_mb: float
    settled_per_second: float | None = None
    settling_cpu_us_per_message: dict[str, float] = field(default_factory=dict)


Program = Callable[[bench.Stage, usage_cloud.Backlog], Awaitable[Run]]


# --- when rows were committed


@dataclass(frozen=True, slots=True)
class Commits:
    """When the rows of a table were committed: (moment, rows) of each transaction, oldest first."""

    transactions: tuple[tuple[float, int], ...]

    @property
    def first(self) -> float:
        """When the first rows were there."""
        return self.transactions[0][0]

    @property
    def last(self) -> float:
        """When all rows were there."""
        return self.transactions[-1][0]

    @property
    def rate(self) -> float:
        """Rows a second between the first commit and the last, without the rows of the first."""
        rows = sum(rows for _, rows in self.transactions[1:])
        return rows / (self.last - self.first)


async def committed(database: usage_service.Database, relation: str) -> Commits:
    """What PostgreSQL remembers of the relation's transactions."""
    rows = await database.fetch(
        "SELECT extract(epoch FROM pg_xact_commit_timestamp(id))::float8, rows FROM"  # noqa: S608  our own name
        f" (SELECT xmin AS id, count(*) AS rows FROM {relation} GROUP BY xmin::text, xmin) AS x ORDER BY 1"
    )
    return Commits(tuple((row[0], row[1]) for row in rows))


def broker_pids(stage: bench.Stage) -> list[int]:
    """RabbitMQ's one process."""
    assert stage.rabbitmq is not None
    assert stage.rabbitmq.process is not None
    return [stage.rabbitmq.process.pid]


def cpu_record(stage: bench.Stage, pid: int) -> bench.CpuRecord:
    """The CPU of everybody who has part in a run."""
    return bench.CpuRecord(
        {
            "python": lambda: [pid],
            "beam": lambda: broker_pids(stage),
            **bench.postgres_groups(stage.postgres),
        }
    )


def per_message(
    record: bench.CpuRecord, start: float, end: float, messages: int
) -> dict[str, float]:
    """Microseconds of CPU a message, between two moments."""
    return {name: 1e6 * seconds / messages for name, seconds in record.between(start, end).items()}


# --- the programs


async def run_bare_pipe(stage: bench.Stage, backlog: usage_cloud.Backlog) -> Run:
    """The mark."""
    async with usage_service.full_queue(stage, backlog.bodies()) as amqp_url:
        url = await stage.new_database()
        database = await asyncpg.connect(url)
        with stage.log_file("bare_pipe").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(
                    bench.python(),
                    str(HERE / "bare_pipe.py"),
                    amqp_url,
                    usage_service.QUEUE.name,
                    url,
                    str(usage_service.BATCH),
                ),
                stdout=log,
                stderr=log,
            )
        record = cpu_record(stage, process.pid)
        record.start()
        try:
            await usage_service.wait_for_rows(
                database, "pipe", backlog.messages, amqp_url=amqp_url, process=process
            )
            commits = await committed(database, "pipe")
            peak = bench.rss_mb(process.pid)
        finally:
            record.stop()
            await bench.stop_process(process)
            await database.close()
            await stage.drop_database(url)
    return Run(
        program=PIPE,
        messages_per_second=commits.rate,
        cpu_us_per_message=per_message(
            record, commits.first, commits.last, backlog.messages - commits.transactions[0][1]
        ),
        rss_mb=peak,
    )


async def wait_settled(url: str, backlog: usage_cloud.Backlog) -> float:
    """The moment at which the service's answer was right for every message."""
    expected = backlog.instance_hours * 3600 * 1_000_000
    deadline = time.monotonic() + usage_service.PATIENCE_SECONDS
    async with client.open_api(url) as api:
        while True:
            answer = await api.get(
                "/v1/usage",
                start=backlog.start.isoformat(),
                end=backlog.end.isoformat(),
                resource_type="instance",
            )
            at = time.time()
            amounts = [
                row["unit_microseconds"].get("instance_hours", 0) for row in answer["usage"]
            ]
            if answer["unfolded_resources"] == 0 and sum(amounts) == expected:
                return at
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"usage is {sum(amounts)} of {expected}, {answer['unfolded_resources']} unfolded"
                )
            await asyncio.sleep(0.1)


async def run_service(stage: bench.Stage, backlog: usage_cloud.Backlog) -> Run:
    """Ours."""
    async with usage_service.full_queue(stage, backlog.bodies()) as amqp_url:
        url = await usage_service.new_database(stage)
        database = await asyncpg.connect(url)
        try:
            async with usage_service.running(stage, amqp_url, url) as (process, address):
                record = cpu_record(stage, process.pid)
                record.start()
                try:
                    await usage_service.wait_for_rows(
                        database,
                        usage_service.EVENTS,
                        backlog.messages,
                        amqp_url=amqp_url,
                        process=process,
                    )
                    settled_at = await wait_settled(address, backlog)
                finally:
                    record.stop()
                commits = await committed(database, usage_service.EVENTS)
                peak = bench.rss_mb(process.pid)
        finally:
            await database.close()
            await stage.drop_database(url)
    before = commits.transactions[0][1] / commits.rate
    return Run(
        program=SERVICE,
        messages_per_second=commits.rate,
        cpu_us_per_message=per_message(
            record, commits.first, commits.last, backlog.messages - commits.transactions[0][1]
        ),
        rss_mb=peak,
        settled_per_second=backlog.messages / (settled_at - commits.first + before),
        settling_cpu_us_per_message=per_message(
            record, commits.last, settled_at, backlog.messages
        ),
    )


def ceilometer(agent: ceilometer_agent.Agent, environment: Path) -> Program:
    """The peer, set up like that."""

    async def run(stage: bench.Stage, backlog: usage_cloud.Backlog) -> Run:
        url = stage.new_vhost()
        async with bench.channel(url) as channel:
            exchange = await channel.declare_exchange(usage_cloud.EXCHANGE, "topic", durable=True)
            queue = await channel.declare_queue(
                ceilometer_agent.QUEUE, durable=True, arguments={"x-queue-type": "quorum"}
            )
            await queue.bind(exchange, usage_cloud.ROUTING_KEY)
            await bench.publish(
                channel, usage_cloud.EXCHANGE, usage_cloud.ROUTING_KEY, backlog.bodies()
            )
            emptied = await ceilometer_agent.empty(
                agent,
                environment=environment,
                directory=stage.new_directory(),
                amqp_url=url,
                exchange=usage_cloud.EXCHANGE,
                messages=backlog.messages,
            )
            if left := await bench.depth(channel, ceilometer_agent.QUEUE):
                raise RuntimeError(f"the agent has left {left} messages")
        stage.drop_vhost(url)
        return Run(
            program=agent.name,
            messages_per_second=emptied.messages_per_second,
            cpu_us_per_message={"python": emptied.cpu_us_per_message},
            rss_mb=emptied.rss_mb,
        )

    return run


# --- what is said


def show(run: Run) -> None:
    """One run for people."""
    settled = f"settled {run.settled_per_second:,.0f}/s, " if run.settled_per_second else ""
    bench.say(
        f"  {run.program:<20} {run.messages_per_second:>7,.0f}/s, {settled}"
        f"peak {run.rss_mb:.0f} MB, CPU us a message: {_cpu(run.cpu_us_per_message)}"
    )
    if run.settling_cpu_us_per_message:
        bench.say(f"  {'':<20} and until it was settled: {_cpu(run.settling_cpu_us_per_message)}")


def _cpu(used: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {microseconds:.0f}" for name, microseconds in used.items())


def cloud(messages: int, hours: int = HOURS) -> usage_cloud.Backlog:
    """What a cloud sends in hours that have just passed."""
    return usage_cloud.Backlog(
        messages=messages, hours=hours, start=usage_cloud.full_hours_ago(hours)
    )


async def measure(
    stage: bench.Stage, programs: Sequence[Program], arguments: argparse.Namespace
) -> None:
    """Everything, in turns, and what it comes to."""
    backlog = cloud(arguments.messages)
    bench.say(f"backlog: {backlog.describe()}")
    runs: dict[str, list[Run]] = defaultdict(list)
    for turn in range(arguments.turns):
        bench.say(f"turn {turn + 1} of {arguments.turns}, {bench.busyness()}")
        for program in programs:
            run = await program(stage, backlog)
            show(run)
            runs[run.program].append(run)
    large: list[Run] = []
    if arguments.backlog > arguments.messages:
        for hours in (HOURS, MONTH_HOURS):
            backlog = cloud(arguments.backlog, hours)
            bench.say(f"memory: {backlog.describe()}")
            large.append(await run_service(stage, backlog))
            show(large[-1])
    bench.say()
    conclude(runs, large, max(arguments.backlog, arguments.messages))


def conclude(runs: Mapping[str, Sequence[Run]], large: Sequence[Run], backlog: int) -> None:
    """The medians, and the goals: a ratio is that of two runs of one turn, and the median of the turns'."""
    rate = {
        name: bench.median(run.messages_per_second for run in done) for name, done in runs.items()
    }

    def ratio(ours: Iterable[float], name: str) -> float | None:
        pairs = zip(ours, (run.messages_per_second for run in runs.get(name, ())), strict=False)
        ratios = [mine / theirs for mine, theirs in pairs]
        return bench.median(ratios) if ratios else None

    ingested = [run.messages_per_second for run in runs[SERVICE]]
    settled = [run.settled_per_second or 0.0 for run in runs[SERVICE]]
    bench.table(
        ("median of the turns", "messages/s", "hostler-usage over it"),
        [(name, value, ratio(ingested, name)) for name, value in rate.items()],
    )
    bench.conclude(
        "usage_ingest",
        {
            "ratio_to_bare_pipe": ratio(ingested, PIPE),
            "settled_ratio": ratio(settled, PIPE),
            "ratio_to_ceilometer_best": ratio(ingested, ceilometer_agent.BEST.name),
            "ratio_to_ceilometer_batch_100": ratio(ingested, ceilometer_agent.BATCH_100.name),
            "ratio_to_ceilometer_default": ratio(ingested, ceilometer_agent.DEFAULT.name),
            "rss_mb": max(run.rss_mb for run in (*runs[SERVICE], *large)),
            "rss_backlog_messages": backlog,
            "bare_pipe_per_second": rate[PIPE],
            "ingest_per_second": rate[SERVICE],
            "settled_per_second": bench.median(settled),
            "large_backlog_per_second": large[0].messages_per_second if large else None,
            "large_settled_share": (large[0].settled_per_second or 0.0) / bench.median(settled)
            if large
            else None,
        },
        {
            "ratio_to_bare_pipe": ">= 0.8",
            "settled_ratio": ">= 0.3",
            "ratio_to_ceilometer_best": ">= 5",
            "ratio_to_ceilometer_default": ">= 20",
            "rss_mb": "< 200",
        },
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--messages", type=int, default=20_000, help="in every turn's backlog")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument(
        "--backlog", type=int, default=100_000, help="messages of the memory's runs; 0: none"
    )
    parser.add_argument("--without-ceilometer", action="store_true")
    arguments = parser.parse_args()
    programs: list[Program] = [run_bare_pipe, run_service]
    if not arguments.without_ceilometer:
        environment = ceilometer_agent.build()
        agents = (ceilometer_agent.BEST, ceilometer_agent.BATCH_100, ceilometer_agent.DEFAULT)
        programs += [ceilometer(agent, environment) for agent in agents]
    with bench.stage() as stage:
        asyncio.run(measure(stage, programs, arguments))


if __name__ == "__main__":
    main()
