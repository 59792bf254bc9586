"""Names, hashes and calls that come from outside are taken as they should be, or refused."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostler_precache import envelope, images
from hostler_precache.placing import placement
from hostler_precache.transfer.manifest import ImageId


@pytest.mark.parametrize(
    "text",
    ["", ".", "..", ".hidden", "a/b", "../x", "a\0b", "a\n", "a b", "-x", "x" * 129, "é", "%2e"],
)
def test_what_could_be_a_path_is_no_image_id(text: str) -> None:
    with pytest.raises(ValueError):
        images.image_id(text)


@given(st.from_regex(images.IMAGE_ID_PATTERN.rstrip("$") + r"\Z"))
def test_an_image_id_is_a_file_name_in_the_directory_and_nowhere_else(text: str) -> None:
    directory = Path("/images")
    target = placement.target(directory, "{image_id}", images.image_id(text))
    assert target.parent == directory
    assert target.resolve() == target


def test_the_default_name_is_the_one_that_nova_looks_for() -> None:
    # nova/virt/libvirt/imagecache.py, get_cache_fname: sha1 of the id, hexadecimal
    image = ImageId("155d900f-4e14-4e4c-a73d-069cbf4541e6")
    target = placement.target(Path("/_base"), placement.NOVA_TEMPLATE, image)
    assert str(target) == "/_base/f2d1a8250ed3d4b744a8250dab8f6840179d502a"


@pytest.mark.parametrize(
    "template",
    ["", "image", "{}", "{0}", "{image_id.x}", "{image_id!r}", "{sha1:>9}", "a/{sha1}", ".{sha1}",
     "{sha1", "{other}"],
)  # fmt: skip
def test_a_template_that_names_no_file_of_its_own_is_refused(template: str) -> None:
    with pytest.raises(ValueError):
        placement.check_template(template)


def test_the_best_that_a_source_says_of_its_bytes_is_taken() -> None:
    sha512, md5 = "AB" * 64, "cd" * 16
    best = images.source_hash("sha512", sha512, md5)
    assert best == images.SourceHash(algorithm="sha512", value="ab" * 64)
    assert best.verification is images.Verification.HASH
    weak = images.source_hash(None, None, md5)
    assert weak == images.SourceHash(algorithm="md5", value=md5)
    assert weak.verification is images.Verification.CHECKSUM
    assert images.source_hash(None, None, None) is None
    assert images.source_hash("sha512", None, "") is None


@pytest.mark.parametrize(
    ("algorithm", "value"),
    [
        ("md4", "00" * 16),
        ("sha512", "00" * 32),
        ("sha256", "zz" * 32),
        ("sha256", "00" * 31 + "0"),
    ],
)
def test_a_hash_that_is_not_one_is_refused(algorithm: str, value: str) -> None:
    with pytest.raises(ValueError):
        images.source_hash(algorithm, value, None)


CALL = envelope.CacheCall(image_id="debian", meta={"blob_id": "1", "seeds": ["http://x"]})


def test_a_call_comes_back_from_the_wire_as_it_was() -> None:
    body = envelope.pack(CALL, unique_id="7")
    assert envelope.unpack(body) == CALL
    outer = json.loads(body)
    assert outer["oslo.version"] == "2.0"
    inner = json.loads(outer["oslo.message"])
    assert (inner["method"], inner["version"], inner["_unique_id"]) == ("cache", "1.0", "7")
    assert "namespace" not in inner


def test_a_call_with_too_much_meta_is_not_sent() -> None:
    with pytest.raises(envelope.EnvelopeError, match="2048"):
        envelope.pack(envelope.CacheCall(image_id="x", meta={"x": "y" * 2048}), unique_id="7")


@pytest.mark.parametrize(
    "inner",
    [
        {"method": "other", "args": {}},
        {"method": "cache", "args": {"image_id": "x", "meta": {}}, "version": "2.0"},
    ],
)
def test_calls_that_are_not_ours_are_left_alone(inner: dict[str, object]) -> None:
    assert envelope.unpack(json.dumps({"oslo.message": json.dumps(inner)}).encode()) is None


def test_an_older_call_without_an_envelope_is_understood() -> None:
    inner = {"method": "cache", "args": {"image_id": "x", "meta": {}}, "version": "1.3"}
    assert envelope.unpack(json.dumps(inner).encode()) == envelope.CacheCall(image_id="x", meta={})


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"7", b"null", b"{}", b'{"oslo.message": 7}', b'{"oslo.message": "x"}',
     b'{"method": "cache"}', b'{"method": "cache", "args": {"image_id": 1, "meta": {}}}',
     b'{"method": "cache", "args": {"image_id": "x", "meta": []}}', b"\xff", b"[" * 10**5],
)  # fmt: skip
def test_what_is_no_call_is_refused(body: bytes) -> None:
    with pytest.raises(envelope.EnvelopeError):
        envelope.unpack(body)
