"""RMCP+ frames: bytes in, values out, and back. No state, no I/O, no randomness of its own.

Three layers, outermost first: the RMCP header, the RMCP+ packet (IPMI 2.0 table 13-8) with its
encryption and authentication trailer, and the IPMI LAN message inside it (figure 13-4).

Invariant: whatever bytes arrive, a function here returns a value or raises `MalformedPacket`;
nothing of a sealed packet is looked at before its authentication code was found right.
"""

import dataclasses
import enum
import hmac
import struct
from typing import Final

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from hostler_baremetal.ipmi_error import MalformedPacket

# RMCP version 1.0, reserved, sequence FFh (no RMCP acknowledge), message class IPMI (13.1.3)
HEADER: Final = b"\x06\x00\xff\x07"
_RMCP_PLUS: Final = 0x06
_ENCRYPTED: Final = 0x80
_AUTHENTICATED: Final = 0x40
_NEXT_HEADER: Final = 0x07
_FIXED: Final = struct.Struct("<BBIIH")
_VECTOR_BYTES: Final = 16
_BLOCK_BYTES: Final = 16
_BMC_ADDRESS: Final = 0x20
_CONSOLE_ADDRESS: Final = 0x81


class PayloadType(enum.IntEnum):
    """Payload types of an RMCP+ packet (table 13-16)."""

    IPMI = 0x00
    OPEN_SESSION_REQUEST = 0x10
    OPEN_SESSION_RESPONSE = 0x11
    RAKP_1 = 0x12
    RAKP_2 = 0x13
    RAKP_3 = 0x14
    RAKP_4 = 0x15


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CipherSuite:
    """One row of table 22-20, and what its algorithms mean for our arithmetic.

    Attributes:
        number: the suite's id.
        digest: the hash of both the authentication and the integrity algorithm.
        digest_bytes: length of a whole code in RAKP 2 and 3.
        code_bytes: length of a truncated code in RAKP 4 and in packet trailers.
    """

    number: int
    authentication: int
    integrity: int
    confidentiality: int
    digest: str
    digest_bytes: int
    code_bytes: int

    @property
    def algorithms(self) -> tuple[int, int, int]:
        """Authentication, integrity and confidentiality algorithm, as they are proposed."""
        return (self.authentication, self.integrity, self.confidentiality)


SUITE_3: Final = CipherSuite(
    number=3,
    authentication=1,  # RAKP-HMAC-SHA1
    integrity=1,  # HMAC-SHA1-96
    confidentiality=1,  # AES-CBC-128
    digest="sha1",
    digest_bytes=20,
    code_bytes=12,
)
SUITE_17: Final = CipherSuite(
    number=17,
    authentication=3,  # RAKP-HMAC-SHA256
    integrity=4,  # HMAC-SHA256-128
    confidentiality=1,  # AES-CBC-128
    digest="sha256",
    digest_bytes=32,
    code_bytes=16,
)
# Nothing weaker is spoken: suite 0 has no authentication, 1, 2, 15 and 16 no encryption.
SUITES: Final = {suite.number: suite for suite in (SUITE_17, SUITE_3)}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SessionKeys:
    """What both sides derive from a finished RAKP exchange (sections 13.31, 13.32)."""

    suite: CipherSuite
    integrity: bytes
    confidentiality: bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Packet:
    """An RMCP+ packet as it came, its payload still encrypted if it was."""

    payload_type: int
    encrypted: bool
    authenticated: bool
    session_id: int
    sequence: int
    payload: bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """An IPMI response message."""

    network_function: int
    command: int
    sequence: int
    completion_code: int
    data: bytes


def checksum(data: bytes) -> int:
    """Returns the two's complement of the sum of the bytes (section 13.8)."""
    return -sum(data) & 0xFF


def encode_request(*, network_function: int, command: int, sequence: int, data: bytes) -> bytes:
    """Returns an IPMI LAN request message from the console to the BMC (figure 13-4)."""
    head = bytes([_BMC_ADDRESS, network_function << 2])
    rest = bytes([_CONSOLE_ADDRESS, sequence << 2, command]) + data
    return head + bytes([checksum(head)]) + rest + bytes([checksum(rest)])


def decode_response(message: bytes) -> Response:
    """Returns the response in a message. Raises MalformedPacket, also on a wrong checksum."""
    if len(message) < 8:
        raise MalformedPacket(f"an IPMI response has 8 bytes or more, got {len(message)}")
    if checksum(message[:2]) != message[2] or checksum(message[3:-1]) != message[-1]:
        raise MalformedPacket("wrong checksum in an IPMI response")
    return Response(
        network_function=message[1] >> 2,
        sequence=message[4] >> 2,
        command=message[5],
        completion_code=message[6],
        data=message[7:-1],
    )


def encode_plain(payload_type: PayloadType, payload: bytes) -> bytes:
    """Returns the packet of a payload that belongs to no session yet: no trailer, id 0."""
    return HEADER + _FIXED.pack(_RMCP_PLUS, payload_type, 0, 0, len(payload)) + payload


def encode_sealed(
    message: bytes, *, keys: SessionKeys, session_id: int, sequence: int, vector: bytes
) -> bytes:
    """Returns the encrypted and authenticated packet of an IPMI message (table 13-8, 13.29).

    Args:
        message: an IPMI LAN message.
        keys: of the session.
        session_id: the managed system's id of the session.
        sequence: of the session, never 0 and never used twice.
        vector: 16 random bytes.
    """
    body = vector + _encrypt(message, keys.confidentiality, vector)
    kind = _ENCRYPTED | _AUTHENTICATED | PayloadType.IPMI
    head = _FIXED.pack(_RMCP_PLUS, kind, session_id, sequence, len(body))
    fill = -(len(head) + len(body) + 2) % 4
    signed = head + body + b"\xff" * fill + bytes([fill, _NEXT_HEADER])
    return HEADER + signed + _code(signed, keys)


def decode(datagram: bytes) -> Packet:
    """Returns the packet in a datagram, its trailer unchecked. Raises MalformedPacket."""
    if len(datagram) < len(HEADER) + _FIXED.size:
        raise MalformedPacket(f"an RMCP+ packet has 16 bytes or more, got {len(datagram)}")
    # the sequence byte and the acknowledge bit are the sender's business
    if datagram[0] != HEADER[0] or datagram[3] != HEADER[3]:
        raise MalformedPacket("not an RMCP packet of class IPMI")
    kind, payload_type, session_id, sequence, size = _FIXED.unpack_from(datagram, len(HEADER))
    if kind != _RMCP_PLUS:
        raise MalformedPacket(f"authentication type {kind:#04x} is not RMCP+")
    payload = datagram[len(HEADER) + _FIXED.size :][:size]
    if len(payload) != size:
        raise MalformedPacket(f"payload of {size} bytes announced, {len(payload)} came")
    return Packet(
        payload_type=payload_type & 0x3F,
        encrypted=bool(payload_type & _ENCRYPTED),
        authenticated=bool(payload_type & _AUTHENTICATED),
        session_id=session_id,
        sequence=sequence,
        payload=payload,
    )


def authenticate(datagram: bytes, packet: Packet, keys: SessionKeys) -> None:
    """Returns if the packet was sealed with these keys. Raises MalformedPacket if it was not."""
    if not (packet.encrypted and packet.authenticated):
        raise MalformedPacket("a packet of a session must be encrypted and authenticated")
    size = keys.suite.code_bytes
    signed, code = datagram[len(HEADER) : -size], datagram[-size:]
    trailer_from = _FIXED.size + len(packet.payload)
    if len(signed) < trailer_from + 2 or signed[-1] != _NEXT_HEADER:
        raise MalformedPacket("no trailer after the payload")
    if not hmac.compare_digest(_code(signed, keys), code):
        raise MalformedPacket("wrong authentication code")


def open_sealed(packet: Packet, keys: SessionKeys) -> bytes:
    """Returns the message in an authenticated packet. Raises MalformedPacket.

    Up to 16 bytes of padding are taken: OpenBMC sends 16 where 0 would do.
    """
    size = len(packet.payload)
    if size < _VECTOR_BYTES + _BLOCK_BYTES or size % _BLOCK_BYTES:
        raise MalformedPacket(f"{size} bytes are no AES-CBC payload")
    vector = packet.payload[:_VECTOR_BYTES]
    decryptor = Cipher(algorithms.AES(keys.confidentiality), modes.CBC(vector)).decryptor()
    plain = decryptor.update(packet.payload[_VECTOR_BYTES:]) + decryptor.finalize()
    pad = plain[-1]
    if pad > _BLOCK_BYTES or pad >= len(plain):
        raise MalformedPacket(f"padding of {pad} bytes")
    message, padding = plain[: -1 - pad], plain[-1 - pad : -1]
    if padding != bytes(range(1, pad + 1)):
        raise MalformedPacket("padding does not count 1, 2, 3")
    return message


def _encrypt(message: bytes, key: bytes, vector: bytes) -> bytes:
    pad = -(len(message) + 1) % _BLOCK_BYTES
    encryptor = Cipher(algorithms.AES(key), modes.CBC(vector)).encryptor()
    plain = message + bytes(range(1, pad + 1)) + bytes([pad])
    return encryptor.update(plain) + encryptor.finalize()


def _code(signed: bytes, keys: SessionKeys) -> bytes:
    return hmac.digest(keys.integrity, signed, keys.suite.digest)[: keys.suite.code_bytes]
