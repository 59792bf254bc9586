"""Real BMC simulators of others, started as processes: for tests and the demo.

OpenIPMI's `ipmi_sim` (Debian package openipmi) is a BMC that no one here wrote. It speaks cipher
suite 3, not 17; the chassis behind it is a shell script that keeps the power state in a file.
"""

import dataclasses
import os
import pathlib
import shutil
import socket
import subprocess
import time
import uuid
from typing import Final, Self

IPMI_SIM: Final = "ipmi_sim"
USERNAME: Final = "admin"
PASSWORD: Final = "secret"  # noqa: S105  # of a simulator

_LAN: Final = """\
name "{name}"
set_working_mc 0x20
  startlan 1
    addr {host} {port}
    priv_limit admin
    allowed_auths_callback none md2 md5 straight
    allowed_auths_user none md2 md5 straight
    allowed_auths_operator none md2 md5 straight
    allowed_auths_admin none md2 md5 straight
    guid {guid}
  endlan
  chassis_control "{script} {name}"
  user 1 true "" "test" user 10 none md2 md5 straight
  user 2 true "{username}" "{password}" admin 10 none md2 md5 straight
"""
_EMULATOR: Final = """\
mc_setbmc 0x20
mc_add 0x20 0 no-device-sdrs 0x23 9 8 0x9f 0x1291 0xf02 persist_sdr
sel_enable 0x20 1000 0x0a
sensor_add 0x20 0 1 0x01 0x01
sensor_set_value 0x20 0 1 0x30 0
mc_add_fru_data 0x20 0 128 data 0
mc_enable 0x20
"""
# called as: chassis.sh <device> get|set power|boot|reset|shutdown|identify [value]
_CHASSIS: Final = """\
#!/bin/sh
cd "$(dirname "$0")" || exit 1
device=$1; verb=$2; what=$3; shift 3
case "$verb $what" in
  "get power") echo "power:$(cat power)" ;;
  "get boot") echo "boot:$(cat boot)" ;;
  "set power") echo "power $1" >>commands; echo "$1" >power ;;
  "set boot") echo "boot $1" >>commands; echo "$1" >boot ;;
  "set reset") echo "reset" >>commands ;;
  "set shutdown") echo "shutdown" >>commands; echo 0 >power ;;
  *) ;;
esac
exit 0
"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class IpmiSim:
    """One `ipmi_sim`: its files in a folder of its own, its UDP port, its command line."""

    name: str
    directory: pathlib.Path
    host: str
    port: int

    @classmethod
    def prepare(
        cls, directory: pathlib.Path, *, name: str, port: int, power: bool = False
    ) -> Self:
        """Writes the files of a simulator and returns it, not started.

        Raises FileNotFoundError when the program is not installed.
        """
        if shutil.which(IPMI_SIM) is None:
            raise FileNotFoundError(f"{IPMI_SIM} is not installed: apt-get install openipmi")
        directory.mkdir(parents=True, exist_ok=True)
        simulator = cls(name=name, directory=directory, host="127.0.0.1", port=port)
        script = directory / "chassis.sh"
        script.write_text(_CHASSIS)
        script.chmod(0o755)
        (directory / "power").write_text("1\n" if power else "0\n")
        (directory / "boot").write_text("default\n")
        (directory / "commands").write_text("")
        (directory / "state").mkdir(exist_ok=True)
        (directory / "lan.conf").write_text(
            _LAN.format(
                name=name,
                host=simulator.host,
                port=port,
                guid=uuid.uuid5(uuid.NAMESPACE_DNS, name).hex,
                script=script,
                username=USERNAME,
                password=PASSWORD,
            )
        )
        (directory / "sim.emu").write_text(_EMULATOR)
        return simulator

    @property
    def address(self) -> str:
        """The BMC's address as a node has it."""
        return f"ipmi://{self.host}:{self.port}"

    @property
    def command_line(self) -> list[str]:
        """What starts it, in the foreground."""
        here = self.directory
        return [IPMI_SIM, "-c", f"{here}/lan.conf", "-f", f"{here}/sim.emu", "-s",
                f"{here}/state", "-n"]  # fmt: skip

    @property
    def power(self) -> bool:
        """Whether the chassis is on, read behind the BMC's back."""
        return (self.directory / "power").read_text().strip() == "1"

    def switch(self, *, power: bool) -> None:
        """Switches the chassis behind the BMC's back, as somebody at its front panel would."""
        (self.directory / "power").write_text("1\n" if power else "0\n")

    @property
    def commands(self) -> list[str]:
        """What the chassis was told, in order."""
        return (self.directory / "commands").read_text().splitlines()

    def start(self) -> subprocess.Popen[bytes]:
        """Starts it and returns the process once its port is bound.

        Raises RuntimeError when it ends at once or does not come up within 10 s.
        """
        with (self.directory / "log").open("wb") as log:
            process = subprocess.Popen(  # noqa: S603  # our own command line
                self.command_line,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + 10
        while not self.is_bound():
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                process.wait()
                said = (self.directory / "log").read_text(errors="replace")
                raise RuntimeError(f"ipmi_sim did not start: {said[-500:]}")
            time.sleep(0.02)
        return process

    def is_bound(self) -> bool:
        """Whether a socket is bound to the port: UDP cannot be asked otherwise."""
        wanted = f":{self.port:04X}"
        table = pathlib.Path("/proc/net/udp").read_text()
        return any(line.split()[1].endswith(wanted) for line in table.splitlines()[1:])


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a simulator and waits for its end."""
    process.terminate()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_udp_port() -> int:
    """Returns a UDP port that nobody holds on loopback right now."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment() -> dict[str, str]:
    """Returns the environment for ipmitool: the password goes there, not on a command line."""
    return os.environ | {"IPMITOOL_PASSWORD": PASSWORD}
