"""Server-rendered pages: what a template may and may not do."""

from datetime import UTC, datetime, timedelta, timezone

import jinja2
import pytest
from starlette.requests import Request

from hostler_common import auth
from hostler_common.pages import Pages


@pytest.fixture
def pages(example_package: str) -> Pages:
    return Pages(example_package)


def request(principal: auth.Principal | None = None) -> Request:
    scope = {"type": "http", "method": "GET", "path": "/shown", "headers": [], "query_string": b""}
    made = Request({**scope, "server": ("127.0.0.1", 80), "scheme": "http"})
    if principal is not None:
        made.state.principal = principal
    return made


def shown(pages: Pages, value: object, principal: auth.Principal | None = None) -> str:
    return bytes(pages.render(request(principal), "shown.html", shown=value).body).decode()


def test_what_comes_from_outside_is_escaped(pages: Pages) -> None:
    page = shown(pages, "<script>alert('x')</script>\"")
    assert "<script>" not in page
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&#34;" in page


def test_a_value_that_is_missing_is_an_error_and_not_a_blank(pages: Pages) -> None:
    with pytest.raises(jinja2.UndefinedError, match="shown"):
        pages.render(request(), "shown.html")


def test_a_page_has_the_common_frame_with_the_service_and_the_caller(pages: Pages) -> None:
    caller = auth.Principal(name="<me>", role=auth.Role.READER)
    page = shown(pages, "x", caller)
    assert page.startswith("<!doctype html>")
    assert "hostler <strong>example</strong>" in page
    assert "&lt;me&gt; (reader)" in page
    assert "caller" not in shown(pages, "x")


def test_a_page_loads_nothing_from_elsewhere_and_has_nothing_inline(pages: Pages) -> None:
    page = shown(pages, "x")
    assert "http://" not in page
    assert "https://" not in page
    for inline in ("<style", "style=", "<script", "onclick"):
        assert inline not in page


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536 * 1024, "1.5 MiB"),
        (3 * 1024**3, "3.0 GiB"),
        (5000 * 1024**4, "5000.0 TiB"),
    ],
)
def test_bytes_are_shown_in_binary_units(pages: Pages, value: int, text: str) -> None:
    assert pages._environment.filters["bytes"](value) == text


def test_times_are_shown_in_utc(pages: Pages) -> None:
    when = pages._environment.filters["when"]
    east = timezone(timedelta(hours=2))
    assert when(datetime(2026, 1, 2, 3, 4, 5, tzinfo=east)) == "2026-01-02 01:04:05 UTC"
    assert when(datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)) == "2026-01-02 03:04:05 UTC"
    assert when(None) == "-"
