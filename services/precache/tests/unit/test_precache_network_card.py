"""What a network card can do: its address is asked of the real kernel, its speed of files like those of /sys."""

from pathlib import Path

import pytest

from hostler_precache.transfer import network_card


def card(directory: Path, speed: str) -> Path:
    """The files of a loopback card whose driver says that."""
    (directory / "lo" / "device").mkdir(parents=True)
    (directory / "lo" / "speed").write_text(speed)
    return directory


@pytest.mark.parametrize("url", ["http://127.0.0.1:8310", "https://localhost:8312"])
def test_the_card_that_has_the_address_says_what_it_can_do(tmp_path: Path, url: str) -> None:
    assert network_card.bytes_per_second(url, cards=card(tmp_path, "25000\n")) == 3_125_000_000


@pytest.mark.parametrize(("kind", "expected"), [("bond", 125_000_000), ("wlan", None)])
def test_a_card_without_hardware_is_believed_if_it_is_made_of_some(
    tmp_path: Path, kind: str, expected: int | None
) -> None:
    (card(tmp_path, "1000\n") / "lo" / "device").rmdir()
    (tmp_path / "lo" / "uevent").write_text(f"DEVTYPE={kind}\nINTERFACE=lo\nIFINDEX=1\n")
    assert network_card.bytes_per_second("http://127.0.0.1", cards=tmp_path) == expected


@pytest.mark.parametrize("speed", ["-1\n", "", "unknown"])
def test_a_card_that_does_not_say_what_it_can_do_is_not_guessed(
    tmp_path: Path, speed: str
) -> None:
    assert network_card.bytes_per_second("http://127.0.0.1", cards=card(tmp_path, speed)) is None


@pytest.mark.parametrize(
    "url",
    ["http://192.0.2.1", "http://[::1]:8310", "http://no-such-host.invalid", "8310", "http://["],
)
def test_an_address_that_is_not_on_a_card_of_this_host_has_no_rate(
    tmp_path: Path, url: str
) -> None:
    assert network_card.bytes_per_second(url, cards=card(tmp_path, "1000")) is None


def test_a_card_of_which_there_is_no_file_has_no_rate(tmp_path: Path) -> None:
    assert network_card.bytes_per_second("http://127.0.0.1", cards=tmp_path) is None
