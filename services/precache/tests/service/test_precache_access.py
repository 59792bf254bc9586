"""Who may do what, and the command line that operators do it with."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from hostler_common import auth, client, errors, testing
from hostler_precache import __main__ as command_line


async def run(*argv: str) -> tuple[int, str, str]:
    program = str(Path(sys.executable).parent / "hostler-precache")
    process = await asyncio.create_subprocess_exec(
        program, *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


async def test_each_role_may_do_its_own_and_no_more(precache: Any, tmp_path: Path) -> None:
    made = {role: auth.new_token(name=f"the-{role}", role=role) for role in auth.Role}
    file = tmp_path / "tokens"
    file.write_text("\n".join(line for _, line in made.values()))
    calls = {
        "read": ("GET", "/v1/distributions", None, 200),
        "operate": ("POST", "/v1/images", {"image_id": "x"}, 201),
        "ask": ("GET", "/v1/desired", None, 200),
        "tell": (
            "PUT",
            "/v1/hosts/a/report",
            {"url": "http://a:1", "session_id": "5a0e1d0e-0000-4000-8000-000000000001"},
            200,
        ),
    }
    allowed = {
        auth.Role.READER: {"read"},
        auth.Role.AGENT: {"ask", "tell"},
        auth.Role.OPERATOR: set(calls),
        auth.Role.ADMIN: set(calls),
    }
    async with precache(auth_mode="token", auth_tokens_file=file) as service:
        for role, (token, _) in made.items():
            async with client.open_api(service.url, token=token) as api:
                done = set()
                for name, (method, path, body, _) in calls.items():
                    try:
                        await api.call(method, path, params={"host": "a"}, body=body)
                        done.add(name)
                    except errors.Forbidden:
                        continue
                assert (role, done) == (role, allowed[role])
        for method, path, body, _ in calls.values():
            with pytest.raises(errors.Unauthenticated):
                await service.api.call(method, path, body=body)


async def test_the_command_line_distributes_watches_and_lists(
    precache: Any, start_agent: Any, source: Any, make_image: Any, tmp_path: Path
) -> None:
    data = make_image(1 << 20)
    async with precache() as service:
        await start_agent("host-1", service.url)
        at = ("--url", service.url)
        location = source.add("image", data)
        code, out, err = await run(
            "distribute", "golden", "--host", "host-1", "--location", location, "--watch",
            "--json", *at,
        )  # fmt: skip
        assert (code, err) == (0, "")
        answer = json.loads(out)
        assert answer["progress"][0]["state"] == "cached"
        code, out, _ = await run("status", answer["distribution_id"], "--watch", *at)
        assert code == 0
        assert "golden: done; sent by the seed 1.0 MiB" in out
        code, out, _ = await run("status", *at)
        assert "golden" in out
        code, out, _ = await run("hosts", "--json", *at)
        assert [host["host"] for host in json.loads(out)["hosts"]] == ["host-1"]
        code, out, err = await run("distribute", "unknown", *at)
        assert code == 1
        assert "precache.image.not_found" in err


async def test_the_command_line_plans_stops_and_goes_on_and_runs_policies(
    precache: Any, start_agent: Any, source: Any, make_image: Any
) -> None:
    data = make_image(2 << 20)
    async with precache() as service:
        at = ("--url", service.url)
        await start_agent("host-1", service.url, link_bytes_per_second=1 << 20, labels="zone=a")
        location = source.add("image", data)
        image = {"image_id": "golden", "location": location, "size_bytes": len(data)}
        await service.api.post("/v1/images", image)

        async def is_heard_of() -> bool:
            return bool((await service.api.get("/v1/hosts"))["hosts"])

        await testing.eventually(is_heard_of)
        wanted = ("golden", "--host", "host-1", "--host", "ghost", "--deadline", "0.0001h")
        code, out, err = await run("plan", "--dry-run", *wanted, *at)
        assert (code, err) == (0, "")
        assert out.splitlines() == [
            "golden, 2.0 MiB, to 2 hosts",
            "  at best 2.0 s; the limit is the slowest host's downlink (host-1)",
            "  the deadline is NOT possible",
            "  no agent has spoken for: ghost",
        ]
        assert (await service.api.get("/v1/distributions"))["distributions"] == []

        code, out, _ = await run("distribute", "golden", "--label", "zone=a", "--watch", *at)
        assert code == 0
        (bar,) = [line for line in out.splitlines() if line.startswith("host-1 ")]
        assert "\u2501" * 20 in bar
        assert "2.0/2.0 MiB" in bar
        assert bar.rstrip().endswith("cached")

        body = {"image_id": "golden", "hosts": ["ghost"]}
        distribution_id = (await service.api.post("/v1/distributions", body))["distribution_id"]
        for command, said in (
            ("pause", f"{distribution_id} paused\n"),
            ("resume", f"{distribution_id} distributing\n"),
            ("cancel", ""),
        ):
            assert await run(command, distribution_id, *at) == (0, said, "")
        again = await service.api.get(f"/v1/distributions/{distribution_id}")
        assert again["state"] == "cancelled"

        policy = {"name": "gold", "options": {"images": []}, "every_seconds": 3600}
        made = await service.api.post("/v1/policies", policy)
        code, out, _ = await run("policies", "--run", made["policy_id"], "--json", *at)
        assert (code, json.loads(out)["policies"][0]["name"]) == (0, "gold")


async def test_lists_are_read_to_their_end(precache: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line, "PAGE", 2)
    names = [f"h{number}" for number in range(5)]
    async with precache() as service:
        for name in names:
            report = {"url": "http://a:1", "session_id": "5a0e1d0e-0000-4000-8000-000000000001"}
            await service.api.put(f"/v1/hosts/{name}/report", report)
            await service.api.post(
                "/v1/policies",
                {"name": name, "options": {"images": []}, "every_seconds": 3600},
            )
            image = {"image_id": name, "fetcher": "http", "location": "http://127.0.0.1:1/"}
            await service.api.post(
                "/v1/distributions", {"image_id": name, "image": image, "hosts": ["h0"]}
            )
        for what, key in (("hosts", "host"), ("policies", "name"), ("distributions", "image_id")):
            answer = await command_line._all(service.api, what)
            assert sorted(one[key] for one in answer[what]) == names
            assert answer["next_marker"] is None


async def test_a_wrong_setting_is_named_and_its_value_is_not(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).parent / "hostler-precache"),
        "serve",
        env={
            "HOSTLER_AMQP_URL": "amqp://guest:secret@127.0.0.1:1/",
            "HOSTLER_AUTH_MODE": "none",
            "HOSTLER_PRECACHE_UPLOAD_SLOTS": "s3cret",
        },
        stderr=asyncio.subprocess.PIPE,
    )
    _, err = await process.communicate()
    assert process.returncode == 2
    text = err.decode()
    assert "HOSTLER_PRECACHE_UPLOAD_SLOTS" in text
    assert "HOSTLER_PRECACHE_DATABASE_URL: is not set" in text
    assert "s3cret" not in text
