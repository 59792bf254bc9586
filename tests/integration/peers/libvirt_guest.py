"""A private libvirt with one small guest under software emulation, in namespaces of its own.

    python3 tests/integration/peers/libvirt_guest.py prepare
    python3 tests/integration/peers/libvirt_guest.py run DIRECTORY

`prepare` fetches a Debian kernel once, unpacks it under the user's cache folder beside an initramfs of busybox (it
installs nothing), and fails with a sentence where the machine cannot run the guest. `run` starts libvirtd (a session
daemon, never as root, so that no file of the machine's own libvirt is touched; no virtlogd, since QEMU writes its log
itself) and the guest, prints one JSON line with its addresses, and then answers each line of JSON on standard input by
one on standard output:

    {"do": "start"} {"do": "destroy"} {"do": "stop_libvirtd"} {"do": "start_libvirtd"}
    {"do": "guest", "command": "dd ..."}     a shell command in the guest, answered when it has ended
    {"do": "virsh", "arguments": ["domblkstat", "guest", "vda"]}

All of it lives in PID and network namespaces whose first process ends with standard input: whatever becomes of the
test, no process and no interface stays behind. Standard library only: scripts/bootstrap runs it before .venv is there.
"""

import contextlib
import fcntl
import gzip
import hashlib
import json
import lzma
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

START_SECONDS = 60.0
GUEST_SECONDS = 120.0

NAME = "guest"
MAC = "52:54:00:12:34:56"
HOST_MAC = "02:00:00:00:00:01"  # known to the guest beforehand, so that it asks for no address
HOST_ADDRESS, GUEST_ADDRESS = "192.0.2.1", "192.0.2.2"  # RFC 5737
DISK_BYTES = 32 * 1024 * 1024

KERNEL_PACKAGE = "linux-image-cloud-amd64"
MODULES = (  # in the order in which they can be loaded
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_blk",
    "failover",
    "net_failover",
    "virtio_net",
)

INIT = f"""\
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
for module in {" ".join(MODULES)}; do insmod /$module.ko; done
while [ ! -b /dev/vda ]; do sleep 0.1; done
ip address add {GUEST_ADDRESS}/24 dev eth0
ip link set eth0 up
arp -s {HOST_ADDRESS} {HOST_MAC}
stty -F /dev/ttyS0 -echo
exec </dev/ttyS0 >/dev/ttyS0 2>&1
echo up
while read -r line; do sh -c "$line"; echo "ended $?"; done
"""

DOMAIN = """\
<domain type='qemu'>
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  <memory unit='MiB'>128</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <kernel>{work}/vmlinuz</kernel>
    <initrd>{work}/initramfs.gz</initrd>
    <cmdline>console=ttyS0 quiet ipv6.disable=1 panic=1</cmdline>
  </os>
  <on_reboot>restart</on_reboot>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/>
      <source file='{work}/disk.raw'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <interface type='ethernet'>
      <mac address='{mac}'/>
      <target dev='guest0' managed='no'/>
      <model type='virtio'/>
    </interface>
    <serial type='unix'>
      <source mode='bind' path='{work}/serial'/>
      <target port='0'/>
    </serial>
  </devices>
</domain>
"""

# nothing of the host's own accord reaches the guest: no IPv6, no answer to a ping
NETWORK = f"""\
set -e
sysctl_() {{ echo "$2" >"/proc/sys/net/$1"; }}
sysctl_ ipv6/conf/default/disable_ipv6 1
sysctl_ ipv4/icmp_echo_ignore_all 1
# containers may use the device, and do not have it
[ -e /dev/net/tun ] || {{ mkdir -p /dev/net && mknod -m 0666 /dev/net/tun c 10 200; }}
ip tuntap add dev guest0 mode tap user "$1"
ip address add {HOST_ADDRESS}/24 dev guest0
ip link set guest0 up
ip neighbour add {GUEST_ADDRESS} lladdr {MAC} dev guest0
"""


class PeerFailed(Exception):
    """The peer cannot be had here; the message says why, for the one who runs the tests."""


def _run(*argv: str | Path, cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(
            [str(word) for word in argv],
            cwd=cwd, check=True, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
    except FileNotFoundError as exc:
        raise PeerFailed(f"{argv[0]} is not installed") from exc
    except subprocess.CalledProcessError as exc:
        said = (exc.stderr or exc.stdout or "").strip().splitlines()
        raise PeerFailed(f"{argv[0]}: {said[-1] if said else exc.returncode}") from exc
    return done.stdout


def _wait_until(holds: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise PeerFailed(f"{what} within {seconds:g} s")
        time.sleep(0.05)


# --- the guest's kernel


def kernel() -> Path:
    """The directory with `vmlinuz` and `initramfs.gz`, made if it is not there yet.

    Raises:
        PeerFailed: Debian's kernel cannot be had, or busybox or cpio is not installed.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hostler" / "peers"
    name = f"libvirt-guest-{hashlib.sha256(INIT.encode()).hexdigest()[:16]}"
    directory = cache / name
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{name}.building").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)  # two test runs may come at once
        if not directory.exists():
            with tempfile.TemporaryDirectory(dir=cache) as made:
                _make_kernel(Path(made))
                (Path(made) / "ready").rename(directory)  # whole or not at all
    return directory


def _make_kernel(work: Path) -> None:
    unpacked, root, ready = work / "unpacked", work / "root", work / "ready"
    for path in (root / "bin", root / "dev", root / "proc", ready):
        path.mkdir(parents=True)
    try:
        archive = _download(work)
    except PeerFailed:
        if os.geteuid() != 0:
            raise
        _run("apt-get", "update", "-q")  # its lists may be older than the mirror
        archive = _download(work)
    _run("dpkg-deb", "-x", archive, unpacked)
    shutil.copy(next(unpacked.glob("boot/vmlinuz-*")), ready / "vmlinuz")
    for module in MODULES:
        _unpack_module(unpacked, module, root / f"{module}.ko")
    busybox = shutil.which("busybox")
    if busybox is None or subprocess.run(["ldd", busybox], capture_output=True).returncode == 0:
        raise PeerFailed("there is no busybox that needs no libraries: install busybox-static")
    shutil.copy(busybox, root / "bin" / "busybox")
    (root / "init").write_text(INIT)
    (root / "init").chmod(0o755)
    _run("sh", "-c", "find . | cpio --quiet -o -H newc >../initramfs", cwd=root)
    (ready / "initramfs.gz").write_bytes(gzip.compress((work / "initramfs").read_bytes(), 1))


def _download(work: Path) -> Path:
    depends = _run("apt-cache", "depends", "--important", KERNEL_PACKAGE)
    names = [line.split()[-1] for line in depends.splitlines() if "Depends: linux-image" in line]
    if not names:
        raise PeerFailed(f"apt knows no package {KERNEL_PACKAGE}: the guest needs Debian's kernel")
    _run("apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", names[0], cwd=work)
    return next(work.glob("*.deb"))


def _unpack_module(unpacked: Path, module: str, target: Path) -> None:
    found = next(unpacked.rglob(f"{module}.ko*"), None)
    if found is None:
        raise PeerFailed(f"{KERNEL_PACKAGE} has no module {module}")
    body = found.read_bytes()
    target.write_bytes(lzma.decompress(body) if found.suffix == ".xz" else body)


# --- libvirtd and the guest, inside the namespaces


class Libvirt:
    """libvirtd in a directory of its own, as a user who is not root."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self._user = _user()
        self._socket = work / "run" / "libvirt" / "libvirt-sock"
        self._process: subprocess.Popen[bytes] | None = None
        self._serial: socket.socket | None = None
        # its own: two of these may run on one machine, and QEMUs are told apart by it
        self.instance_id = str(uuid.uuid4())

    @property
    def uri(self) -> str:
        """Where it is reached, from outside of the namespaces too."""
        return f"qemu+unix:///session?socket={self._socket}"

    def prepare(self) -> None:
        """The directory holds the guest's files, and the network namespace its interface."""
        source, work = kernel(), self._work
        configuration = work / "home" / "libvirt"
        for directory in (configuration, work / "run"):
            directory.mkdir(parents=True)
        (configuration / "qemu.conf").write_text(
            'stdio_handler = "file"\nsecurity_driver = "none"\ncgroup_controllers = []\n'
        )
        for name in ("vmlinuz", "initramfs.gz"):
            shutil.copy(source / name, work / name)
        with (work / "disk.raw").open("wb") as disk:
            disk.truncate(DISK_BYTES)
        (work / "guest.xml").write_text(
            DOMAIN.format(name=NAME, uuid=self.instance_id, mac=MAC, work=work)
        )
        if os.geteuid() == 0:
            for path in (work, *work.rglob("*")):
                shutil.chown(path, self._user)
        _run("sh", "-c", NETWORK, "sh", self._user)

    def start_libvirtd(self) -> None:
        """It answers."""
        words = ["libvirtd"]
        if os.geteuid() == 0:
            group = str(pwd.getpwnam(self._user).pw_gid)
            words = [
                *("setpriv", "--reuid", self._user, "--regid", group, "--clear-groups"),
                # some machines let only root open /dev/net/tun
                *("--inh-caps=+dac_override", "--ambient-caps=+dac_override", *words),
            ]
        home = str(self._work / "home")
        with (self._work / "libvirtd.log").open("ab") as log:
            try:
                self._process = subprocess.Popen(
                    words,
                    env={
                        "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
                        "HOME": home,
                        "XDG_CONFIG_HOME": home,
                        "XDG_CACHE_HOME": home,
                        "XDG_DATA_HOME": home,
                        "XDG_RUNTIME_DIR": str(self._work / "run"),
                    },
                    cwd=self._work,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            except FileNotFoundError as exc:
                raise PeerFailed("libvirtd is not installed") from exc
        _wait_until(self._answers, START_SECONDS, "libvirtd did not answer")

    def _answers(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            tail = (self._work / "libvirtd.log").read_text(errors="replace")[-1500:]
            raise PeerFailed(f"libvirtd ended:\n{tail}")
        with contextlib.suppress(PeerFailed):
            self.virsh("list")
            return True
        return False

    def stop_libvirtd(self) -> None:
        """It has ended; the guest has not."""
        assert self._process is not None
        self._process.terminate()
        self._process.wait(START_SECONDS)

    def virsh(self, *arguments: str) -> str:
        """What virsh prints."""
        return _run("virsh", "--quiet", "--connect", self.uri, *arguments)

    def start(self) -> None:
        """The guest runs and takes commands."""
        self.virsh("create", str(self._work / "guest.xml"))
        self._serial = socket.socket(socket.AF_UNIX)
        self._serial.settimeout(GUEST_SECONDS)
        self._serial.connect(str(self._work / "serial"))
        self._read_until("up")

    def destroy(self) -> None:
        """The guest is gone."""
        assert self._serial is not None
        self._serial.close()
        self.virsh("destroy", NAME)

    def guest(self, command: str) -> str:
        """What the command printed in the guest; it has ended with status 0."""
        assert self._serial is not None
        self._serial.sendall(f"{command}\n".encode())
        *said, last = self._read_until("ended ")
        if last != "ended 0":
            raise PeerFailed("\n".join([*said, last]))
        return "\n".join(said)

    def _read_until(self, start: str) -> list[str]:
        """The lines up to the first that starts so."""
        assert self._serial is not None
        text = b""
        while True:
            lines = text.decode(errors="replace").replace("\r", "").split("\n")
            if any(line.startswith(start) for line in lines[:-1]):
                return [line for line in lines[:-1] if line]
            try:
                more = self._serial.recv(4096)
            except TimeoutError as exc:
                raise PeerFailed(f"the guest said only {text!r}") from exc
            if not more:
                raise PeerFailed(f"the guest ended after {text!r}")
            text += more


def _serve(work: Path) -> None:
    libvirt = Libvirt(work)
    libvirt.prepare()
    libvirt.start_libvirtd()
    libvirt.start()
    _say({"uri": libvirt.uri, "instance_id": libvirt.instance_id, "disk_bytes": DISK_BYTES})
    for line in sys.stdin:
        request = json.loads(line)
        said: str | None = None
        match request["do"]:
            case "guest":
                said = libvirt.guest(request["command"])
            case "virsh":
                said = libvirt.virsh(*request["arguments"])
            case "start" | "destroy" | "start_libvirtd" | "stop_libvirtd" as name:
                getattr(libvirt, name)()
        _say({"said": said})


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _inside(*words: str) -> list[str]:
    """The command that runs these words inside the namespaces; all in there ends with it."""
    own = [] if os.geteuid() == 0 else ["--user", "--map-current-user", "--keep-caps"]
    # the namespace's first process has to reap QEMU, which leaves its parent: a shell that waits
    # does; what a shell runs in the background has no standard input of its own
    init = 'exec 3<&0; "$@" <&3 & exec 3<&-; wait $!'
    return [
        *("setpriv", "--pdeathsig=KILL"),
        *("unshare", *own, "--net", "--pid", "--mount-proc", "--fork", "--kill-child"),
        *("sh", "-c", init, "sh", *words),
    ]


def _try_namespaces() -> None:
    try:
        _run(*_inside("sh", "-c", NETWORK, "sh", _user()))
    except PeerFailed as exc:
        raise PeerFailed(f"no namespaces with a TUN device can be had here: {exc}") from exc


def _user() -> str:
    """Who runs libvirtd: never root."""
    return "nobody" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name


def main() -> None:
    """See the module's docstring."""
    try:
        match sys.argv[1:]:
            case ["prepare"]:
                kernel()
                _try_namespaces()
            case ["run", directory]:
                kernel()  # inside there is no network to fetch it from
                work = str(Path(directory).resolve())
                argv = _inside(sys.executable, __file__, "inside", work)
                os.execvp(argv[0], argv)
            case ["inside", directory]:
                _serve(Path(directory))
            case _:
                sys.exit(__doc__)
    except PeerFailed as exc:
        sys.exit(f"libvirt_guest: {exc}")


if __name__ == "__main__":
    main()
