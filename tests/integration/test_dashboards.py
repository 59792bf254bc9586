"""What the dashboards ask Prometheus for is what the services measure, by name and by label."""

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DASHBOARDS = sorted((ROOT / "deploy/grafana/provisioning/dashboards").glob("*.json"))
# what Prometheus and its client's process collector add
GIVEN = {"instance", "job"}
PROCESS = {"process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds"}
_ENDINGS = {
    "Counter": ("_total",),
    "Gauge": ("",),
    "Histogram": ("_bucket", "_count", "_sum"),
}
_WORDS = {"by", "without", "on", "ignoring", "group_left", "group_right", "and", "or", "unless"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A series that a dashboard asks for, and the labels by which it is chosen or summed up."""

    name: str
    labels: frozenset[str]


def measured() -> dict[str, frozenset[str]]:
    """The labels of every series that the code makes, by name: from its own calls of prometheus_client."""
    found = {name: frozenset(GIVEN) for name in PROCESS}
    for path in [
        *ROOT.glob("libs/*/hostler_*/**/*.py"),
        *ROOT.glob("services/*/hostler_*/**/*.py"),
    ]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                continue
            if node.func.id not in _ENDINGS or not any(k.arg == "registry" for k in node.keywords):
                continue
            name = ast.literal_eval(node.args[0])
            labels = set(ast.literal_eval(node.args[2])) if len(node.args) > 2 else set()
            for ending in _ENDINGS[node.func.id]:
                more = {"le"} if ending == "_bucket" else set()
                found[name + ending] = frozenset(labels | more | GIVEN)
    return found


def series(expression: str) -> Iterator[Asked]:
    """The series that a PromQL expression names; labels after `by` are those of every one of them."""
    grouped = {
        label.strip()
        for labels in re.findall(r"\b(?:by|without|on)\s*\(([^)]*)\)", expression)
        for label in labels.split(",")
    }
    plain = re.sub(r"\b(?:by|without|on)\s*\([^)]*\)", " ", expression)
    plain = re.sub(r"\[[^\]]*\]", " ", plain)
    pattern = r'([a-zA-Z_:][a-zA-Z0-9_:]*)\s*(\{(?:[^}"]|"[^"]*")*\})?(\s*\()?'
    for name, matchers, is_call in re.findall(pattern, plain):
        if not is_call and name not in _WORDS:
            chosen = re.findall(r'([a-zA-Z_][a-zA-Z0-9_]*)\s*(?:=~|!~|!=|=)\s*"', matchers)
            yield Asked(name=name, labels=frozenset({*chosen, *grouped}))


def panels(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())["panels"]
    return found


def test_expressions_are_read_as_prometheus_reads_them() -> None:
    assert set(
        series('sum by (a, le) (rate(x_bucket{b="c{d}",e=~"f"}[$__rate_interval])) / y')
    ) == {
        Asked(name="x_bucket", labels=frozenset({"a", "le", "b", "e"})),
        Asked(name="y", labels=frozenset({"a", "le"})),
    }


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_series_of_a_dashboard_is_measured(path: Path) -> None:
    known = measured()
    asked = [
        one
        for panel in panels(path)
        for target in panel.get("targets", [])
        for one in series(target["expr"])
    ]
    assert len(asked) > 5
    assert {one.name for one in asked} - known.keys() == set()
    assert [one for one in asked if not one.labels <= known[one.name]] == []


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_the_panels_of_a_dashboard_have_room_and_say_what_they_show(path: Path) -> None:
    found = panels(path)
    assert len({panel["id"] for panel in found}) == len(found)
    for panel in found:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        if panel["type"] != "row":
            assert panel["description"]
            assert panel["fieldConfig"]["defaults"]["unit"]
            assert all(target["legendFormat"] for target in panel["targets"])
    for one, other in combinations((panel["gridPos"] for panel in found), 2):
        assert (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        ), (one, other)


def test_grafana_finds_the_dashboards_and_they_differ() -> None:
    (provider,) = yaml.safe_load((DASHBOARDS[0].parent / "hostler.yml").read_text())["providers"]
    mounted = "./deploy/grafana/provisioning:/etc/grafana/provisioning:ro"
    assert mounted in (ROOT / "docker-compose.yml").read_text()
    assert provider["options"]["path"] == "/etc/grafana/provisioning/dashboards"
    uids = [json.loads(path.read_text())["uid"] for path in DASHBOARDS]
    assert len(set(uids)) == len(uids) > 0
