"""The IPMI commands hostler gives, and what it reads in the answers. Pure.

Answers are read tolerantly: boards send less than the specification asks for, and more; what is
missing is None, what is needed and missing raises `MalformedPacket`.

Invariant: a command says itself whether it may be sent again after a lost answer (`repeatable`).
A chassis control is not: a second "cycle" is a second cycle. Section numbers: IPMI 2.0, rev. 1.1.
"""

import dataclasses
import enum
import uuid
from typing import Final, Literal

from hostler_baremetal.ipmi_error import MalformedPacket
from hostler_baremetal.ipmi_session import Privilege

_CHASSIS: Final = 0x00
_APPLICATION: Final = 0x06
_BOOT_FLAGS: Final = 5
_VALID: Final = 0x80
_PERSISTENT: Final = 0x40
_EFI: Final = 0x20


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command to the BMC."""

    name: str
    network_function: int
    code: int
    data: bytes = b""
    repeatable: bool = True


class CompletionCode(enum.IntEnum):
    """The completion codes we act on (table 5-2 and the commands' own)."""

    NORMAL = 0x00
    NODE_BUSY = 0xC0
    INVALID_COMMAND = 0xC1
    TIMEOUT = 0xC3
    OUT_OF_SPACE = 0xC4
    INVALID_FIELD = 0xCC
    INITIALISING = 0xD2
    INSUFFICIENT_PRIVILEGE = 0xD4
    NOT_IN_THIS_STATE = 0xD5
    UPDATING = 0xDE


# Refused before anything was done: any command may be given again.
NOT_STARTED: Final = frozenset({CompletionCode.NODE_BUSY, CompletionCode.INITIALISING})
# Worth another try where doing it twice does no harm.
PASSING: Final = NOT_STARTED | {
    CompletionCode.TIMEOUT,
    CompletionCode.OUT_OF_SPACE,
    CompletionCode.UPDATING,
}


class ChassisAction(enum.IntEnum):
    """Chassis Control codes (section 28.3)."""

    POWER_DOWN = 0x00
    POWER_UP = 0x01
    POWER_CYCLE = 0x02
    HARD_RESET = 0x03
    SOFT_SHUTDOWN = 0x05


class BootDevice(enum.StrEnum):
    """What a node boots from next (table 28-14, parameter 5, data 2)."""

    NONE = "none"
    PXE = "pxe"
    DISK = "disk"
    SAFE = "safe"
    DIAGNOSTIC = "diagnostic"
    CDROM = "cdrom"
    BIOS = "bios"


_DEVICE_CODES: Final = {
    BootDevice.NONE: 0x00,
    BootDevice.PXE: 0x04,
    BootDevice.DISK: 0x08,
    BootDevice.SAFE: 0x0C,
    BootDevice.DIAGNOSTIC: 0x10,
    BootDevice.CDROM: 0x14,
    BootDevice.BIOS: 0x18,
}
_DEVICES: Final = {code: device for device, code in _DEVICE_CODES.items()}
BootMode = Literal["legacy", "efi"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeviceId:
    """Who the BMC says it is (section 20.1)."""

    device_id: int
    firmware: str
    ipmi_version: str
    updating: bool
    manufacturer_id: int | None
    product_id: int | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChassisStatus:
    """The chassis as the BMC sees it (section 28.2)."""

    power_on: bool
    power_overload: bool
    power_fault: bool
    power_control_fault: bool
    last_power_event: int | None
    restore_policy: Literal["off", "previous", "on", "unknown"]
    intrusion: bool | None
    drive_fault: bool | None
    fan_fault: bool | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BootFlags:
    """What the BMC says the next boot will be; boards forget and normalise these."""

    valid: bool
    persistent: bool
    mode: BootMode
    device: BootDevice | None


GET_DEVICE_ID: Final = Command(name="get_device_id", network_function=_APPLICATION, code=0x01)
GET_SYSTEM_GUID: Final = Command(name="get_system_guid", network_function=_APPLICATION, code=0x37)
GET_CHASSIS_STATUS: Final = Command(
    name="get_chassis_status", network_function=_CHASSIS, code=0x01
)
GET_BOOT_FLAGS: Final = Command(
    name="get_boot_flags",
    network_function=_CHASSIS,
    code=0x09,
    data=bytes([_BOOT_FLAGS, 0x00, 0x00]),
)
# Set Boot Options, parameter 3: the flags stay valid though no command follows within 60 s.
KEEP_BOOT_FLAGS: Final = Command(
    name="keep_boot_flags", network_function=_CHASSIS, code=0x08, data=b"\x03\x08"
)


def chassis_control(action: ChassisAction) -> Command:
    """Returns the command that switches the node (section 28.3). Never to be sent twice."""
    return Command(
        name=f"chassis_{action.name.lower()}",
        network_function=_CHASSIS,
        code=0x02,
        data=bytes([action]),
        repeatable=False,
    )


def set_session_privilege(privilege: Privilege) -> Command:
    """Returns Set Session Privilege Level (section 22.18): a session starts as USER."""
    return Command(
        name="set_session_privilege",
        network_function=_APPLICATION,
        code=0x3B,
        data=bytes([privilege]),
    )


def close_session(managed_id: int) -> Command:
    """Returns Close Session (section 22.19)."""
    return Command(
        name="close_session",
        network_function=_APPLICATION,
        code=0x3C,
        data=managed_id.to_bytes(4, "little"),
        repeatable=False,
    )


def set_boot_flags(device: BootDevice, *, persistent: bool, mode: BootMode) -> Command:
    """Returns Set System Boot Options, parameter 5 (section 28.12).

    `BootDevice.NONE` takes an earlier choice back.
    """
    flags = (_PERSISTENT if persistent else 0) | (_EFI if mode == "efi" else 0)
    if device is not BootDevice.NONE:
        flags |= _VALID
    return Command(
        name="set_boot_flags",
        network_function=_CHASSIS,
        code=0x08,
        data=bytes([_BOOT_FLAGS, flags, _DEVICE_CODES[device], 0, 0, 0]),
    )


def parse_device_id(data: bytes) -> DeviceId:
    """Reads the answer to GET_DEVICE_ID. Raises MalformedPacket below 5 bytes."""
    _need(data, 5, "Get Device ID")
    return DeviceId(
        device_id=data[0],
        firmware=f"{data[2] & 0x7F}.{data[3]:02x}",
        ipmi_version=f"{data[4] & 0x0F}.{data[4] >> 4}",
        updating=bool(data[2] & 0x80),
        manufacturer_id=int.from_bytes(data[6:9], "little") if len(data) >= 9 else None,
        product_id=int.from_bytes(data[9:11], "little") if len(data) >= 11 else None,
    )


def parse_system_guid(data: bytes) -> uuid.UUID | None:
    """Reads the answer to GET_SYSTEM_GUID, in the order the bytes came.

    Returns None for all zeros or all ones, which boards send that have none.
    Raises MalformedPacket below 16 bytes.
    """
    _need(data, 16, "Get System GUID")
    guid = data[:16]
    return None if guid in (bytes(16), b"\xff" * 16) else uuid.UUID(bytes=guid)


def parse_chassis_status(data: bytes) -> ChassisStatus:
    """Reads the answer to GET_CHASSIS_STATUS. Raises MalformedPacket for an empty one."""
    _need(data, 1, "Get Chassis Status")
    policies: tuple[Literal["off", "previous", "on", "unknown"], ...]
    policies = ("off", "previous", "on", "unknown")
    misc = data[2] if len(data) >= 3 else None
    return ChassisStatus(
        power_on=bool(data[0] & 0x01),
        power_overload=bool(data[0] & 0x02),
        power_fault=bool(data[0] & 0x08),
        power_control_fault=bool(data[0] & 0x10),
        last_power_event=data[1] if len(data) >= 2 else None,
        restore_policy=policies[data[0] >> 5 & 0x03],
        intrusion=None if misc is None else bool(misc & 0x01),
        drive_fault=None if misc is None else bool(misc & 0x04),
        fan_fault=None if misc is None else bool(misc & 0x08),
    )


def parse_boot_flags(data: bytes) -> BootFlags:
    """Reads the answer to GET_BOOT_FLAGS. Raises MalformedPacket below 4 bytes."""
    _need(data, 4, "Get System Boot Options")
    return BootFlags(
        valid=bool(data[2] & _VALID),
        persistent=bool(data[2] & _PERSISTENT),
        mode="efi" if data[2] & _EFI else "legacy",
        device=_DEVICES.get(data[3] & 0x3C),
    )


def _need(data: bytes, size: int, what: str) -> None:
    if len(data) < size:
        raise MalformedPacket(f"{what}: {size} bytes or more are needed, got {len(data)}")
