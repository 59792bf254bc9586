"""What this host's network card can do, as its driver says."""

import contextlib
import fcntl
import ipaddress
import socket
import struct
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

_CARDS: Final = Path("/sys/class/net")
_SIOCGIFADDR: Final = 0x8915  # linux/sockios.h
# struct ifreq: the name, then a struct sockaddr_in with the address after family and port
_NAME: Final = struct.Struct("16s24x")
_ADDRESS: Final = struct.Struct("20x4s16x")
_BYTES_PER_MBIT: Final = 125_000


def bytes_per_second(url: str, *, cards: Path = _CARDS) -> int | None:
    """The rate, each way, of the card on which this host is reached at the URL.

    None where nobody knows: a card without a driver that says so (most virtual ones), an address
    that is none of this host's, or one of IPv6 only. Blocks while a name is looked up.
    """
    with contextlib.suppress(OSError, ValueError):
        host = urlsplit(url).hostname or ""
        found = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)
        addresses = {ipaddress.IPv4Address(address[0]) for *_, address in found}
        for _, name in socket.if_nameindex():
            if _address(name) in addresses and _is_real(cards / name):
                mbit = int((cards / name / "speed").read_text())  # -1: unknown
                return mbit * _BYTES_PER_MBIT if mbit > 0 else None
    return None


def _is_real(card: Path) -> bool:
    """Whether it is hardware, or made of hardware: what veth and tun say of their speed is made up."""
    if (card / "device").exists():
        return True
    words = (card / "uevent").read_text().split()
    return any(word in words for word in ("DEVTYPE=bond", "DEVTYPE=bridge", "DEVTYPE=vlan"))


def _address(name: str) -> ipaddress.IPv4Address | None:
    """The first address of an interface (netdevice(7))."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            told = fcntl.ioctl(asking, _SIOCGIFADDR, _NAME.pack(name.encode()))
        except OSError:  # it has none
            return None
    (packed,) = _ADDRESS.unpack(told)
    return ipaddress.IPv4Address(packed)
