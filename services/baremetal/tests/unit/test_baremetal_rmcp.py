"""Frames, against packets that ipmitool 1.8.19 sealed, and against noise."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostler_baremetal import ipmi_command, rmcp
from hostler_baremetal.ipmi_error import MalformedPacket
from hostler_baremetal.ipmi_session import derive_keys


@dataclasses.dataclass(frozen=True)
class Trace:
    """What `ipmitool -vvvvv` printed of a session: its keys, and packets both ways."""

    suite: rmcp.CipherSuite
    session_key: str
    integrity: str
    request: str
    request_message: str
    reply: str
    reply_message: str


# The first commands of `ipmitool -I lanplus -C <n> -U admin -P secret power status`:
# Set Session Privilege Level and its answer.
TRACES = [
    Trace(
        suite=rmcp.SUITE_17,
        session_key="dd0c2fb7fc8faf63808b9bfb556c07e1a4944f563d7bb4370f0db72fd4ea883b",
        integrity="d431c081859db34e2c665428ef89c01a46c8e5d66289d52600eba4febdf26e31",
        request=(
            "0600ff0706c03673d2d9030000002000c09b6cc2a6f49326ebe1de0ad741b9ef"
            "9989218c755b0930351c383eb79d8720ffff0207d858664993e6cd47e820e5e0fe5fa14c"
        ),
        request_message="2018c881043b043c",
        reply=(
            "0600ff0706c0a4a3a2a001000000200013de8026e375e152004010a3497a65e1"
            "af226a9421431337f141c2e5a671ed9affff02075d6aa574ee66712ecfad05de07aae3a0"
        ),
        reply_message="811c6320043b00049d",
    ),
    Trace(
        suite=rmcp.SUITE_3,
        session_key="f6ce5af8dd04b0ba43c498d6c3753439d3e965ff",
        integrity="7e3c968f5d5699cef6cd397fb8dc81d83b402501",
        request=(
            "0600ff0706c0ff8f099d0300000020006c01d3748bec360798dc1db3ab00ee65"
            "3d984ef101109e97b097430833d51467ffff02075e91fccdc5afaaa4aad0e754"
        ),
        request_message="2018c881043b043c",
        reply=(
            "0600ff0706c0a4a3a2a00100000020008bb600d05c591585136f511f590378b3"
            "cdc2792948a4a479262c4a34707be4aaffff02075824fae05852b36e32a65420"
        ),
        reply_message="811c6320043b00049d",
    ),
]


def keys_of(trace: Trace) -> rmcp.SessionKeys:
    return derive_keys(bytes.fromhex(trace.session_key), trace.suite)


@pytest.mark.parametrize("trace", TRACES, ids=lambda trace: f"suite {trace.suite.number}")
class TestAgainstIpmitool:
    def test_the_keys_derived_from_the_session_key_are_the_same(self, trace: Trace) -> None:
        assert keys_of(trace).integrity == bytes.fromhex(trace.integrity)

    def test_the_same_message_vector_and_sequence_seal_to_the_same_bytes(
        self, trace: Trace
    ) -> None:
        theirs = bytes.fromhex(trace.request)
        ours = rmcp.encode_sealed(
            bytes.fromhex(trace.request_message),
            keys=keys_of(trace),
            session_id=rmcp.decode(theirs).session_id,
            sequence=3,
            vector=theirs[16:32],
        )
        assert theirs.hex() == ours.hex()

    def test_a_reply_opens_to_the_message(self, trace: Trace) -> None:
        datagram = bytes.fromhex(trace.reply)
        packet = rmcp.decode(datagram)
        rmcp.authenticate(datagram, packet, keys_of(trace))
        assert trace.reply_message == rmcp.open_sealed(packet, keys_of(trace)).hex()

    def test_any_flipped_bit_is_found(self, trace: Trace) -> None:
        datagram = bytes.fromhex(trace.reply)
        keys = keys_of(trace)
        for bit in range(8 * 4, 8 * len(datagram)):
            flipped = bytearray(datagram)
            flipped[bit // 8] ^= 1 << bit % 8
            with pytest.raises(MalformedPacket):
                rmcp.authenticate(bytes(flipped), rmcp.decode(bytes(flipped)), keys)


KEYS = derive_keys(b"k" * 32, rmcp.SUITE_17)
suites = st.sampled_from([rmcp.SUITE_3, rmcp.SUITE_17])


@given(
    message=st.binary(max_size=255),
    suite=suites,
    secret=st.binary(min_size=20, max_size=32),
    session_id=st.integers(1, 0xFFFFFFFF),
    sequence=st.integers(1, 0xFFFFFFFF),
    vector=st.binary(min_size=16, max_size=16),
)
def test_what_is_sealed_opens_to_the_same(
    message: bytes,
    suite: rmcp.CipherSuite,
    secret: bytes,
    session_id: int,
    sequence: int,
    vector: bytes,
) -> None:
    keys = derive_keys(secret, suite)
    datagram = rmcp.encode_sealed(
        message, keys=keys, session_id=session_id, sequence=sequence, vector=vector
    )
    packet = rmcp.decode(datagram)
    rmcp.authenticate(datagram, packet, keys)
    assert (session_id, sequence) == (packet.session_id, packet.sequence)
    assert message == rmcp.open_sealed(packet, keys)


@given(
    datagram=st.one_of(st.binary(max_size=120), st.binary(max_size=80).map(rmcp.HEADER.__add__))
)
def test_noise_is_read_or_refused_and_never_crashes(datagram: bytes) -> None:
    try:
        packet = rmcp.decode(datagram)
        rmcp.authenticate(datagram, packet, KEYS)
    except MalformedPacket:
        return
    pytest.fail("noise was taken for authentic")


@given(payload=st.binary(max_size=96))
def test_an_authentic_packet_with_a_wild_payload_is_read_or_refused(payload: bytes) -> None:
    packet = rmcp.Packet(
        payload_type=0,
        encrypted=True,
        authenticated=True,
        session_id=1,
        sequence=1,
        payload=payload,
    )
    try:
        message = rmcp.open_sealed(packet, KEYS)
    except MalformedPacket:
        return
    assert len(message) < len(payload)


@given(message=st.binary(max_size=64))
def test_a_response_is_read_or_refused(message: bytes) -> None:
    try:
        response = rmcp.decode_response(message)
    except MalformedPacket:
        return
    assert len(message) == len(response.data) + 8


def test_a_request_has_the_bytes_of_figure_13_4() -> None:
    # Get Device ID, as `ipmitool -vvvv raw 6 1` prints it
    message = rmcp.encode_request(network_function=6, command=1, sequence=1, data=b"")
    assert message.hex() == "2018c88104017a"


@pytest.mark.parametrize("position", range(3, 8))
def test_a_response_with_a_wrong_checksum_is_refused(position: int) -> None:
    message = bytearray.fromhex("811c6320043b00049d")
    message[position] ^= 0x10
    with pytest.raises(MalformedPacket):
        rmcp.decode_response(bytes(message))


PARSERS = [
    ipmi_command.parse_device_id,
    ipmi_command.parse_system_guid,
    ipmi_command.parse_chassis_status,
    ipmi_command.parse_boot_flags,
]


@pytest.mark.parametrize("parse", PARSERS)
@given(data=st.binary(max_size=40))
def test_an_answer_of_any_length_is_read_or_refused(parse: object, data: bytes) -> None:
    assert callable(parse)
    try:
        parse(data)
    except MalformedPacket:
        assert len(data) < 16


class TestCommands:
    @pytest.mark.parametrize(
        ("device", "persistent", "mode", "expected"),
        [
            (ipmi_command.BootDevice.PXE, False, "legacy", "058004000000"),
            (ipmi_command.BootDevice.PXE, True, "efi", "05e004000000"),
            (ipmi_command.BootDevice.DISK, True, "legacy", "05c008000000"),
            (ipmi_command.BootDevice.BIOS, False, "efi", "05a018000000"),
            (ipmi_command.BootDevice.NONE, False, "legacy", "050000000000"),
        ],
    )
    def test_boot_flags_have_the_bytes_of_table_28_14(
        self,
        device: ipmi_command.BootDevice,
        persistent: bool,
        mode: ipmi_command.BootMode,
        expected: str,
    ) -> None:
        command = ipmi_command.set_boot_flags(device, persistent=persistent, mode=mode)
        assert expected == command.data.hex()
        flags = ipmi_command.parse_boot_flags(b"\x01" + command.data)
        assert (device, persistent, mode) == (flags.device, flags.persistent, flags.mode)

    def test_no_chassis_control_may_be_repeated(self) -> None:
        for action in ipmi_command.ChassisAction:
            assert not ipmi_command.chassis_control(action).repeatable

    def test_a_chassis_status_of_three_bytes_is_enough(self) -> None:
        status = ipmi_command.parse_chassis_status(bytes.fromhex("211000"))
        assert status.power_on
        assert status.restore_policy == "previous"
        assert False is status.fan_fault

    def test_a_chassis_status_of_one_byte_leaves_the_rest_unknown(self) -> None:
        status = ipmi_command.parse_chassis_status(b"\x00")
        assert not status.power_on
        assert status.fan_fault is None

    def test_a_device_id_says_that_the_firmware_is_being_updated(self) -> None:
        device = ipmi_command.parse_device_id(bytes.fromhex("2001821502bf570100341200000000"))
        assert (device.firmware, device.ipmi_version, device.updating) == ("2.15", "2.0", True)
        assert (device.manufacturer_id, device.product_id) == (343, 0x1234)

    @pytest.mark.parametrize("guid", [bytes(16), b"\xff" * 16])
    def test_a_blank_guid_is_none(self, guid: bytes) -> None:
        assert ipmi_command.parse_system_guid(guid) is None
