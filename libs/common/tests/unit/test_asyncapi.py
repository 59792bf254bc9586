import json
import re
from typing import Any

import jsonschema
import pytest
from pydantic import BaseModel

from hostler_common import asyncapi, bus


class Part(BaseModel):
    size_bytes: int


class ThingMade(BaseModel):
    name: str
    parts: list[Part] = []


def other_part() -> type[BaseModel]:
    class Part(BaseModel):
        colour: str

    return Part


MADE = bus.EventType(routing_key="maker.thing.made", model=ThingMade, summary="A thing was made")
SEEN = bus.EventType(
    routing_key="thing.seen.{host}.{name}", model=Part, summary="A part was seen", schema="1.2"
)
TOPOLOGIES = {
    "maker": bus.Topology(publishes=(MADE,), consumes=(SEEN,)),
    "watcher": bus.Topology(publishes=(SEEN,), consumes=(MADE, SEEN)),
}


@pytest.fixture
def document() -> dict[str, Any]:
    return asyncapi.document(TOPOLOGIES, version="1.2.3")


def references(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if "$ref" in value else []
        return own + [found for item in value.values() for found in references(item)]
    if isinstance(value, list):
        return [found for item in value for found in references(item)]
    return []


def resolve(document: dict[str, Any], reference: str) -> Any:
    assert reference.startswith("#/")
    for part in reference.removeprefix("#/").split("/"):
        document = document[part]
    return document


def test_the_document_has_the_members_of_asyncapi_3(document: dict[str, Any]) -> None:
    assert document["asyncapi"] == "3.0.0"
    assert document["info"] == {
        "title": "hostler topics",
        "version": "1.2.3",
        "description": document["info"]["description"],
    }
    assert set(document) == {
        "asyncapi",
        "info",
        "defaultContentType",
        "channels",
        "operations",
        "components",
    }


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    found = references(document)
    assert "#/components/schemas/Part" in found  # the one within a schema
    for reference in found:
        assert resolve(document, reference)


def test_keys_are_names_that_asyncapi_allows(document: dict[str, Any]) -> None:
    keys = [
        *document["channels"],
        *document["operations"],
        *document["components"]["messages"],
        *document["components"]["schemas"],
    ]
    assert all(re.fullmatch(r"[\w.-]+", key) for key in keys)


def test_an_event_is_one_channel_whoever_sends_or_receives_it(document: dict[str, Any]) -> None:
    assert {c["address"] for c in document["channels"].values()} == {
        "maker.thing.made",
        "thing.seen.{host}.{name}",
    }
    said = {
        (name, operation["action"], resolve(document, operation["channel"]["$ref"])["address"])
        for name, operation in document["operations"].items()
    }
    assert {(action, address) for _, action, address in said} == {
        ("send", "maker.thing.made"),
        ("receive", "maker.thing.made"),
        ("send", "thing.seen.{host}.{name}"),
        ("receive", "thing.seen.{host}.{name}"),
    }
    assert len(said) == 5
    for operation in document["operations"].values():
        channel = resolve(document, operation["channel"]["$ref"])
        (message,) = operation["messages"]
        assert message["$ref"].startswith(operation["channel"]["$ref"] + "/messages/")
        assert resolve(document, message["$ref"]) in channel["messages"].values()


def test_a_channel_says_its_exchange_and_what_varies_in_its_address(
    document: dict[str, Any],
) -> None:
    for channel in document["channels"].values():
        assert channel["bindings"]["amqp"]["exchange"] == {
            "name": "hostler",
            "type": "topic",
            "durable": True,
            "autoDelete": False,
        }
        varying = set(re.findall(r"{(\w+)}", channel["address"]))
        assert set(channel.get("parameters", {})) == varying


def test_the_schemas_accept_what_the_models_write_and_refuse_the_rest(
    document: dict[str, Any],
) -> None:
    def errors_of(value: object) -> list[Any]:
        schema = {"$ref": "#/components/schemas/ThingMade", "components": document["components"]}
        return list(jsonschema.Draft202012Validator(schema).iter_errors(value))

    made = ThingMade(name="x", parts=[Part(size_bytes=1)])
    assert errors_of(json.loads(made.model_dump_json())) == []
    assert errors_of({"name": "x", "parts": [{"size_bytes": "many"}]})
    assert errors_of({})


def test_the_schema_version_is_in_the_headers(document: dict[str, Any]) -> None:
    headers = document["components"]["messages"]["thing_seen_host_name"]["headers"]
    assert headers["properties"]["schema"]["const"] == "1.2"


def test_two_models_of_one_name_that_differ_are_refused() -> None:
    clashing = bus.EventType(routing_key="other.part", model=other_part(), summary="x")
    with pytest.raises(ValueError, match="named Part"):
        asyncapi.document(
            {**TOPOLOGIES, "other": bus.Topology(publishes=(clashing,))}, version="1"
        )


def test_the_text_is_the_same_each_time() -> None:
    text = asyncapi.render(TOPOLOGIES, version="1")
    assert text == asyncapi.render(dict(reversed(TOPOLOGIES.items())), version="1")
    assert text.endswith("}\n")
