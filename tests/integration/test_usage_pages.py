"""The pages of usage in a real browser: charts are drawn from their tables, and buttons do what they say.

A page that breaks its own content security policy, or whose script fails, fails the test that looked at it.
"""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from hostler_common import auth, client
from hostler_common.browser_testing import (
    COLOURS,
    COLUMNS,
    OpenTab,
    open_browser,
    pixels,
    sign_in,
)
from hostler_common.testing import RunningService, RunService, eventually
from hostler_usage.service_testing import RunUsage, runner, send
from hostler_usage.testing import (
    LARGE,
    MEDIUM,
    SMALL,
    InstanceLife,
    Message,
    Step,
    VolumeLife,
    VolumeStep,
)

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
NOW = datetime.now(UTC).replace(microsecond=0)
PROJECTS = ("analytics", "webshop", "research")


# --- the cloud


def lives(days: int = 4) -> tuple[list[InstanceLife], list[VolumeLife]]:
    """Instances and volumes of three projects, up to now: resizes, stops, deletes."""
    born = (NOW - days * DAY).replace(minute=0, second=0)
    instances = []
    for number in range(6):
        start = born + number * 3 * HOUR
        steps = [Step(at=start, action="create", flavor=(SMALL, MEDIUM, LARGE)[number % 3])]
        if number % 2:
            steps.append(Step(at=start + 20 * HOUR, action="resize", flavor=LARGE))
        if number % 3 == 0:
            steps.append(Step(at=start + 30 * HOUR, action="stop"))
            steps.append(Step(at=start + 40 * HOUR, action="start"))
        if number == 4:
            steps.append(Step(at=start + 50 * HOUR, action="delete"))
        instances.append(
            InstanceLife(
                instance_id=f"00000000-0000-4000-8000-{number:012}",
                project_id=PROJECTS[number % 3],
                steps=tuple(steps),
                host=f"cmp-{number:03}",
            )
        )
    volumes = [
        VolumeLife(
            volume_id="00000000-0000-4000-9000-000000000001",
            project_id="webshop",
            steps=(
                VolumeStep(at=born, action="create", size_gb=20),
                VolumeStep(at=born + 24 * HOUR, action="extend", size_gb=50),
            ),
        )
    ]
    return instances, volumes


def messages(days: int = 4) -> list[Message]:
    until = NOW - HOUR
    instances, volumes = lives(days)
    sent = [m for life in instances for m in life.messages(audits_until=until)]
    return sent + [m for life in volumes for m in life.messages(audits_until=until)]


FAILED = Message(
    topic="notifications",
    event_type="compute.instance.resize.error",
    publisher_id="compute.cmp-001",
    timestamp=NOW - 2 * HOUR,
    message_id="11111111-1111-4111-8111-111111111111",
    priority="ERROR",
    payload={
        "tenant_id": "webshop",
        "instance_id": "00000000-0000-4000-8000-000000000001",
        "message": "No space left",
    },
)


@pytest.fixture
def run_usage(run_service: RunService) -> RunUsage:
    return runner(run_service)


@pytest_asyncio.fixture
async def browser() -> AsyncIterator[OpenTab]:
    async with open_browser() as opened:
        yield opened


async def folded(api: client.Api, events: int) -> None:
    """Return when all are stored and folded."""

    async def holds() -> bool:
        usage = await api.get(
            "/v1/usage",
            start=(NOW - 60 * DAY).isoformat(),
            end=(NOW + DAY).isoformat(),
            group_by="project",
        )
        metrics = await api.get("/metrics")
        stored = sum(
            float(line.rpartition(" ")[2])
            for line in metrics.splitlines()
            if line.startswith("hostler_usage_notifications_total") and 'outcome="stored"' in line
        )
        return usage["unfolded_resources"] == 0 and stored >= events

    await eventually(holds)


INSTANCE = "00000000-0000-4000-8000-000000000001"


async def fold_all(service: RunningService, amqp_url: str) -> None:
    sent = [*messages(), FAILED]
    await send(amqp_url, [message.body() for message in sent])
    await folded(service.api, len(sent))


async def test_bars_are_as_large_as_the_numbers_in_the_table(
    run_usage: RunUsage, amqp_url: str, browser: OpenTab
) -> None:
    async with run_usage() as service:
        await fold_all(service, amqp_url)

        async def vcpu_hours() -> dict[str, float]:
            usage = await service.api.get(
                "/v1/usage",
                start=NOW.replace(day=1, hour=0, minute=0, second=0).isoformat(),
                end=(NOW + DAY).isoformat(),
                group_by="project",
            )
            return {row["group"]["project"]: row["hours"]["vcpu_hours"] for row in usage["usage"]}

        for dark in (False, True):
            before = await vcpu_hours()
            async with browser(dark=dark) as tab:
                await tab.go(f"{service.url}/?measure=vcpu_hours&month={NOW:%Y-%m}")
                (areas,) = await tab.evaluate(COLOURS)
                columns = await tab.evaluate(COLUMNS)
            after = await vcpu_hours()
            assert sorted(columns) == sorted(before) == sorted(PROJECTS)
            whole = sum(column["sum"] for column in columns.values())
            painted = sum(areas[column["colour"]] for column in columns.values())
            for name, column in columns.items():
                assert before[name] - 1e-6 <= column["sum"] <= after[name] + 1e-6  # time went on
                share = areas[column["colour"]] / painted
                assert share == pytest.approx(column["sum"] / whole, abs=0.03), (areas, columns)


async def test_every_chart_has_its_table_and_every_page_keeps_its_security_policy(
    run_usage: RunUsage, amqp_url: str, browser: OpenTab
) -> None:
    async with run_usage() as service:
        await fold_all(service, amqp_url)
        event = (await service.api.get("/v1/events", limit=1))["events"][0]["id"]
        charts = {
            "/": 1,
            "/projects": 0,
            "/projects/webshop": 1,
            f"/resources/instance/{INSTANCE}": 1,
            "/audits": 1,
            "/operations": 1,
            "/events": 0,
            f"/events/{event}": 0,
            "/quarantine": 0,
            "/explain?measure=vcpu_hours&project=webshop": 0,
            "/price-books": 0,
        }
        for path, count in charts.items():
            async with browser() as tab:
                await tab.go(service.url + path)
                assert await tab.evaluate("document.querySelectorAll('canvas').length") == count
                tables = await tab.evaluate(
                    "document.querySelectorAll('figure table.drawn').length"
                )
                assert tables == count, path
                for areas in await tab.evaluate(COLOURS):
                    assert len(areas) > 1, path
                width = await tab.evaluate(
                    "document.documentElement.scrollWidth - document.documentElement.clientWidth"
                )
                assert width == 0, path  # wide tables scroll by themselves


async def test_a_click_on_a_number_shows_its_intervals_and_a_click_on_a_message_its_body(
    run_usage: RunUsage, amqp_url: str, browser: OpenTab
) -> None:
    async with run_usage() as service:
        await fold_all(service, amqp_url)
        async with browser() as tab:
            await tab.go(f"{service.url}/projects/analytics")
            number = await tab.evaluate("document.querySelector('td a.why').innerText")
            await tab.act("document.querySelector('td a.why').click()")
            heading = await tab.evaluate("document.querySelector('h1').innerText")
            assert heading.startswith(f"{number} ")
            parts = await tab.evaluate(
                "[...document.querySelectorAll('#parts tbody tr')].map(row =>"
                " [...row.querySelectorAll('td.number')].map(cell => Number(cell.innerText)))"
            )
            assert parts
            for hours, quantity, product in parts:
                assert abs(hours * quantity - product) < 0.011 * max(1, quantity)
            assert abs(sum(part[-1] for part in parts) - float(number)) < 0.01 * len(parts) + 0.01
            # the message that is cited opens where the eye is, its body with it
            cited = "document.querySelector('#parts a.cite')"
            await tab.evaluate(f"{cited}.click()")
            body = await tab.evaluate(
                "document.querySelector(location.hash).closest('details[open]').innerText"
            )
            assert await tab.evaluate(f"{cited}.title.split(' ').pop()") in body
            assert '"oslo.message"' in body


async def test_a_resources_intervals_are_drawn_to_scale_and_its_events_lead_to_their_messages(
    run_usage: RunUsage, amqp_url: str, browser: OpenTab
) -> None:
    async with run_usage() as service:
        await fold_all(service, amqp_url)
        history = await service.api.get(f"/v1/resources/instance/{INSTANCE}/intervals")
        events = await service.api.get("/v1/events", resource_id=INSTANCE, limit=1000)
        async with browser() as tab:
            await tab.go(f"{service.url}/resources/instance/{INSTANCE}")
            bars = await tab.evaluate(
                "[...document.querySelectorAll('[data-lane=state] a')].map(bar =>"
                " ({width: bar.querySelector('rect').width.baseVal.value,"
                "   hint: bar.querySelector('title').textContent}))"
            )
            flavors = await tab.evaluate(
                "[...document.querySelectorAll('[data-lane=flavor] title')].map(t => t.textContent)"
            )
            assert [text.split(",")[0] for text in flavors] == ["m1.medium", "m1.large"]
            rows = await tab.evaluate("document.querySelectorAll('#intervals tbody tr').length")
            assert rows == len(history["intervals"])
            whole = history["intervals"][0]["start"], history["intervals"][-1]["end"]
            assert whole[1] is None  # it lasts
            held = NOW - datetime.fromisoformat(whole[0])
            width = sum(bar["width"] for bar in bars)
            picture = await tab.evaluate(
                "document.querySelector('.timeline').viewBox.baseVal.width"
            )
            # 2 % of the window are room before its birth
            assert width == pytest.approx((picture - 110) / 1.02, rel=0.02), (held, bars)
            marks = await tab.evaluate("document.querySelectorAll('.timeline .mark').length")
            assert marks == len(events["events"])
            error = await tab.evaluate(
                "document.querySelector('.timeline .mark.error').parentNode"
                ".querySelector('title').textContent"
            )
            assert error.startswith("compute.instance.resize.error, ")
            await tab.act(
                "document.querySelector('.timeline .mark.error').dispatchEvent("
                "new MouseEvent('click', {bubbles: true}))"
            )
            text = await tab.text()
            assert "compute.instance.resize.error" in text
            assert "No space left" in text  # its body
            await tab.go(f"{service.url}/resources/instance/{INSTANCE}")
            cited = history["intervals"][0]["opened_by"][0]["message_id"]
            await tab.act("document.querySelector('#interval-1 a.cite').click()")
            assert cited in await tab.text()


async def test_without_scripts_the_tables_are_open_and_the_timeline_is_drawn(
    run_usage: RunUsage, amqp_url: str, browser: OpenTab
) -> None:
    async with run_usage() as service:
        await fold_all(service, amqp_url)
        async with browser(scripts=False) as tab:
            await tab.go(f"{service.url}/resources/instance/{INSTANCE}")
            found = await tab.call("DOM.getDocument", depth=-1)
            root = found["root"]["nodeId"]

            async def count(selector: str) -> int:
                nodes = await tab.call("DOM.querySelectorAll", nodeId=root, selector=selector)
                return len(nodes["nodeIds"])

            assert await count("canvas") == 0
            assert await count("details[open] table.drawn td[data-value]") > 0
            assert await count(".timeline [data-lane=state] rect") > 0
            picture = await tab.picture()
        _, height, rows = pixels(picture)
        assert len({bytes(row) for row in rows}) > height // 10  # there is something on it


async def test_an_operator_signs_in_and_replays_and_discards_by_the_buttons(
    run_usage: RunUsage, amqp_url: str, tmp_path: Path, browser: OpenTab
) -> None:
    tokens = tmp_path / "tokens"
    issued = {
        name: auth.new_token(name=name, role=role, projects=projects)
        for name, role, projects in (
            ("admin", auth.Role.ADMIN, "*"),
            ("operator", auth.Role.OPERATOR, "*"),
            ("alice", auth.Role.READER, "webshop"),
        )
    }
    tokens.write_text("\n".join(line for _, line in issued.values()))
    secrets = {name: token for name, (token, _) in issued.items()}
    settings = {"auth_mode": "token", "auth_tokens_file": tokens}
    async with (
        run_usage(**settings) as service,
        client.open_api(service.url, token=secrets["admin"]) as api,
    ):
        await send(amqp_url, [b"not json", b'{"oslo.version": "3.0", "oslo.message": ""}'])

        async def entries() -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = (await api.get("/v1/quarantine"))["entries"]
            return found

        async def both() -> Any:
            found = await entries()
            return len(found) == 2 and found

        first, second = await eventually(both)

        async with browser() as tab:
            await sign_in(tab, f"{service.url}/quarantine", secrets["operator"])
            text = await tab.text()
            assert "usage.notification.not_json" in text
            assert "Discard" not in text  # that is for admins, as in the API
            await tab.go(f"{service.url}/quarantine/{first['id']}")
            assert "not json" in await tab.text()
            await tab.act("document.querySelector('form[action$=\"/replay\"] button').click()")
            assert "on its way to its queue again" in await tab.text()

            async def back() -> Any:
                found = [entry for entry in await entries() if entry["id"] > second["id"]]
                return found if len(await entries()) == 2 else None

            (again,) = await eventually(back)
            assert again["code"] == first["code"]  # still not JSON
            assert again["queue"] == first["queue"]

            await sign_in(tab, f"{service.url}/quarantine", secrets["admin"])
            discard = f"document.querySelector('form[action=\"/quarantine/{again['id']}/discard\"] button')"
            tab.answers_dialogs = False
            await tab.evaluate(f"{discard}.click()")
            assert tab.dialogs == [f"Forget message {again['id']} for ever?"]
            assert len(await entries()) == 2  # not meant
            tab.answers_dialogs = True
            await tab.act(f"setTimeout(() => {discard}.click())")
            assert "The message is gone" in await tab.text()
        assert [entry["id"] for entry in await entries()] == [second["id"]]

        async with browser() as tab:
            await sign_in(tab, f"{service.url}/", secrets["alice"])
            text = await tab.text()
            assert "Ingest" not in text
            await tab.go(f"{service.url}/quarantine")
            assert "auth.forbidden" in await tab.text()
            tab.complaints.clear()  # the 403 itself


async def test_another_sites_form_changes_nothing(
    run_usage: RunUsage, amqp_url: str, browser: OpenTab
) -> None:
    async with run_usage() as service:  # without authentication there is nothing else in the way
        await send(amqp_url, [b"not json"])

        async def one() -> Any:
            return (await service.api.get("/v1/quarantine"))["entries"]

        (entry,) = await eventually(one)
        action = f"{service.url}/quarantine/{entry['id']}/discard"
        async with browser() as tab:
            await tab.go(
                f"data:text/html,<form method=post action={action}><button>win</button></form>"
            )
            await tab.act("document.querySelector('button').click()")
            assert "usage.page.other_site" in await tab.text()
            tab.complaints.clear()  # the 403 itself
        assert len(await one()) == 1
