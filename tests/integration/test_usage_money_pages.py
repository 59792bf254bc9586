"""The pages of costs, budgets and periods in a real browser: they say what the API says, and draw what they say."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from hostler_common import auth, client, db
from hostler_common.browser_testing import (
    COLOURS,
    COLUMNS,
    OpenTab,
    Tab,
    open_browser,
    sign_in,
)
from hostler_common.testing import RunningService, RunService, eventually
from hostler_usage.history.rollup_store import RollupStore
from hostler_usage.periods.period_jobs import PeriodJobs
from hostler_usage.periods.period_store import PeriodStore
from hostler_usage.reading.mapping_file import packaged
from hostler_usage.service_testing import RunUsage, runner, send
from hostler_usage.settings import Settings
from hostler_usage.testing import LARGE, SMALL, InstanceLife, Message, Step

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
# a month that is over: what it costs no longer grows
MONTH = (
    datetime.now(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0) - DAY
).replace(day=1)
WINDOW = {"start": MONTH.isoformat(), "end": (MONTH + 31 * DAY).replace(day=1).isoformat()}
BOOK: dict[str, Any] = {
    "currency": "EUR",
    "public": True,
    "free": ["vcpu_hours", "local_gb_hours", "fixed_ip_hours"],
    "prices": [
        {
            "name": "large",
            "measure": "instance_hours",
            "match": {"flavor": "m1.large"},
            "price": "0.08",
        },
        {"name": "other", "measure": "instance_hours", "price": "0.02"},
    ],
    "discounts": [{"name": "friends", "percent": 25, "match": {"project": "webshop"}}],
}


def life(number: int, project: str, hours: int) -> InstanceLife:
    start = MONTH + number * DAY
    return InstanceLife(
        instance_id=f"00000000-0000-4000-8000-{number:012}",
        project_id=project,
        steps=(
            Step(at=start, action="create", flavor=SMALL),
            Step(at=start + 5 * HOUR, action="resize", flavor=LARGE),
            Step(at=start + hours * HOUR, action="delete"),
        ),
    )


LIVES = (
    life(1, "webshop", 60),
    life(2, "webshop", 30),
    life(3, "research", 40),
    life(4, "<b>", 9),
)
LATE = LIVES[3].messages()[-4:]  # all that says it was deleted
MESSAGES = [message for one in LIVES for message in one.messages() if message not in LATE]


@pytest.fixture
def run_usage(run_service: RunService) -> RunUsage:
    return runner(run_service)


@pytest_asyncio.fixture
async def browser() -> AsyncIterator[OpenTab]:
    async with open_browser() as opened:
        yield opened


async def fold(api: client.Api, amqp_url: str, messages: list[Message], stored: int) -> None:
    """The messages are sent and folded; so many are stored by then."""
    await send(amqp_url, [message.body() for message in messages])

    async def holds() -> bool:
        events = (await api.get("/v1/events", limit=1000))["events"]
        usage = await api.get("/v1/usage", **WINDOW)
        return len(events) == stored and usage["unfolded_resources"] == 0

    await eventually(holds, seconds=60)


async def turn_periods(service: RunningService) -> None:
    """What the service does every minute, at once."""
    settings = service.settings
    assert isinstance(settings, Settings)
    url = settings.database_url.get_secret_value()
    async with db.open_pool(url, schema="usage") as pool:
        store = PeriodStore(
            pool=pool,
            mapping=packaged(),
            time_zone=settings.period_time_zone,
            settle=timedelta(days=settings.period_settle_days),
            kinds=settings.period_kinds,
        )
        await RollupStore(pool=pool, mapping=packaged()).advance(datetime.now(UTC))
        await PeriodJobs(store=store).turn()


async def rows(tab: Tab, table: str) -> list[list[str]]:
    found: list[list[str]] = await tab.evaluate(
        f"[...document.querySelectorAll('#{table} tbody tr')]"
        ".map(row => [...row.cells].map(cell => cell.innerText.trim()))"
    )
    return found


async def canvases(tab: Tab) -> tuple[int, int, int]:
    """Charts that are drawn, tables they are drawn from, and how much wider than the window the page is."""
    found = await tab.evaluate(
        "[document.querySelectorAll('canvas').length,"
        " document.querySelectorAll('figure table.drawn').length,"
        " document.documentElement.scrollWidth - document.documentElement.clientWidth]"
    )
    return (found[0], found[1], found[2])


async def test_costs_are_the_apis_and_bars_are_as_large_as_the_numbers(
    run_usage: RunUsage, amqp_url: str, browser: OpenTab
) -> None:
    async with run_usage() as service:
        await fold(service.api, amqp_url, MESSAGES, len(MESSAGES))
        async with browser() as tab:
            await tab.go(f"{service.url}/costs")
            text = await tab.text()
            assert "There is no price book default" in text
            assert "hostler-usage prices put default" in text
            await service.api.put("/v1/price-books/default", BOOK)
            costs = await service.api.get("/v1/costs", **WINDOW, group_by="project")
            await tab.go(f"{service.url}/costs?month={MONTH:%Y-%m}")
            text = await tab.text()
            assert f"{costs['total']['cost']} EUR" in text
            assert f"{costs['total']['list_cost']} EUR" in text
            assert "What these cost is not known" in text  # RAM has no price
            assert {(row[0], row[1], row[2]) for row in await rows(tab, "costs")} == {
                (row["group"]["project"], row["cost"], row["list_cost"]) for row in costs["costs"]
            }
            charges = {(one["price"], one["cost"]) for one in costs["total"]["charges"]}
            assert {(row[0], row[3]) for row in await rows(tab, "charges")} == charges
            assert await canvases(tab) == (1, 1, 0)
            (areas,) = await tab.evaluate(COLOURS)
            columns = await tab.evaluate(COLUMNS)
            for row in costs["costs"]:
                exact = float(Fraction(row["cost_exact"]))
                column = columns[row["group"]["project"]]
                assert column["sum"] == pytest.approx(exact)
            whole = sum(column["sum"] for column in columns.values())
            painted = sum(areas.get(column["colour"], 0) for column in columns.values())
            for column in columns.values():
                share = areas.get(column["colour"], 0) / painted
                assert share == pytest.approx(column["sum"] / whole, abs=0.03), (areas, columns)

            # by dated groups, for one project
            await service.api.put(
                "/v1/project-groups/domain/webshop", {"memberships": [{"group": "shops"}]}
            )
            await tab.evaluate("document.querySelector('[name=group_by]').value = 'group:domain'")
            await tab.act("document.querySelector('form.filters button').click()")
            by_domain = {row[0]: row[1] for row in await rows(tab, "costs")}
            answer = await service.api.get("/v1/costs", **WINDOW, group_by="group:domain")
            assert by_domain == {
                row["group"]["group:domain"] or "in no group": row["cost"]
                for row in answer["costs"]
            }
            await tab.go(f"{service.url}/projects/webshop?month={MONTH:%Y-%m}")
            await tab.act(
                "[...document.links].find(a => a.textContent === 'What it costs').click()"
            )
            assert [row[0] for row in await rows(tab, "costs")] == ["instance"]


async def test_budgets_show_how_far_they_are_used_up_and_periods_what_they_hold(
    run_usage: RunUsage, amqp_url: str, browser: OpenTab
) -> None:
    fixed = {"from": MONTH.isoformat(), "until": (MONTH + 90 * DAY).isoformat()}
    async with run_usage(budget_seconds=0.2) as service:
        api = service.api
        await fold(api, amqp_url, MESSAGES, len(MESSAGES))
        await api.put("/v1/price-books/default", BOOK)
        for name, amount, projects in (("small", 1, ["webshop"]), ("big", 100, ["research"])):
            await api.put(
                f"/v1/budgets/{name}",
                {
                    "subject": {"projects": projects},
                    "limit": {"amount": amount, "price_book": "default"},
                    "period": fixed,
                },
            )
        await api.put(
            "/v1/budgets/later",
            {
                "subject": {"user": "u1"},
                "limit": {"amount": 5, "measure": "instance_hours"},
                "period": {"from": "2098-01-01", "until": "2099-01-01"},
            },
        )

        async def crossed() -> Any:
            return (await api.get("/v1/budgets/small"))["state"]["crossings"]

        await eventually(crossed)
        async with browser() as tab:
            await tab.go(f"{service.url}/budgets")
            big, later, small = await rows(tab, "budgets")
            for row, name in ((big, "big"), (small, "small")):
                state = (await api.get(f"/v1/budgets/{name}"))["state"]
                assert row[0] == name
                assert row[3:5] == [f"{state['limit']} EUR", state["consumed"]]
                assert row[5].endswith(f"{state['consumed_percent']} %")
                assert row[6:8] == [state["left"], state["forecast"]]
                for one in state["crossings"]:
                    assert f"{one['threshold_percent']} %" in row[8]
            assert later == ["later", "user u1", "its period has not begun"]
            assert await tab.evaluate(
                "getComputedStyle(document.querySelectorAll('#budgets tr')[3].cells[6]).color"
                " !== getComputedStyle(document.querySelectorAll('#budgets tr')[1].cells[6]).color"
            )  # what is overspent is seen
            assert await canvases(tab) == (0, 0, 0)
            await turn_periods(service)
            await tab.go(f"{service.url}/periods")
            found = {row[0]: row for row in await rows(tab, "periods")}
            assert found[f"{MONTH:%Y-%m}"][3] == "settling"
            assert "what is late is waited for until" in found[f"{MONTH:%Y-%m}"][-1]
            closed = await api.post(f"/v1/periods/{MONTH:%Y-%m}/close", {"overrule": True})
            await fold(api, amqp_url, LATE, len(MESSAGES) + len(LATE))
            await turn_periods(service)
            adjustments = (await api.get(f"/v1/periods/{MONTH:%Y-%m}/adjustments"))["adjustments"]
            assert adjustments
            await tab.go(f"{service.url}/periods")
            await tab.act(f"document.querySelector('a[href=\"/periods/{MONTH:%Y-%m}\"]').click()")
            text = await tab.text()
            assert closed["manifest"]["sha256"] in text
            totals = {
                row[0].lower().replace(" ", "_"): row[2] for row in await rows(tab, "totals")
            }
            assert totals == {
                name: str(amount) for name, amount in closed["manifest"]["totals"].items()
            }
            shown = [(row[0], row[7]) for row in await rows(tab, "adjustments")]
            assert shown == [(str(one["id"]), f"{one['delta']:+d}") for one in adjustments]
            assert await canvases(tab) == (0, 0, 0)
            await tab.act(
                "[...document.links].find(a => a.textContent === 'charged to it').click()"
            )
            assert await rows(tab, "adjustments") == []


async def test_an_error_on_a_page_says_what_to_do_and_the_api_keeps_its_problems(
    run_usage: RunUsage, browser: OpenTab
) -> None:
    async with run_usage() as service, browser() as tab:
        for path, code, advice in (
            ("/periods/1999-01", "usage.period.not_found", "Check the address"),
            ("/costs?price_book=nobody", "usage.price_book.not_found", "Check the address"),
            ("/costs?month=1999-01", "request.invalid", "Change what the message names"),
            ("/projects?marker=!!", "usage.marker.invalid", "Change what the message names"),
        ):
            await tab.go(service.url + path)
            text = await tab.text()
            assert code in text
            assert advice in text
            await tab.act("[...document.links].find(a => a.textContent === 'overview').click()")
            assert await tab.evaluate("location.pathname") == "/"
        await tab.go(f"{service.url}/v1/periods/1999-01")
        assert '"code":"usage.period.not_found"' in await tab.text()
        tab.complaints.clear()  # the statuses themselves


async def test_a_project_token_sees_its_own_costs_and_budgets_and_no_others_totals(
    run_usage: RunUsage, amqp_url: str, tmp_path: Path, browser: OpenTab
) -> None:
    issued = {
        "admin": auth.new_token(name="admin", role=auth.Role.ADMIN, projects="*"),
        "alice": auth.new_token(name="alice", role=auth.Role.READER, projects="research"),
    }
    tokens = tmp_path / "tokens"
    tokens.write_text("\n".join(line for _, line in issued.values()))
    async with (
        run_usage(auth_mode="token", auth_tokens_file=tokens) as service,
        client.open_api(service.url, token=issued["admin"][0]) as api,
        browser() as tab,
    ):
        await fold(api, amqp_url, MESSAGES, len(MESSAGES))
        await api.put("/v1/price-books/default", BOOK)
        await api.put("/v1/price-books/secret", {**BOOK, "public": False})
        for name in ("webshop", "research"):
            await api.put(
                f"/v1/budgets/of-{name}",
                {
                    "subject": {"projects": [name]},
                    "limit": {"amount": 100, "price_book": "default"},
                    "period": "month",
                },
            )
        await turn_periods(service)
        await api.post(f"/v1/periods/{MONTH:%Y-%m}/close", {"overrule": True})
        await sign_in(tab, f"{service.url}/costs?month={MONTH:%Y-%m}", issued["alice"][0])
        assert [row[0] for row in await rows(tab, "costs")] == ["research"]
        text = await tab.text()
        assert "webshop" not in text
        assert "secret" not in text
        await tab.go(f"{service.url}/budgets")
        assert [row[0] for row in await rows(tab, "budgets")] == ["of-research"]
        await tab.go(f"{service.url}/periods/{MONTH:%Y-%m}")
        text = await tab.text()
        assert "sha256" in text
        assert "Totals" not in text
        assert "by admin" not in text
