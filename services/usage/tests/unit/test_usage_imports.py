"""Lines of files become bodies, and bodies show what they would do, without a service."""

import gzip
import io
import json
import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from hostler_usage.reading import import_cli, imports, rules_cli
from hostler_usage.reading.imports import Format, bodies, format_of
from hostler_usage.reading.message_file import opened
from hostler_usage.testing import LARGE, SMALL, InstanceLife, Step

DAY = datetime(2026, 5, 8, tzinfo=UTC)
HOUR = timedelta(hours=1)
US = 3_600_000_000
DOCUMENT = Path(__file__).parents[4] / "docs" / "usage-mapping.md"
WEB = InstanceLife(
    instance_id="3a513875-95c9-4012-a3e7-f90c678854e5",
    project_id="p-web",
    steps=(
        Step(at=DAY + HOUR, action="create", flavor=SMALL),
        Step(at=DAY + 4 * HOUR, action="resize", flavor=LARGE),
        Step(at=DAY + 9 * HOUR, action="delete"),
    ),
)
BODY = b'{"event_type": "volume.create.end", "message_id": "m", "payload": {"a": "{b}"}}'
NAME = b"oslo.messaging.notification.volume.create.end"
PREFIXES = [
    # logging_context_format_string of oslo.log, plain Python, syslog, a format that says the name only
    b"2026-05-08 01:00:00.123 4242 INFO " + NAME + b" [None req-1 admin - - - - -] ",
    b"INFO:" + NAME + b":",
    b"<14>May  8 01:00:00 ctl1 cinder-volume[4242]: INFO " + NAME + b" [-] ",
    NAME + b" ",
    # a context that holds braces, none of which begins an object
    b"{instance: i1} " + NAME + b" {req-1} ",
    # formats that leave the name out
    b"2026-05-08 01:00:00.123 4242 INFO [-] ",
    b"{req-1} ",
    b"",
]

app = typer.Typer()
import_cli.register(app)
rules_cli.register(app)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(item) for item in arguments])


def shown(*arguments: object) -> Any:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_logged_notification_is_found_behind_whatever_stands_before_it(prefix: bytes) -> None:
    (line,) = bodies([prefix + BODY + b"\n"], Format.LOG)
    assert line == (1, BODY)


def test_a_notification_in_a_log_of_json_is_found() -> None:
    record = {"name": NAME.decode(), "levelname": "INFO", "message": BODY.decode()}
    other = {"name": "nova.compute.manager", "levelname": "INFO", "message": '{"event_type": 1}'}
    lines = [json.dumps(item).encode() + b"\n" for item in (record, other)]
    assert list(bodies(lines, Format.LOG)) == [(1, BODY), (2, None)]
    assert format_of(lines[0]) is Format.LOG


def test_other_lines_of_a_log_are_no_notifications_and_broken_ones_of_the_notifier_are() -> None:
    lines = [
        b"2026-05-08 01:00:00.123 4242 INFO nova.compute.manager [-] Took {1.2} seconds\n",
        b"Traceback (most recent call last):\n",
        b"\n",
        b"2026-05-08 INFO " + NAME + b' [-] {"event_type": "volume.cre\n',
    ]
    assert list(bodies(lines, Format.LOG)) == [
        (1, None),
        (2, None),
        (4, b'{"event_type": "volume.cre'),
    ]


def test_a_line_of_an_archive_is_its_body_byte_for_byte() -> None:
    """Copies are known by their bytes: only the line's end is not the body's."""
    text = b'\xef\xbb\xbf {"a": 1} \r\n\n  \n{"b"\n\xff\xfe\n{"c": 3}'
    lines = text.splitlines(keepends=True)
    assert list(bodies(lines, Format.NDJSON)) == [
        (1, b' {"a": 1} '),
        (4, b'{"b"'),
        (5, b"\xff\xfe"),
        (6, b'{"c": 3}'),
    ]


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        (BODY, Format.NDJSON),
        (b"\xef\xbb\xbf" + BODY, Format.NDJSON),
        (b'{"oslo.version": "2.0", "oslo.message": "{}"}\n', Format.NDJSON),
        (b'{"event_type": "a", "name": "b", "message": "c"}', Format.NDJSON),
        (b'{"broken', Format.NDJSON),
        (PREFIXES[0] + BODY, Format.LOG),
        (b"junk", Format.LOG),
    ],
)
def test_what_a_file_is_shows_in_its_first_line(first: bytes, expected: Format) -> None:
    assert format_of(first) is expected


@given(st.lists(st.binary(max_size=60).map(lambda item: item.replace(b"\n", b"") + b"\n")))
def test_any_bytes_are_lines_of_either_format_and_none_gets_lost(lines: list[bytes]) -> None:
    filled = [
        number
        for number, line in enumerate(lines, start=1)
        if line.strip(b"\xef\xbb\xbf \t\n\r\x0b\x0c")
    ]
    for file_format in Format:
        found = [line.number for line in bodies(lines, file_format)]
        assert set(filled) <= set(found)
        assert found == sorted(set(found))


# --- rules test


@pytest.fixture
def day(tmp_path: Path) -> Path:
    file = tmp_path / "day.ndjson"
    lines = [message.body() for message in WEB.messages()]
    extra = [b"junk", b'{"event_type": "x.y", "timestamp": "2026-05-08 00:00:00", "payload": 1}']
    file.write_bytes(b"\n".join([*lines, *extra]) + b"\n")
    return file


def test_rules_test_shows_what_each_body_says_and_what_all_amount_to(day: Path) -> None:
    answer = shown("rules", "test", day)
    by_type = {one.get("event_type"): one for one in answer["bodies"]}
    launch = by_type["compute.instance.create.end"]
    assert launch["rule"] == {
        "resource_type": "instance",
        "action": "create",
        "edge": "launch",
        "phase": "end",
    }
    (said,) = launch["says"]
    assert said["resource_id"] == WEB.instance_id
    assert said["statement"]["attributes"]["flavor"] == "m1.small"
    assert said["statement"]["operation"]["action"] == "create"
    (observation,) = said["observations"]
    assert (observation["t_eff"], observation["rank"], observation["opens"]) == (
        "2026-05-08T01:00:00+00:00",
        "create",
        True,
    )
    assert answer["bodies"][-2]["quarantine"]["code"] == "usage.notification.not_json"
    assert answer["bodies"][-1]["rule"] is None
    (account,) = answer["resources"]
    # a revert window apart, the flavors' spans are those of the life
    assert account["totals"]["instance_hours"] == 8 * US
    assert account["totals"]["vcpu_hours"] == (3 * 1 + 5 * 4) * US
    assert account["intervals"][-1]["end"] == "2026-05-08T09:00:00+00:00"


def test_rules_test_reads_gzip_and_logs_and_says_the_same(day: Path, tmp_path: Path) -> None:
    plain = shown("rules", "test", day)["resources"]
    log = tmp_path / "nova-compute.log.gz"
    lines = [PREFIXES[0] + message.body("v1") for message in WEB.messages()]
    log.write_bytes(gzip.compress(b"\n".join([*lines, b"something else"])))
    answer = shown("rules", "test", log)
    assert len(answer["bodies"]) == len(lines)
    assert [one["totals"] for one in answer["resources"]] == [one["totals"] for one in plain]


@pytest.mark.parametrize("is_gzip", [False, True])
def test_standard_input_and_pipes_are_plain_or_gzip_as_files_are(
    is_gzip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = gzip.compress(BODY) if is_gzip else BODY
    given = io.BufferedReader(io.BytesIO(data))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(given))
    with opened(Path("-")) as (stream, _):
        assert stream.read() == BODY
    assert not given.closed
    reading, writing = os.pipe()
    os.write(writing, data)
    os.close(writing)
    with opened(Path(f"/dev/fd/{reading}")) as (stream, position):
        assert (stream.read(), position()) == (BODY, 0)
    os.close(reading)


def test_rules_test_is_read_by_people_too(day: Path) -> None:
    result = invoke("rules", "test", day)
    assert result.exit_code == 0
    for words in (
        "would be quarantined: usage.notification.not_json",
        "no rule knows this type",
        "opens from 2026-05-08T01:00:00+00:00 as create",
        "vcpu_hours 23.000000 h",
    ):
        assert words in result.stdout


def test_a_file_that_cannot_be_read_is_a_sentence(tmp_path: Path) -> None:
    cut = tmp_path / "cut.gz"
    cut.write_bytes(gzip.compress(BODY * 100)[:-20])
    for file in (tmp_path / "absent", cut):
        result = invoke("rules", "test", file)
        assert result.exit_code == 1
        assert str(file) in result.stderr.replace("\n", "")


def test_a_wrong_mapping_is_named_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "mapping.yaml"
    file.write_text("measures: {gpu_hours: {resource: instance, attribute: gpus}}\n")
    result = invoke("mapping", "check", file)
    assert result.exit_code == 2
    assert "measures.gpu_hours.attribute" in result.stderr.replace("\n", "")
    assert invoke("mapping", "show", "--mapping", file).exit_code == 2


def test_mapping_show_prints_what_is_read_back_as_the_same_mapping(tmp_path: Path) -> None:
    whole = tmp_path / "whole.yaml"
    whole.write_text(invoke("mapping", "show").stdout)
    with_it = shown("mapping", "show", "--mapping", whole)
    assert with_it == shown("mapping", "show")


# --- the examples of docs/usage-mapping.md


def examples() -> dict[str, dict[str, str]]:
    """By heading, the fenced blocks: the mapping, the bodies, and what they come to."""
    found: dict[str, dict[str, str]] = {}
    for section in DOCUMENT.read_text(encoding="utf-8").split("\n## ")[1:]:
        heading, _, text = section.partition("\n")
        blocks = text.split("\n```")
        for block in blocks[1::2]:
            language, _, content = block.partition("\n")
            found.setdefault(heading.removeprefix("Example: "), {})[language] = content
    return {name: blocks for name, blocks in found.items() if "jsonl" in blocks}


@pytest.mark.parametrize("name", ["Octavia", "GPU flavors", "IOPS by volume type"])
def test_the_examples_of_the_document_do_what_it_says(name: str, tmp_path: Path) -> None:
    blocks = examples()[name]
    mapping, file = tmp_path / "mapping.yaml", tmp_path / "bodies.ndjson"
    mapping.write_text(blocks["yaml"])
    file.write_text(blocks["jsonl"])
    checked = invoke("mapping", "check", mapping)
    assert checked.exit_code == 0, checked.output
    answer = shown("rules", "test", file, "--mapping", mapping)
    assert all(not one["problems"] for one in answer["bodies"])
    said = {
        f"{one['resource_type']} {one['resource_id']}": one["totals"]
        for one in answer["resources"]
    }
    assert said == json.loads(blocks["json"])
    # and without it they are stored, and nothing follows
    assert [one["totals"] for one in shown("rules", "test", file)["resources"]] != list(
        said.values()
    )


def test_the_document_names_every_key_of_a_mapping() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    first = "aliases life attributes kind holds nullable states unborn gone between_segments edges"
    then = "bodies events under rows id at born ended period task failed reason counters reading"
    last = "value each inside label run actions failures measures last_segment sum count join"
    keys = f"{first} {then} {last} present item constant by table fixed each of most".split(" ")
    missing = [key for key in keys if f"`{key}`" not in text]
    assert not missing
    assert imports.LOGGER.decode() in text
