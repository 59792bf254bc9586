"""A small network of its own: a switch, and hosts behind links of a given rate, as network namespaces.

One namespace is the switch, with a bridge; each host is a namespace whose one interface hangs on it. `tbf` on the
host's end caps what it sends, on the switch's port what it receives. With racks there is a bridge for each, whose
uplink to the core is capped in the same way. This process stays where it is and reaches the hosts through an
interface without a cap: it is the control host. Needs root, `ip` and `tc`.

Hosts send with CUBIC, as distributions ship Linux, whatever this machine is set up to: a process that wants another
congestion control has to choose it.

Every name begins with `hb-<pid>-`, so that what a run left behind that was killed is known, and is removed by the
next. Processes on hosts are killed by the kernel when this process ends.
"""

import asyncio
import contextlib
import fcntl
import ipaddress
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import bench

PREFIX = "hb-"
MEMORY = Path("/dev/shm")  # noqa: S108  a tmpfs is what we want
LOCK = Path("/run/hostler-network-rig.lock")
CONTROL, SWITCH = "control", "switch"
"""What a process may run on beside a host."""
KILL_SECONDS = 10.0
LATENCY_MILLISECONDS = 40
CONGESTION_CONTROL = "cubic"
SMALLEST_BURST_BYTES = 70_000  # less, and tbf has to cut what the kernel offloads
_STREAM = Path(__file__).with_name("network_stream.py")
_NETWORK = "198.18"  # RFC 2544: for benchmarks of networks, never routed


class RigUnavailable(RuntimeError):
    """This machine or this user cannot have network namespaces with shaped links."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Hosts by name with their rate in bit/s, each way; racks with the rate of their uplinks."""

    hosts: Mapping[str, int]
    racks: Mapping[str, str] = field(default_factory=dict)
    """Host -> rack; who is in none hangs on the core."""
    uplinks: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A namespace with one shaped interface."""

    name: str
    namespace: str
    address: str
    port: str
    """Its port on the switch."""
    rate_bps: int
    rack: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes on an interface with their Ethernet, IP and TCP headers, as seen from the host or rack."""

    sent_bytes: int
    received_bytes: int

    def since(self, earlier: "Traffic") -> "Traffic":
        """What came since."""
        return Traffic(
            sent_bytes=self.sent_bytes - earlier.sent_bytes,
            received_bytes=self.received_bytes - earlier.received_bytes,
        )


@dataclass(slots=True)
class Rig:
    """A network that is up."""

    name: str
    switch: str
    control_address: str
    hosts: Mapping[str, Host]
    uplinks: Mapping[str, str]
    """Rack -> interface on the core's side of its uplink."""
    directory: Path
    """In memory, and gone with the rig."""

    def command(self, host: str, *argv: str | Path) -> list[str]:
        """The command, to be run there; it does not outlive this process."""
        words = ["setpriv", "--pdeathsig", "KILL", *map(str, argv)]
        if host == CONTROL:
            return words
        namespace = self.switch if host == SWITCH else self.hosts[host].namespace
        return ["ip", "netns", "exec", namespace, *words]

    @asynccontextmanager
    async def process(
        self,
        host: str,
        *argv: str | Path,
        log: Path,
        environment: Mapping[str, str] | None = None,
        stdin: int = asyncio.subprocess.DEVNULL,
        stdout: int | None = None,
    ) -> AsyncIterator[asyncio.subprocess.Process]:
        """A process on the host; told to end on leaving, unless it is over. Its output is added to the log."""
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *self.command(host, *argv),
                env={**os.environ, **(environment or {})},
                stdin=stdin,
                stdout=output if stdout is None else stdout,
                stderr=output,
            )
        try:
            yield process
        finally:
            await bench.stop_process(process, 10.0)

    def traffic(self) -> dict[str, Traffic]:
        """What each host, and each rack from outside, has sent and received so far."""
        text = _run(*self.command(SWITCH, "cat", "/proc/net/dev"))
        counters = dict(parse_counters(text))
        ports = {host.name: host.port for host in self.hosts.values()} | dict(self.uplinks)
        return {
            name: Traffic(sent_bytes=counters[port][0], received_bytes=counters[port][1])
            for name, port in ports.items()
        }

    async def stream_bps(self, sender: str, receiver: str, *, seconds: float = 3.0) -> float:
        """Payload in bit/s that one TCP stream gets, after what the burst of the shaper lets pass at once."""
        log = self.directory / "stream.log"
        address = self.hosts[receiver].address
        async with (
            self.process(
                receiver, sys.executable, _STREAM, "receive", address, str(seconds),
                log=log, stdout=asyncio.subprocess.PIPE,
            ) as receiving
        ):  # fmt: skip
            assert receiving.stdout is not None
            port = (await receiving.stdout.readline()).decode().strip()
            async with self.process(
                sender, sys.executable, _STREAM, "send", address, port, log=log
            ):
                answer = (await receiving.stdout.readline()).decode()
            if not answer:
                raise RuntimeError(f"no stream from {sender} to {receiver}: {log.read_text()}")
            return float(answer)

    def cpu_seconds(self) -> dict[str, float]:
        """What the processes that are on each host now have used so far."""
        links = {
            f"net:[{Path('/run/netns', host.namespace).stat().st_ino}]": host.name
            for host in self.hosts.values()
        }
        used = dict.fromkeys(self.hosts, 0.0)
        for directory in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it may end meanwhile
                host = links.get(str((directory / "ns" / "net").readlink()))
                if host is not None:
                    used[host] += bench.cpu_seconds(int(directory.name))
        return used

    def namespaces(self) -> list[str]:
        """All of the rig's."""
        return [self.switch, *(host.namespace for host in self.hosts.values())]


def parse_counters(text: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """(interface, (bytes received, bytes sent)) of each line of /proc/net/dev."""
    for line in text.splitlines():
        name, colon, numbers = line.partition(":")
        if colon:
            fields = numbers.split()
            yield name.strip(), (int(fields[0]), int(fields[8]))


# --- building and removing


_serial = 0


@contextmanager
def network(plan: Plan) -> Iterator[Rig]:
    """The network is up; on leaving, all of it and every process on its hosts is gone.

    Raises:
        RigUnavailable: not root, or a tool is missing.
        CalledProcessError: the kernel refused; what `ip` or `tc` said is on stderr.
    """
    global _serial
    _check()
    sweep()
    _serial += 1
    name = f"{PREFIX}{os.getpid()}-{_serial}"
    try:
        yield _build(name, plan)
    finally:
        _remove(name)


def sweep() -> list[str]:
    """Rigs whose process is gone are removed; their names."""
    names = {"-".join(space.split("-")[:3]) for space in _namespaces()}
    names |= {path.name for path in MEMORY.glob(f"{PREFIX}*")}
    dead = sorted(name for name in names if not _is_alive(name))
    for name in dead:
        _remove(name)
    return dead


def _is_alive(name: str) -> bool:
    pid = name.split("-")[1]
    return pid == str(os.getpid()) or Path("/proc", pid).exists()


def _check() -> None:
    if os.geteuid() != 0:
        raise RigUnavailable("network namespaces need root")
    missing = [tool for tool in ("ip", "tc", "setpriv") if shutil.which(tool) is None]
    if missing:
        raise RigUnavailable(f"{', '.join(missing)} not installed: run scripts/bootstrap test")


def _build(name: str, plan: Plan) -> Rig:
    switch = f"{name}-sw"
    directory = MEMORY / name
    directory.mkdir()
    with LOCK.open("w") as lock:  # two rigs may be built at once, and want networks of their own
        fcntl.flock(lock, fcntl.LOCK_EX)
        network = _free_network()
        control = _control_interface(name)
        _run("ip", "netns", "add", switch)
        _batch(
            None,
            f"link add {control} type veth peer name {CONTROL} netns {switch}",
            f"addr add {network}.1/24 brd + dev {control}",
            f"link set {control} up",
        )
    bridges = ["core", *(f"r{number}" for number in range(len(plan.uplinks)))]
    bridge_of = dict(zip(plan.uplinks, bridges[1:], strict=True))
    _batch(
        switch,
        "link set lo up",
        *(line for bridge in bridges for line in _bridge(bridge)),
        f"link set {CONTROL} master core up",
        *(line for bridge in bridges[1:] for line in _uplink(bridge)),
    )
    for name_of_rack, rate_bps in plan.uplinks.items():
        for end in ("up", "dn"):
            interface = f"{end}{bridge_of[name_of_rack]}"
            _run("tc", "-n", switch, *_tbf("add", interface, rate_bps))
    hosts = {}
    for number, (host, rate_bps) in enumerate(plan.hosts.items(), 2):
        rack = plan.racks.get(host)
        made = hosts[host] = Host(
            name=host,
            namespace=f"{name}-{host}",
            address=f"{network}.{number}",
            port=f"p{number}",
            rate_bps=rate_bps,
            rack=rack,
        )
        _plug(switch, made, bridge="core" if rack is None else bridge_of[rack])
    return Rig(
        name=name,
        switch=switch,
        control_address=f"{network}.1",
        hosts=hosts,
        uplinks={rack: f"dn{bridge}" for rack, bridge in bridge_of.items()},
        directory=directory,
    )


def _bridge(name: str) -> list[str]:
    # no spanning tree, no delay: a port forwards at once; multicast goes everywhere
    return [
        f"link add {name} type bridge stp_state 0 forward_delay 0 mcast_snooping 0",
        f"link set {name} up",
    ]


def _uplink(bridge: str) -> list[str]:
    return [
        f"link add up{bridge} type veth peer name dn{bridge}",
        f"link set up{bridge} master {bridge} up",
        f"link set dn{bridge} master core up",
    ]


def _plug(switch: str, host: Host, *, bridge: str) -> None:
    interface = ipaddress.ip_interface(f"{host.address}/24")
    _run("ip", "netns", "add", host.namespace)
    _batch(
        switch,
        f"link add {host.port} type veth peer name eth0 netns {host.namespace}",
        f"link set {host.port} master {bridge} up",
    )
    _batch(
        host.namespace,
        "link set lo up",
        f"addr add {interface} brd + dev eth0",
        "link set eth0 up",
        f"route change {interface.network} dev eth0 proto kernel scope link"
        f" src {host.address} congctl {CONGESTION_CONTROL}",
        "route add 224.0.0.0/4 dev eth0",
    )
    _run("tc", "-n", host.namespace, *_tbf("add", "eth0", host.rate_bps))
    _run("tc", "-n", switch, *_tbf("add", host.port, host.rate_bps))


def _tbf(verb: str, interface: str, rate_bps: int) -> list[str]:
    burst = max(rate_bps // 8 // 250, SMALLEST_BURST_BYTES)
    return (
        f"qdisc {verb} dev {interface} root tbf rate {rate_bps}bit burst {burst}"
        f" latency {LATENCY_MILLISECONDS}ms"
    ).split()


def _free_network() -> str:
    taken = _run("ip", "-4", "-o", "addr", "show")
    for number in range(256):
        if f" {_NETWORK}.{number}." not in taken:
            return f"{_NETWORK}.{number}"
    raise RigUnavailable(f"every network of {_NETWORK}.0.0/16 is in use")


def _remove(name: str) -> None:
    spaces = [space for space in _namespaces() if space.startswith(f"{name}-")]
    for space in spaces:
        _kill_all(space)
    control = _control_interface(name)
    if Path("/sys/class/net", control).exists():
        _run("ip", "link", "del", control)
    for space in spaces:  # its interfaces go with it, and their other ends
        _run("ip", "netns", "del", space)
    shutil.rmtree(MEMORY / name, ignore_errors=True)


def _control_interface(name: str) -> str:
    return f"hb{name.removeprefix(PREFIX).replace('-', 'c')}"


def _kill_all(space: str) -> None:
    deadline = time.monotonic() + KILL_SECONDS
    while pids := _run("ip", "netns", "pids", space).split():
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        if time.monotonic() > deadline:
            raise RuntimeError(f"{space}: {', '.join(pids)} cannot be killed")
        time.sleep(0.01)


def _namespaces() -> list[str]:
    lines = _run("ip", "netns", "list").splitlines()
    return [line.split()[0] for line in lines if line.startswith(PREFIX)]


def _batch(namespace: str | None, *lines: str) -> None:
    where: Sequence[str] = () if namespace is None else ("-n", namespace)
    _run("ip", *where, "-batch", "-", text="\n".join(lines))


def _run(*argv: str, text: str | None = None) -> str:
    done = subprocess.run(argv, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.stderr.write(done.stderr)
        done.check_returncode()
    return done.stdout
