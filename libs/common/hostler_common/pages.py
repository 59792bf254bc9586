"""Server-rendered pages with one common frame. All assets are the packages' own: a private cloud has no CDN.

The content security policy that `hostler_common.http` sends allows no inline script and no inline style, so templates
hold neither.
"""

from datetime import UTC, datetime
from typing import Any

import jinja2
from fastapi import Request
from fastapi.responses import HTMLResponse

SERVICES = ("precache", "usage", "capacity", "baremetal")


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def _when(value: datetime | None) -> str:
    return value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC") if value else "-"


class Pages:
    """The templates of one service, with the common ones behind them."""

    def __init__(self, package: str) -> None:
        self.package = package
        self._environment = jinja2.Environment(
            loader=jinja2.ChoiceLoader(
                [jinja2.PackageLoader(package), jinja2.PackageLoader("hostler_common")]
            ),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._environment.filters |= {"bytes": _bytes, "when": _when}

    def render(self, request: Request, template: str, **context: Any) -> HTMLResponse:  # noqa: ANN401
        """The template as a page, for the request's caller."""
        principal = getattr(request.state, "principal", None)
        text = self._environment.get_template(template).render(
            service=self.package.removeprefix("hostler_"),
            path=request.url.path,
            caller=principal,
            now=datetime.now(UTC),
            **context,
        )
        return HTMLResponse(text)
