"""Who may do what: roles, project scope, and nothing without a token."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from hostler_capacity import app
from hostler_capacity.settings import Settings
from hostler_common import auth, client, errors, hosts
from hostler_common.testing import RunService, eventually, open_bus


async def test_projects_see_and_claim_only_their_own(
    run_service: RunService, amqp_url: str, tmp_path: Path, node: Any
) -> None:
    tokens = {}
    lines = []
    for name, role, projects in (
        ("admin", auth.Role.ADMIN, "*"),
        ("blue", auth.Role.OPERATOR, "blue"),
        ("red", auth.Role.OPERATOR, "red"),
        ("reader", auth.Role.READER, "*"),
    ):
        tokens[name], line = auth.new_token(name=name, role=role, projects=projects)
        lines.append(line)
    file = tmp_path / "tokens"
    file.write_text("\n".join(lines))
    async with (
        run_service(
            app.serve,
            Settings,
            "hostler_capacity",
            auth_mode="token",
            auth_tokens_file=file,
            refresh_seconds=0.05,
        ) as service,
        open_bus(amqp_url) as bus,
        client.open_api(service.url, token=tokens["admin"]) as admin,
        client.open_api(service.url, token=tokens["blue"]) as blue,
        client.open_api(service.url, token=tokens["red"]) as red,
        client.open_api(service.url, token=tokens["reader"]) as reader,
    ):
        (part,) = hosts.split(
            host="hv1", reported_at=datetime.now(UTC), report_id=uuid4(), nodes=[node()]
        )
        await bus.publish(hosts.HOST_REPORTED.message(part, app_id="test", host="hv1"))

        async def known() -> Any:
            return (await reader.get("/v1/hosts"))["hosts"]

        await eventually(known)
        wish = {"resources": {"memory_mb": 64, "vcpus": 1}, "project_id": "blue"}
        claim = await blue.post("/v1/claims", wish, idempotency_key="same")
        path = f"/v1/claims/{claim['id']}"
        theirs = await red.post(
            "/v1/claims", {**wish, "project_id": "red"}, idempotency_key="same"
        )
        assert theirs["id"] != claim["id"]  # a key belongs to its caller
        for refused in (red.get(path), red.delete(path), red.post(f"{path}/confirm")):
            with pytest.raises(errors.NotFound):
                await refused
        for forbidden in (red.post("/v1/claims", wish), reader.post("/v1/claims", wish)):
            with pytest.raises(errors.Forbidden):
                await forbidden
        flavor = {"name": "mine", "memory_mb": 1, "vcpus": 1}
        await admin.post("/v1/flavors", {**flavor, "name": "everybody's"})
        everybodys = "/v1/flavors/everybody's"
        for forbidden in (blue.post("/v1/flavors", flavor), blue.delete(everybodys)):
            with pytest.raises(errors.Forbidden):
                await forbidden
        with pytest.raises(errors.Unauthenticated):
            await service.api.get("/v1/hosts")
        seen = [
            [each["project_id"] for each in (await api.get("/v1/claims"))["claims"]]
            for api in (blue, red, admin)
        ]
        assert seen == [["blue"], ["red"], ["blue", "red"]]
        assert (await blue.delete(path))["state"] == "released"
