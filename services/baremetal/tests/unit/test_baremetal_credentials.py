"""Secrets at rest."""

from base64 import b64encode
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostler_baremetal.credentials import KeyFileError, Unopenable, Vault, new_key_line


def vault(*lines: str, directory: Path) -> Vault:
    path = directory / "keys"
    path.write_text("# keys of baremetal\n" + "\n".join(lines) + "\n")
    return Vault.read(path)


@given(secret=st.binary(max_size=40), owner=st.text(max_size=20))
def test_what_is_sealed_opens_for_its_owner(secret: bytes, owner: str) -> None:
    sealing = Vault({"k1": bytes(32)})
    sealed = sealing.seal(secret, belongs_to=owner)
    assert sealing.open(sealed, belongs_to=owner) == secret
    assert len(secret) < 4 or secret not in sealed


def test_a_value_moved_to_another_node_does_not_open() -> None:
    sealing = Vault({"k1": bytes(32)})
    sealed = sealing.seal("secret", belongs_to="node-1/password")
    with pytest.raises(Unopenable, match="of another node"):
        sealing.open(sealed, belongs_to="node-2/password")


@given(noise=st.binary(max_size=80))
def test_noise_does_not_open_and_does_not_crash(noise: bytes) -> None:
    with pytest.raises(Unopenable):
        Vault({"k1": bytes(32)}).open(noise, belongs_to="node")


def test_a_new_key_in_front_seals_and_the_old_one_still_opens(tmp_path: Path) -> None:
    old, new = new_key_line("2025"), new_key_line("2026")
    sealed = vault(old, directory=tmp_path).seal("secret", belongs_to="n")
    both = vault(new, old, directory=tmp_path)
    assert both.open(sealed, belongs_to="n") == b"secret"
    resealed = both.seal("secret", belongs_to="n")
    assert vault(new, directory=tmp_path).open(resealed, belongs_to="n") == b"secret"
    with pytest.raises(Unopenable, match="no key '2025'"):
        vault(new, directory=tmp_path).open(sealed, belongs_to="n")


NO_NAME = ":" + b64encode(bytes(32)).decode()


@pytest.mark.parametrize("line", ["k1", "k1:", "k1:????", "k1:c2hvcnQ=", NO_NAME])
def test_a_wrong_line_is_named_by_number_and_not_by_content(line: str, tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="line 2") as refused:
        vault(line, directory=tmp_path)
    assert line not in str(refused.value) or line == "k1"


def test_a_file_without_a_key_or_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError):
        vault(directory=tmp_path)
    with pytest.raises(KeyFileError):
        Vault.read(tmp_path / "missing")
