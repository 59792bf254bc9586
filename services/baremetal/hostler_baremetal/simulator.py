"""A BMC in one class: RMCP+ with cipher suites 17 and 3, a chassis, and switches for faults.

No simulator of others speaks suite 17, and none lies, loses packets or runs out of sessions on
request. This one is here so that hostler can be tried without hardware (`hostler-baremetal
simulate`) and tested against what real boards do.

Invariant: it shares no protocol code with the client (`rmcp`, `ipmi_session`, `ipmi_command`), so
that one misreading of the specification cannot hide in both. It is itself checked by ipmitool and
FreeIPMI. Section numbers are those of the IPMI 2.0 specification, revision 1.1.
"""

import asyncio
import dataclasses
import hashlib
import hmac
import os
import struct
from collections.abc import Callable

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

_RMCP = bytes.fromhex("0600ff07")
_AUTHENTICATION = {1: hashlib.sha1, 3: hashlib.sha256}
_CODE_BYTES = {1: 12, 3: 16}
# authentication, integrity, confidentiality (table 22-20)
_SUITES = {3: (1, 1, 1), 17: (3, 4, 1)}
_OPEN, _OPEN_REPLY, _RAKP1, _RAKP2, _RAKP3, _RAKP4 = 0x10, 0x11, 0x12, 0x13, 0x14, 0x15

Command = tuple[int, int, bytes]


@dataclasses.dataclass(kw_only=True)
class Faults:
    """What goes wrong. All are off; a test turns them on, also while sessions are open."""

    drop_requests: Callable[[bytes], bool] | None = None
    drop_replies: Callable[[bytes], bool] | None = None
    duplicate_replies: bool = False
    reorder_replies: bool = False
    delay_replies_seconds: float = 0.0
    wrong_key_exchange_code: bool = False
    wrong_final_code: bool = False
    downgrade_to_sha1: bool = False
    stale_tags: bool = False
    pad_16: bool = False
    forge_replies: bool = False
    completion_codes: list[int] = dataclasses.field(default_factory=list)
    mute_commands: set[tuple[int, int]] = dataclasses.field(default_factory=set)
    ignore_power: bool = False
    refuse_power: int | None = None
    never_free_sessions: bool = False


@dataclasses.dataclass(kw_only=True)
class _Session:
    console_id: int
    managed_id: int
    suite: tuple[int, int, int]
    privilege: int
    role: int = 0
    username: bytes = b""
    console_random: bytes = b""
    managed_random: bytes = b""
    password: bytes = b""
    limit: int = 4
    integrity_key: bytes = b""
    confidentiality_key: bytes = b""
    active: bool = False
    sent: int = 0
    seen: set[int] = dataclasses.field(default_factory=set)


def _two_complement(data: bytes) -> int:
    return -sum(data) & 0xFF


def _cbc(key: bytes, vector: bytes) -> Cipher[modes.CBC]:
    return Cipher(algorithms.AES(key), modes.CBC(vector))


class SimulatedBmc(asyncio.DatagramProtocol):
    """One BMC on one UDP port. `commands` lists every command it carried out, in order."""

    def __init__(
        self,
        *,
        users: dict[str, tuple[str, int]] | None = None,
        suites: frozenset[int] = frozenset({3, 17}),
        group_key: bytes | None = None,
        power: bool = False,
        session_limit: int = 4,
        soft_off_seconds: float = 0.05,
        cycle_off_seconds: float = 1.0,
        power_delay_seconds: float = 0.0,
    ) -> None:
        self.users = users or {"admin": ("secret", 4)}
        self.suites = {_SUITES[number] for number in suites}
        self.group_key = group_key
        self.power = power
        self.session_limit = session_limit
        self.soft_off_seconds = soft_off_seconds
        self.cycle_off_seconds = cycle_off_seconds
        self.power_delay_seconds = power_delay_seconds
        self.guid = os.urandom(16)
        self.faults = Faults()
        self.boot_flags = bytes(5)
        self.commands: list[Command] = []
        self.handshakes = 0
        self.sessions: dict[int, _Session] = {}
        self._transport: asyncio.DatagramTransport | None = None
        self._held: bytes | None = None
        self._timer: asyncio.TimerHandle | None = None

    # --- the edge ---

    @property
    def port(self) -> int:
        """The UDP port it listens on."""
        assert self._transport is not None
        return int(self._transport.get_extra_info("sockname")[1])

    @property
    def active_sessions(self) -> int:
        """How many sessions are logged in."""
        return sum(session.active for session in self.sessions.values())

    @property
    def power_commands(self) -> list[int]:
        """The chassis control codes it was given, in order (section 28.3)."""
        return [data[0] for function, code, data in self.commands if (function, code) == (0, 2)]

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> None:
        """Listens. Raises OSError when the port is taken."""
        loop = asyncio.get_running_loop()
        await loop.create_datagram_endpoint(lambda: self, local_addr=(host, port))

    def stop(self) -> None:
        """Goes silent and forgets its sessions, as a BMC that loses power."""
        self.sessions.clear()
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]  # DatagramProtocol's stub says BaseTransport
        """Keeps the transport."""
        self._transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """Answers one packet; what it cannot read it drops, as boards do."""
        faults = self.faults
        if faults.drop_requests is not None and faults.drop_requests(data):
            return
        try:
            replies = self._receive(data)
        except (IndexError, struct.error, ValueError):
            return
        for reply in replies:
            if faults.drop_replies is not None and faults.drop_replies(reply):
                continue
            self._send(reply, addr)

    def _send(self, reply: bytes, addr: tuple[str, int]) -> None:
        faults = self.faults
        out = [reply]
        if faults.forge_replies:
            out.insert(0, reply[:-1] + bytes([reply[-1] ^ 0x01]))
        if faults.duplicate_replies:
            out.append(reply)
        if faults.reorder_replies:
            # an old reply comes again, after the new one
            out.extend([self._held] if self._held is not None else [])
            self._held = reply
        assert self._transport is not None
        for packet in out:
            if faults.delay_replies_seconds:
                asyncio.get_running_loop().call_later(
                    faults.delay_replies_seconds, self._transport.sendto, packet, addr
                )
            else:
                self._transport.sendto(packet, addr)

    # --- frames ---

    def _receive(self, data: bytes) -> list[bytes]:
        if data[:4] != _RMCP:
            return []
        if data[4] == 0x00:
            return self._sessionless_15(data)
        if data[4] != 0x06:
            return []
        kind = data[5]
        session_id, sequence, length = struct.unpack_from("<IIH", data, 6)
        body = data[16 : 16 + length]
        if len(body) != length:
            return []
        match kind:
            case 0x10:
                return [self._plain(_OPEN_REPLY, reply) for reply in self._open(body)]
            case 0x12:
                return [self._plain(_RAKP2, reply) for reply in self._rakp_1(body)]
            case 0x14:
                return [self._plain(_RAKP4, reply) for reply in self._rakp_3(body)]
            case 0x00 if session_id == 0:
                return [self._plain(0x00, reply) for reply in self._answer(body, None)]
            case 0xC0:
                return self._in_session(data, session_id, sequence, body)
        return []

    @staticmethod
    def _plain(kind: int, body: bytes) -> bytes:
        return _RMCP + struct.pack("<BBIIH", 0x06, kind, 0, 0, len(body)) + body

    def _sessionless_15(self, data: bytes) -> list[bytes]:
        length = data[13]
        body = data[14 : 14 + length]
        return [
            _RMCP + bytes(9) + bytes([len(reply)]) + reply for reply in self._answer(body, None)
        ]

    def _in_session(self, data: bytes, session_id: int, sequence: int, body: bytes) -> list[bytes]:
        session = self.sessions.get(session_id)
        if session is None or not session.active:
            return []
        digest, size = _AUTHENTICATION[session.suite[0]], _CODE_BYTES[session.suite[0]]
        expected = hmac.digest(session.integrity_key, data[4:-size], digest)[:size]
        if not hmac.compare_digest(expected, data[-size:]) or sequence in session.seen:
            return []
        session.seen.add(sequence)
        decryptor = _cbc(session.confidentiality_key, body[:16]).decryptor()
        plain = decryptor.update(body[16:]) + decryptor.finalize()
        pad = plain[-1]
        if plain[-1 - pad : -1] != bytes(range(1, pad + 1)):
            return []
        message = plain[: -1 - pad]
        return [self._sealed(session, reply) for reply in self._answer(message, session)]

    def _sealed(self, session: _Session, message: bytes) -> bytes:
        digest, size = _AUTHENTICATION[session.suite[0]], _CODE_BYTES[session.suite[0]]
        pad = -(len(message) + 1) % 16
        if self.faults.pad_16 and pad == 0:
            pad = 16
        plain = message + bytes(range(1, pad + 1)) + bytes([pad])
        vector = os.urandom(16)
        encryptor = _cbc(session.confidentiality_key, vector).encryptor()
        body = vector + encryptor.update(plain) + encryptor.finalize()
        session.sent += 1
        head = struct.pack("<BBIIH", 0x06, 0xC0, session.console_id, session.sent, len(body))
        fill = -(len(head) + len(body) + 2) % 4
        signed = head + body + b"\xff" * fill + bytes([fill, 0x07])
        return _RMCP + signed + hmac.digest(session.integrity_key, signed, digest)[:size]

    # --- logging in ---

    def _open(self, body: bytes) -> list[bytes]:
        tag, privilege = body[0], body[1]
        (console_id,) = struct.unpack_from("<I", body, 4)
        chosen = (body[12], body[20], body[28])
        self.handshakes += 1
        if chosen not in self.suites:
            return [bytes([tag, 0x11, privilege, 0]) + body[4:8]]
        if len(self.sessions) >= self.session_limit:
            return [bytes([tag, 0x01, privilege, 0]) + body[4:8]]
        managed_id = struct.unpack("<I", os.urandom(4))[0] or 1
        self.sessions[managed_id] = _Session(
            console_id=console_id, managed_id=managed_id, suite=chosen, privilege=privilege or 4
        )
        if self.faults.downgrade_to_sha1:
            chosen = _SUITES[3]
        reply = bytes([tag, 0x00, privilege or 4, 0]) + struct.pack("<II", console_id, managed_id)
        for kind, algorithm in enumerate(chosen):
            reply += bytes([kind, 0, 0, 8, algorithm, 0, 0, 0])
        return self._tagged(reply)

    def _tagged(self, reply: bytes) -> list[bytes]:
        if not self.faults.stale_tags:
            return [reply]
        return [bytes([(reply[0] + 7) & 0xFF]) + reply[1:], reply]

    def _rakp_1(self, body: bytes) -> list[bytes]:
        tag = body[0]
        (managed_id,) = struct.unpack_from("<I", body, 4)
        session = self.sessions.get(managed_id)
        if session is None or session.active:
            return [bytes([tag, 0x02, 0, 0]) + bytes(4)]
        role, size = body[24], body[27]
        name = body[28 : 28 + size]
        refused = bytes([0, 0]) + struct.pack("<I", session.console_id)
        if size > 16 or len(name) != size:
            return [bytes([tag, 0x0C]) + refused]
        user = self.users.get(name.decode("latin-1"))
        if user is None:
            self._forget(session)
            return [bytes([tag, 0x0D]) + refused]
        if role & 0x0F > user[1]:
            self._forget(session)
            return [bytes([tag, 0x0A]) + refused]
        session.console_random, session.managed_random = body[8:24], os.urandom(16)
        session.role, session.username = role, name
        session.password, session.limit = user[0].encode(), user[1]
        code = hmac.digest(
            session.password,
            struct.pack("<II", session.console_id, managed_id)
            + session.console_random
            + session.managed_random
            + self.guid
            + bytes([role, size])
            + name,
            _AUTHENTICATION[session.suite[0]],
        )
        if self.faults.wrong_key_exchange_code:
            code = bytes([code[0] ^ 0x80]) + code[1:]
        head = bytes([tag, 0x00, 0, 0]) + struct.pack("<I", session.console_id)
        return self._tagged(head + session.managed_random + self.guid + code)

    def _rakp_3(self, body: bytes) -> list[bytes]:
        tag, status = body[0], body[1]
        (managed_id,) = struct.unpack_from("<I", body, 4)
        session = self.sessions.get(managed_id)
        if session is None or session.active:
            return [bytes([tag, 0x02, 0, 0]) + bytes(4)]
        if status != 0:
            self._forget(session)
            return []
        digest, size = _AUTHENTICATION[session.suite[0]], _CODE_BYTES[session.suite[0]]
        user = bytes([session.role, len(session.username)]) + session.username
        console = struct.pack("<I", session.console_id)
        expected = hmac.digest(session.password, session.managed_random + console + user, digest)
        if not hmac.compare_digest(expected, body[8:]):
            self._forget(session)
            return [bytes([tag, 0x0F, 0, 0]) + console]
        key = hmac.digest(
            self.group_key or session.password,
            session.console_random + session.managed_random + user,
            digest,
        )
        session.integrity_key = hmac.digest(key, b"\x01" * 20, digest)
        session.confidentiality_key = hmac.digest(key, b"\x02" * 20, digest)[:16]
        session.active, session.privilege = True, min(2, session.role & 0x0F)
        managed = struct.pack("<I", managed_id)
        code = hmac.digest(key, session.console_random + managed + self.guid, digest)[:size]
        if self.faults.wrong_final_code:
            code = bytes([code[0] ^ 0x80]) + code[1:]
        return self._tagged(bytes([tag, 0x00, 0, 0]) + console + code)

    def _forget(self, session: _Session) -> None:
        if not self.faults.never_free_sessions:
            self.sessions.pop(session.managed_id, None)

    # --- commands ---

    def _answer(self, message: bytes, session: _Session | None) -> list[bytes]:
        if len(message) < 7 or _two_complement(message[:2]) != message[2]:
            return []
        if _two_complement(message[3:-1]) != message[-1]:
            return []
        function, command, data = message[1] >> 2, message[5], message[6:-1]
        if (function, command) in self.faults.mute_commands:
            self._execute(function, command, data, session)
            return []
        if session is not None and self.faults.completion_codes:
            outcome = bytes([self.faults.completion_codes.pop(0)])
        else:
            outcome = self._execute(function, command, data, session)
        head = bytes([message[3], (function | 1) << 2 | (message[4] & 3)])
        rest = bytes([message[0], message[4] & 0xFC | (message[1] & 3), command]) + outcome
        reply = head + bytes([_two_complement(head)]) + rest + bytes([_two_complement(rest)])
        return [reply]

    def _execute(
        self, function: int, command: int, data: bytes, session: _Session | None
    ) -> bytes:
        match function, command:
            case 0x06, 0x38:  # Get Channel Authentication Capabilities (22.13)
                return bytes([0, 0x01, 0x80, 0x04, 0x02, 0, 0, 0, 0])
            case 0x06, 0x54:  # Get Channel Cipher Suites (22.15)
                return self._cipher_suites(data)
            case 0x06, 0x37:  # Get System GUID (22.14)
                return b"\x00" + self.guid
        if session is None:
            return b"\xd4"
        self.commands.append((function, command, data))
        match function, command:
            case 0x06, 0x01:  # Get Device ID (20.1)
                return b"\x00" + bytes.fromhex("20 01 02 15 02 bf 57 01 00 34 12 00000000")
            case 0x06, 0x3B:  # Set Session Privilege Level (22.18)
                return self._set_privilege(data, session)
            case 0x06, 0x3C:  # Close Session (22.19)
                return self._close(data)
            case 0x00, 0x01:  # Get Chassis Status (28.2)
                return bytes([0, 0x60 | self.power, 0x10 if self.power else 0x00, 0x40])
            case 0x00, 0x02:  # Chassis Control (28.3)
                return self._chassis_control(data[0], session)
            case 0x00, 0x08:  # Set System Boot Options (28.12)
                return self._set_boot_options(data, session)
            case 0x00, 0x09:  # Get System Boot Options (28.13)
                flags = self.boot_flags if data[0] & 0x7F == 5 else bytes(5)
                return bytes([0, 0x01, data[0] & 0x7F]) + flags
        return b"\xc1"

    def _cipher_suites(self, data: bytes) -> bytes:
        records = b""
        for number, (authentication, integrity, confidentiality) in sorted(_SUITES.items()):
            if (authentication, integrity, confidentiality) in self.suites:
                records += bytes(
                    [0xC0, number, authentication, 0x40 | integrity, 0x80 | confidentiality]
                )
        index = data[2] & 0x3F
        return b"\x00\x01" + records[16 * index : 16 * (index + 1)]

    @staticmethod
    def _set_privilege(data: bytes, session: _Session) -> bytes:
        wanted = data[0] & 0x0F
        if wanted > min(session.role & 0x0F, session.limit):
            return b"\x80"
        session.privilege = wanted or session.privilege
        return bytes([0, session.privilege])

    def _close(self, data: bytes) -> bytes:
        (managed_id,) = struct.unpack_from("<I", data)
        session = self.sessions.get(managed_id)
        if session is None:
            return b"\x87"
        self._forget(session)
        return b"\x00"

    def _set_boot_options(self, data: bytes, session: _Session) -> bytes:
        if session.privilege < 3:
            return b"\xd4"
        match data[0] & 0x7F:
            case 0x00:
                return b"\x80"  # set in progress is optional
            case 0x03 | 0x04:
                return b"\x00"
            case 0x05:
                self.boot_flags = data[1:6]
                return b"\x00"
        return b"\x80"

    def _chassis_control(self, action: int, session: _Session) -> bytes:
        if session.privilege < 3:
            return b"\xd4"
        if self.faults.refuse_power is not None:
            return bytes([self.faults.refuse_power])
        if self.faults.ignore_power:
            return b"\x00"
        match action & 0x0F:
            case 0x00:
                self._switch(power=False, after=self.power_delay_seconds)
            case 0x01:
                self._switch(power=True, after=self.power_delay_seconds)
            case 0x02:
                if not self.power:
                    return b"\xd5"
                self.power = False
                self._switch(power=True, after=self.cycle_off_seconds)
            case 0x03:
                return b"\x00" if self.power else b"\xd5"
            case 0x05:
                if not self.power:
                    return b"\xd5"
                self._switch(power=False, after=self.soft_off_seconds)
            case _:
                return b"\xcc"
        return b"\x00"

    def _switch(self, *, power: bool, after: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if after <= 0:
            self.power = power
            return
        self._timer = asyncio.get_running_loop().call_later(after, self._set_power, power)

    def _set_power(self, power: bool) -> None:
        self.power = power
