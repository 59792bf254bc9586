"""Logging in to a BMC and talking to it afterwards, without a socket.

`Handshake` is one try at the Open Session and RAKP exchange: it is given datagrams and says what
to send next. It ends in a `Session`, which seals requests and unseals replies.

Invariants: every try has a session id, a random number and tags of its own, so that replies to an
earlier try cannot be taken for this one's. No algorithm is accepted that was not asked for. A
session's sequence number is never used twice, nor is a reply delivered twice. Whatever state a try
is left in, `abandon` says how to free the BMC's slot. Section numbers: IPMI 2.0, revision 1.1.
"""

import dataclasses
import enum
import hmac
import struct
from collections.abc import Callable
from typing import Final, assert_never

from hostler_baremetal import rmcp
from hostler_baremetal.ipmi_error import (
    AuthenticationFailed,
    Downgraded,
    MalformedPacket,
    SessionRefused,
    SuiteRefused,
)
from hostler_baremetal.rmcp import PayloadType

MAX_USERNAME_BYTES: Final = 16
MAX_PASSWORD_BYTES: Final = 20
_NAME_ONLY_LOOKUP: Final = 0x10
_KEY_CONSTANT_BYTES: Final = 20  # also for SHA256: so do ipmitool, FreeIPMI and OpenBMC
_INVALID_INTEGRITY_CHECK: Final = 0x0F
_SEQUENCE_MAX: Final = 0xFFFF_FFFF
_AHEAD: Final = 15  # 6.12.13
_BEHIND: Final = 16

Entropy = Callable[[int], bytes]

# table 13-15
_STATUS: Final = {
    0x01: "it has no free session",
    0x02: "it does not know the session id",
    0x04: "it does not have the authentication algorithm",
    0x05: "it does not have the integrity algorithm",
    0x09: "it does not know the role",
    0x0A: "the user may not have this privilege",
    0x0B: "it has no free session at this privilege",
    0x0C: "the user name is too long for it",
    0x0D: "it does not know the user",
    0x0F: "it found our proof of the password wrong",
    0x10: "it does not have the confidentiality algorithm",
    0x11: "it does not have the cipher suite",
    0x12: "it found a parameter illegal",
}
_ABOUT_THE_SUITE: Final = frozenset({0x04, 0x05, 0x10, 0x11})
_ABOUT_THE_USER: Final = frozenset({0x09, 0x0A, 0x0C, 0x0D, 0x0F})


class Privilege(enum.IntEnum):
    """Privilege levels of a session (section 6.8). Power needs OPERATOR."""

    USER = 2
    OPERATOR = 3
    ADMINISTRATOR = 4


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """What a BMC knows us by. Neither secret is in `repr`.

    Raises ValueError when a part is longer than the protocol can carry.
    """

    username: str
    password: str = dataclasses.field(repr=False)
    group_key: bytes | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        if len(self.username.encode()) > MAX_USERNAME_BYTES:
            raise ValueError(f"a BMC's user name has at most {MAX_USERNAME_BYTES} bytes")
        if len(self.password.encode()) > MAX_PASSWORD_BYTES:
            raise ValueError(f"a BMC's password has at most {MAX_PASSWORD_BYTES} bytes")
        if self.group_key is not None and len(self.group_key) > MAX_PASSWORD_BYTES:
            raise ValueError(f"a BMC's group key has at most {MAX_PASSWORD_BYTES} bytes")


class _Stage(enum.Enum):
    NEW = "new"
    OPENING = "opening"  # Open Session Request sent
    PROVING = "proving"  # RAKP 1 sent
    CONFIRMING = "confirming"  # RAKP 3 sent
    DONE = "done"
    FAILED = "failed"


class Session:
    """An established session: seals and unseals, and counts sequence numbers."""

    def __init__(
        self, *, keys: rmcp.SessionKeys, console_id: int, managed_id: int, entropy: Entropy
    ) -> None:
        self.managed_id = managed_id
        self._keys = keys
        self._console_id = console_id
        self._entropy = entropy
        self._sent = 0
        self._highest = 0
        self._seen = 0  # bit n: the packet n below the highest has come
        self._request = entropy(1)[0] & 0x3F

    @property
    def suite(self) -> rmcp.CipherSuite:
        """The cipher suite of the session."""
        return self._keys.suite

    def next_request_sequence(self) -> int:
        """Returns the 6-bit sequence number of the next new request (rqSeq)."""
        self._request = (self._request + 1) & 0x3F
        return self._request

    def seal(self, message: bytes) -> bytes:
        """Returns the datagram of a message. A retransmit is sealed anew: it is a new packet."""
        self._sent = self._sent % _SEQUENCE_MAX + 1  # 1, 2, 3 ... and never 0
        return rmcp.encode_sealed(
            message,
            keys=self._keys,
            session_id=self.managed_id,
            sequence=self._sent,
            vector=self._entropy(16),
        )

    def unseal(self, datagram: bytes) -> bytes:
        """Returns the message in a reply.

        Raises MalformedPacket if it is not of this session, not authentic, out of the sequence
        window, or came before.
        """
        packet = rmcp.decode(datagram)
        if packet.session_id != self._console_id:
            raise MalformedPacket("a packet of another session")
        if packet.payload_type != PayloadType.IPMI:
            raise MalformedPacket(f"payload type {packet.payload_type:#04x} in a session")
        rmcp.authenticate(datagram, packet, self._keys)
        self._accept_sequence(packet.sequence)
        return rmcp.open_sealed(packet, self._keys)

    def _accept_sequence(self, sequence: int) -> None:
        """Section 6.12.13: at most 15 ahead of the highest seen, 16 behind, and each once."""
        if sequence == 0:
            raise MalformedPacket("sequence 0 in a session")
        ahead = (sequence - self._highest) & _SEQUENCE_MAX
        if self._highest == 0 or 0 < ahead <= _AHEAD:
            shift = ahead if self._highest else 1
            self._seen = (self._seen << shift | 1) & ((1 << _BEHIND + 1) - 1)
            self._highest = sequence
            return
        behind = (self._highest - sequence) & _SEQUENCE_MAX
        if behind > _BEHIND:
            raise MalformedPacket(f"sequence {sequence} is out of the window")
        if self._seen >> behind & 1:
            raise MalformedPacket(f"sequence {sequence} came before")
        self._seen |= 1 << behind


class Handshake:
    """One try at opening a session (sections 13.17 to 13.24)."""

    def __init__(
        self,
        *,
        credentials: Credentials,
        suite: rmcp.CipherSuite,
        privilege: Privilege,
        entropy: Entropy,
    ) -> None:
        self._credentials = credentials
        self._suite = suite
        self._privilege = privilege
        self._entropy = entropy
        self._stage = _Stage.NEW
        self._tag = entropy(1)[0]
        self._console_id = int.from_bytes(entropy(4), "little") or 1
        self._random = entropy(16)
        self._managed_id = 0
        self._managed_random = b""
        self._guid = b""
        self._session_key = b""
        self._session: Session | None = None

    def start(self) -> bytes:
        """Returns the Open Session Request (13.17)."""
        self._stage = _Stage.OPENING
        # the level is said outright: some boards key the session with what they read here
        body = struct.pack("<BBxxI", self._tag, self._privilege, self._console_id)
        for kind, algorithm in enumerate(self._suite.algorithms):
            body += bytes([kind, 0, 0, 8, algorithm, 0, 0, 0])
        return rmcp.encode_plain(PayloadType.OPEN_SESSION_REQUEST, body)

    def receive(self, datagram: bytes) -> bytes | Session:
        """Takes a datagram and returns what to send next, or the session at the end.

        Raises:
            MalformedPacket: it is not the reply awaited (a late, a foreign, a broken one):
                drop it and go on waiting.
            SuiteRefused: the BMC does not take this suite, or chose other algorithms.
            SessionRefused: the BMC does not open a session.
            AuthenticationFailed: user or password are wrong, or the BMC does not know them.
        """
        packet = rmcp.decode(datagram)
        if packet.session_id != 0 or packet.encrypted or packet.authenticated:
            raise MalformedPacket("a packet of a session, while one is being opened")
        match self._stage:
            case _Stage.OPENING:
                return self._on_opened(packet)
            case _Stage.PROVING:
                return self._on_rakp_2(packet)
            case _Stage.CONFIRMING:
                return self._on_rakp_4(packet)
            case _Stage.NEW | _Stage.DONE | _Stage.FAILED:
                raise MalformedPacket("nothing is awaited")
        assert_never(self._stage)

    def abandon(self) -> bytes | None:
        """Returns the datagram that frees the BMC's slot, if this try has taken one.

        Before the BMC knows us that is a RAKP 3 with an error status; after our RAKP 3 it may
        have logged us in, and is told to close the session.
        """
        if self._managed_id == 0 or self._stage is _Stage.DONE:
            return None
        if self._session is not None:
            # Close Session (22.19): application function, command 3Ch
            message = rmcp.encode_request(
                network_function=0x06,
                command=0x3C,
                sequence=self._session.next_request_sequence(),
                data=struct.pack("<I", self._managed_id),
            )
            return self._session.seal(message)
        body = struct.pack("<BBxxI", self._next_tag(), _INVALID_INTEGRITY_CHECK, self._managed_id)
        return rmcp.encode_plain(PayloadType.RAKP_3, body)

    def _on_opened(self, packet: rmcp.Packet) -> bytes:
        body = self._expect(packet, PayloadType.OPEN_SESSION_RESPONSE)
        if len(body) < 36:
            raise MalformedPacket("short Open Session Response")
        (self._managed_id,) = struct.unpack_from("<I", body, 8)
        chosen = (body[16], body[24], body[32])
        if chosen != self._suite.algorithms:
            self._stage = _Stage.FAILED
            raise Downgraded(
                f"suite {self._suite.number} was asked for, the BMC chose the algorithms {chosen}",
                status=0,
            )
        self._stage = _Stage.PROVING
        rakp_1 = struct.pack("<BxxxI", self._next_tag(), self._managed_id)
        return rmcp.encode_plain(PayloadType.RAKP_1, rakp_1 + self._random + self._user(gap=2))

    def _on_rakp_2(self, packet: rmcp.Packet) -> bytes:
        body = self._expect(packet, PayloadType.RAKP_2)
        if len(body) != 40 + self._suite.digest_bytes:
            raise MalformedPacket("wrong length of RAKP 2")
        self._managed_random, self._guid = body[8:24], body[24:40]
        expected = self._digest(
            self._user_key,
            self._ids() + self._random + self._managed_random + self._guid + self._user(),
        )
        if not hmac.compare_digest(expected, body[40:]):
            self._stage = _Stage.FAILED
            raise AuthenticationFailed("wrong password: the BMC's proof does not match ours")
        group_key = self._credentials.group_key or self._user_key
        self._session_key = self._digest(
            group_key, self._random + self._managed_random + self._user()
        )
        keys = derive_keys(self._session_key, self._suite)
        self._session = Session(
            keys=keys,
            console_id=self._console_id,
            managed_id=self._managed_id,
            entropy=self._entropy,
        )
        self._stage = _Stage.CONFIRMING
        proof = self._digest(
            self._user_key,
            self._managed_random + struct.pack("<I", self._console_id) + self._user(),
        )
        rakp_3 = struct.pack("<BxxxI", self._next_tag(), self._managed_id)
        return rmcp.encode_plain(PayloadType.RAKP_3, rakp_3 + proof)

    def _on_rakp_4(self, packet: rmcp.Packet) -> Session:
        body = self._expect(packet, PayloadType.RAKP_4)
        expected = self._digest(
            self._session_key,
            self._random + struct.pack("<I", self._managed_id) + self._guid,
        )[: self._suite.code_bytes]
        if not hmac.compare_digest(expected, body[8:]):
            self._stage = _Stage.FAILED
            raise AuthenticationFailed("the BMC's last proof is wrong: is the group key right?")
        assert self._session is not None
        self._stage = _Stage.DONE
        return self._session

    def _expect(self, packet: rmcp.Packet, kind: PayloadType) -> bytes:
        """Returns the body of the awaited reply: our tag, our session id, status 0."""
        body = packet.payload
        if packet.payload_type != kind:
            raise MalformedPacket(f"payload type {packet.payload_type:#04x}, {kind.name} awaited")
        if len(body) < 2 or body[0] != self._tag:
            raise MalformedPacket(f"a {kind.name} to another request of ours")
        # refusals are short, and some leave the session id 0
        console_id = int.from_bytes(body[4:8], "little")
        status = body[1]
        if console_id != self._console_id and not (status and console_id == 0):
            raise MalformedPacket(f"a {kind.name} of another session")
        if status:
            self._stage = _Stage.FAILED
            raise _refusal(kind, status)
        if len(body) < 8:
            raise MalformedPacket(f"short {kind.name}")
        return body

    def _next_tag(self) -> int:
        self._tag = (self._tag + 1) & 0xFF
        return self._tag

    @property
    def _user_key(self) -> bytes:
        return self._credentials.password.encode()  # HMAC pads it with zeros to a block

    def _ids(self) -> bytes:
        return struct.pack("<II", self._console_id, self._managed_id)

    def _user(self, *, gap: int = 0) -> bytes:
        """Role, length and name, as they are signed; RAKP 1 has two reserved bytes between."""
        name = self._credentials.username.encode()
        return (
            bytes([self._privilege | _NAME_ONLY_LOOKUP]) + bytes(gap) + bytes([len(name)]) + name
        )

    def _digest(self, key: bytes, data: bytes) -> bytes:
        return hmac.digest(key, data, self._suite.digest)


def derive_keys(session_key: bytes, suite: rmcp.CipherSuite) -> rmcp.SessionKeys:
    """Returns K1 and the first 16 bytes of K2 (section 13.32)."""
    return rmcp.SessionKeys(
        suite=suite,
        integrity=hmac.digest(session_key, b"\x01" * _KEY_CONSTANT_BYTES, suite.digest),
        confidentiality=hmac.digest(session_key, b"\x02" * _KEY_CONSTANT_BYTES, suite.digest)[:16],
    )


def _refusal(
    kind: PayloadType, status: int
) -> SessionRefused | SuiteRefused | AuthenticationFailed:
    detail = f"{_STATUS.get(status, 'it gives no known reason')} ({kind.name}, {status:#04x})"
    if status in _ABOUT_THE_USER:
        return AuthenticationFailed(f"the BMC refuses us: {detail}")
    if status in _ABOUT_THE_SUITE:
        return SuiteRefused(f"the BMC refuses the cipher suite: {detail}", status=status)
    return SessionRefused(f"the BMC opens no session: {detail}", status=status)
