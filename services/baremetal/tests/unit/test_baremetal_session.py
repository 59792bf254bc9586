"""Logging in and the session, without a socket: against a login that ipmitool 1.8.19 made."""

import collections
import dataclasses
import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostler_baremetal import rmcp
from hostler_baremetal.ipmi_error import (
    AuthenticationFailed,
    Downgraded,
    MalformedPacket,
    SessionRefused,
    SuiteRefused,
)
from hostler_baremetal.ipmi_session import (
    Credentials,
    Handshake,
    Privilege,
    Session,
    derive_keys,
)

ADMIN = Credentials(username="admin", password="secret")


@dataclasses.dataclass(frozen=True)
class Login:
    """A login as it went over the wire. ipmitool's tags are all 0: ours count."""

    suite: rmcp.CipherSuite
    open_reply: str
    rakp_1: str
    rakp_2: str
    rakp_3: str
    rakp_4: str
    reply: str

    @property
    def random(self) -> bytes:
        return bytes.fromhex(self.rakp_1)[24:40]


LOGINS = [
    Login(
        suite=rmcp.SUITE_17,
        open_reply=(
            "0600ff0706110000000000000000240000000400a4a3a2a03673d2d9"
            "000000080300000001000008040000000200000801000000"
        ),
        rakp_1=(
            "0600ff07061200000000000000002100000000003673d2d9"
            "3ad2259b9dfd1f49aaa3cea99d85f86c1400000561646d696e"
        ),
        rakp_2=(
            "0600ff0706130000000000000000480000000000a4a3a2a0fc090771690239dfcce8581e14cad725"
            "ebd2dd2fb6bff0b5804e6338c6df18dfba3b2862a16cef7104e66a105e0d2a390279c39548a7255a"
            "70bd4521d47e7337"
        ),
        rakp_3=(
            "0600ff07061400000000000000002800000000003673d2d9"
            "0080927746302a13e5dfd119b46eed9df709d3ed0bbbd50d52a91f62698a7124"
        ),
        rakp_4=(
            "0600ff0706150000000000000000180000000000a4a3a2a073a622fea51cd35f4cd2f89cb35d22af"
        ),
        reply=(
            "0600ff0706c0a4a3a2a001000000200013de8026e375e152004010a3497a65e1"
            "af226a9421431337f141c2e5a671ed9affff02075d6aa574ee66712ecfad05de07aae3a0"
        ),
    ),
    Login(
        suite=rmcp.SUITE_3,
        open_reply=(
            "0600ff0706110000000000000000240000000400a4a3a2a0ff8f099d"
            "000000080100000001000008010000000200000801000000"
        ),
        rakp_1=(
            "0600ff0706120000000000000000210000000000ff8f099d"
            "0f4c6ae740876054fba1baf9742c85b91400000561646d696e"
        ),
        rakp_2=(
            "0600ff07061300000000000000003c0000000000a4a3a2a052e0a8cd93ca2c2ef0528b3a85b2d4ce"
            "c3d4d62ec7f2fa0c872ff8f4882aafdc64ad2141e6bdc21322a6d22d31db479dd0abaf09"
        ),
        rakp_3=(
            "0600ff07061400000000000000001c0000000000ff8f099d"
            "629616dd1441dd5362507f9af16f2af81957ab70"
        ),
        rakp_4="0600ff0706150000000000000000140000000000a4a3a2a0f16d0a187d3c35dd38b348f4",
        reply=(
            "0600ff0706c0a4a3a2a00100000020008bb600d05c591585136f511f590378b3"
            "cdc2792948a4a479262c4a34707be4aaffff02075824fae05852b36e32a65420"
        ),
    ),
]


def tagged(datagram: str, tag: int) -> bytes:
    packet = bytearray.fromhex(datagram)
    packet[16] = tag
    return bytes(packet)


def handshake(login: Login, credentials: Credentials = ADMIN) -> Handshake:
    """A try with the random values that ipmitool had, and the tag 0 at first."""
    given_out = collections.deque([b"\x00", bytes.fromhex("a4a3a2a0"), login.random])

    def entropy(size: int) -> bytes:
        value = given_out.popleft() if given_out else os.urandom(size)
        assert size == len(value)
        return value

    return Handshake(
        credentials=credentials,
        suite=login.suite,
        privilege=Privilege.ADMINISTRATOR,
        entropy=entropy,
    )


def until_rakp_2(login: Login, credentials: Credentials = ADMIN) -> Handshake:
    attempt = handshake(login, credentials)
    attempt.start()
    attempt.receive(tagged(login.open_reply, 0))
    return attempt


each_login = pytest.mark.parametrize("login", LOGINS, ids=lambda it: f"suite {it.suite.number}")


@each_login
def test_we_say_byte_for_byte_what_ipmitool_says(login: Login) -> None:
    attempt = handshake(login)
    attempt.start()
    assert tagged(login.rakp_1, 1) == attempt.receive(tagged(login.open_reply, 0))
    assert tagged(login.rakp_3, 2) == attempt.receive(tagged(login.rakp_2, 1))
    session = attempt.receive(tagged(login.rakp_4, 2))
    assert isinstance(session, Session)
    assert session.unseal(bytes.fromhex(login.reply)).hex() == "811c6320043b00049d"
    assert attempt.abandon() is None


@each_login
def test_a_reply_is_delivered_once(login: Login) -> None:
    attempt = until_rakp_2(login)
    attempt.receive(tagged(login.rakp_2, 1))
    session = attempt.receive(tagged(login.rakp_4, 2))
    assert isinstance(session, Session)
    session.unseal(bytes.fromhex(login.reply))
    with pytest.raises(MalformedPacket, match="came before"):
        session.unseal(bytes.fromhex(login.reply))


@each_login
def test_the_wrong_password_is_seen_in_rakp_2_and_the_slot_is_freed(login: Login) -> None:
    attempt = until_rakp_2(login, Credentials(username="admin", password="wrong"))
    with pytest.raises(AuthenticationFailed):
        attempt.receive(tagged(login.rakp_2, 1))
    goodbye = attempt.abandon()
    assert goodbye is not None
    packet = rmcp.decode(goodbye)
    assert packet.payload_type == rmcp.PayloadType.RAKP_3
    assert packet.payload[1] == 0x0F
    assert bytes.fromhex(login.rakp_3)[20:24] == packet.payload[4:8]


@each_login
def test_a_wrong_last_proof_is_an_authentication_failure(login: Login) -> None:
    attempt = until_rakp_2(login)
    attempt.receive(tagged(login.rakp_2, 1))
    forged = bytearray(tagged(login.rakp_4, 2))
    forged[-1] ^= 1
    with pytest.raises(AuthenticationFailed):
        attempt.receive(bytes(forged))


@each_login
def test_a_try_given_up_after_rakp_3_closes_the_session_it_may_have(login: Login) -> None:
    attempt = until_rakp_2(login)
    attempt.receive(tagged(login.rakp_2, 1))
    goodbye = attempt.abandon()
    assert goodbye is not None
    assert rmcp.decode(goodbye).encrypted
    assert rmcp.decode(goodbye).authenticated


@each_login
def test_replies_with_another_tag_or_out_of_turn_change_nothing(login: Login) -> None:
    attempt = handshake(login)
    attempt.start()
    for stale in (
        tagged(login.open_reply, 9),
        tagged(login.rakp_2, 0),
        tagged(login.rakp_4, 0),
        bytes.fromhex(login.reply),
    ):
        with pytest.raises(MalformedPacket):
            attempt.receive(stale)
    assert tagged(login.rakp_1, 1) == attempt.receive(tagged(login.open_reply, 0))


def test_a_reply_to_an_earlier_try_of_ours_is_not_taken() -> None:
    login = LOGINS[0]
    attempt = Handshake(
        credentials=ADMIN,
        suite=login.suite,
        privilege=Privilege.ADMINISTRATOR,
        entropy=lambda size: bytes([0]) if size == 1 else os.urandom(size),
    )
    attempt.start()
    with pytest.raises(MalformedPacket, match="another session"):
        attempt.receive(tagged(login.open_reply, 0))


def test_other_algorithms_than_asked_for_are_refused() -> None:
    sha1 = LOGINS[1].open_reply
    attempt = handshake(LOGINS[0])
    attempt.start()
    with pytest.raises(Downgraded):
        attempt.receive(tagged(sha1, 0))
    assert attempt.abandon() is not None


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (0x01, SessionRefused),
        (0x02, SessionRefused),
        (0x04, SuiteRefused),
        (0x11, SuiteRefused),
        (0x09, AuthenticationFailed),
        (0x0D, AuthenticationFailed),
        (0x77, SessionRefused),
    ],
)
@pytest.mark.parametrize("echoed", [True, False])
def test_a_refusal_of_eight_bytes_says_whose_fault_it_is(
    status: int, error: type[Exception], echoed: bool
) -> None:
    attempt = handshake(LOGINS[0])
    attempt.start()
    console_id = bytes.fromhex("a4a3a2a0") if echoed else bytes(4)
    body = bytes([0, status, 4, 0]) + console_id
    with pytest.raises(error):
        attempt.receive(rmcp.encode_plain(rmcp.PayloadType.OPEN_SESSION_RESPONSE, body))


@given(
    datagrams=st.lists(
        st.one_of(
            st.binary(max_size=80),
            st.tuples(st.sampled_from([0x11, 0x13, 0x15, 0x00, 0xC0]), st.binary(max_size=80)).map(
                lambda it: rmcp.HEADER + struct.pack("<BBIIH", 6, it[0], 0, 0, len(it[1])) + it[1]
            ),
        ),
        max_size=6,
    )
)
def test_no_bytes_crash_a_login_or_log_it_in(datagrams: list[bytes]) -> None:
    attempt = handshake(LOGINS[0])
    attempt.start()
    for datagram in datagrams:
        try:
            step = attempt.receive(datagram)
        except (MalformedPacket, SessionRefused, AuthenticationFailed):
            continue
        assert not isinstance(step, Session)


KEYS = derive_keys(b"k" * 20, rmcp.SUITE_3)


def session() -> Session:
    return Session(keys=KEYS, console_id=7, managed_id=9, entropy=os.urandom)


def reply(sequence: int, message: bytes = b"message") -> bytes:
    return rmcp.encode_sealed(
        message, keys=KEYS, session_id=7, sequence=sequence, vector=os.urandom(16)
    )


class TestSession:
    def test_requests_count_from_one_and_a_retransmit_counts_too(self) -> None:
        talk = session()
        packets = [rmcp.decode(talk.seal(b"the same")) for _ in range(3)]
        assert [packet.sequence for packet in packets] == [1, 2, 3]
        assert len({packet.payload for packet in packets}) == 3

    def test_a_reply_fifteen_ahead_is_taken_and_one_sixteen_ahead_is_not(self) -> None:
        talk = session()
        talk.unseal(reply(100))
        with pytest.raises(MalformedPacket, match="window"):
            talk.unseal(reply(116))
        assert talk.unseal(reply(115)) == b"message"

    def test_a_late_reply_within_sixteen_is_taken_once(self) -> None:
        talk = session()
        talk.unseal(reply(100))
        assert talk.unseal(reply(84)) == b"message"
        with pytest.raises(MalformedPacket, match="came before"):
            talk.unseal(reply(84))
        with pytest.raises(MalformedPacket, match="window"):
            talk.unseal(reply(83))

    def test_a_forged_packet_does_not_move_the_window(self) -> None:
        talk = session()
        talk.unseal(reply(1))
        forged = bytearray(reply(15))
        forged[-1] ^= 1
        with pytest.raises(MalformedPacket, match="authentication code"):
            talk.unseal(bytes(forged))
        assert talk.unseal(reply(2)) == b"message"

    @pytest.mark.parametrize("flags", [0x00, 0x40, 0x80])
    def test_a_packet_that_is_not_encrypted_and_authenticated_is_refused(self, flags: int) -> None:
        packet = bytearray(reply(1))
        packet[5] = flags
        with pytest.raises(MalformedPacket):
            session().unseal(bytes(packet))

    def test_sequence_zero_and_foreign_sessions_are_refused(self) -> None:
        with pytest.raises(MalformedPacket, match="sequence 0"):
            session().unseal(reply(0))
        other = rmcp.encode_sealed(b"m", keys=KEYS, session_id=8, sequence=1, vector=bytes(16))
        with pytest.raises(MalformedPacket, match="another session"):
            session().unseal(other)

    @given(sequences=st.lists(st.integers(1, 60), max_size=60))
    def test_no_sequence_is_ever_delivered_twice(self, sequences: list[int]) -> None:
        talk = session()
        delivered = []
        for sequence in sequences:
            try:
                talk.unseal(reply(sequence))
            except MalformedPacket:
                continue
            delivered.append(sequence)
        assert len(delivered) == len(set(delivered))


class TestCredentials:
    def test_secrets_are_not_in_the_representation(self) -> None:
        text = repr(Credentials(username="admin", password="hunter2", group_key=b"topsecret"))
        assert "hunter2" not in text
        assert "topsecret" not in text

    @pytest.mark.parametrize(
        ("username", "password"), [("u" * 17, "p"), ("u", "p" * 21), ("ü" * 9, "p")]
    )
    def test_what_the_protocol_cannot_carry_is_refused(self, username: str, password: str) -> None:
        with pytest.raises(ValueError, match="at most"):
            Credentials(username=username, password=password)
