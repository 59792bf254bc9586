"""The topics of the suite as an AsyncAPI 3 document, made from the constants that the services run on."""

import json
from typing import Any

from hostler_common.bus import EventType, Topology

_NAME = str.maketrans({"{": "", "}": "", ".": "_"})


def document(topologies: dict[str, Topology], *, version: str) -> dict[str, Any]:
    """The document of all services: a channel an event type, an operation a service (AsyncAPI 3.0.0).

    Raises:
        ValueError: two models share a name and differ.
    """
    channels: dict[str, Any] = {}
    operations: dict[str, Any] = {}
    messages: dict[str, Any] = {}
    schemas: dict[str, Any] = {}
    for service, topology in sorted(topologies.items()):
        for action, events in (("send", topology.publishes), ("receive", topology.consumes)):
            for event in events:
                name = event.routing_key.translate(_NAME)
                channels[name] = _channel(event, name)
                messages[name] = _message(event, schemas)
                operations[f"{service}_{action}_{name}"] = {
                    "action": action,
                    "channel": {"$ref": f"#/channels/{name}"},
                    "summary": f"{service}: {event.summary}",
                    "messages": [{"$ref": f"#/channels/{name}/messages/{name}"}],
                }
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "hostler topics",
            "version": version,
            "description": "What the services publish and consume over RabbitMQ.",
        },
        "defaultContentType": "application/json",
        "channels": channels,
        "operations": operations,
        "components": {"messages": messages, "schemas": schemas},
    }


def _channel(event: EventType[Any], name: str) -> dict[str, Any]:
    fields = [part.split("}")[0] for part in event.routing_key.split("{")[1:]]
    channel: dict[str, Any] = {
        "address": event.routing_key,
        "description": event.summary,
        "messages": {name: {"$ref": f"#/components/messages/{name}"}},
        "bindings": {
            "amqp": {
                "is": "routingKey",
                "exchange": {
                    "name": event.exchange.name,
                    "type": event.exchange.type,
                    "durable": event.exchange.durable,
                    "autoDelete": event.exchange.auto_delete,
                },
            }
        },
    }
    if fields:
        channel["parameters"] = {field: {"description": f"the {field}"} for field in fields}
    return channel


def _message(event: EventType[Any], schemas: dict[str, Any]) -> dict[str, Any]:
    schema = event.model.model_json_schema(ref_template="#/components/schemas/{model}")
    for name, part in (*schema.pop("$defs", {}).items(), (event.model.__name__, schema)):
        if schemas.setdefault(name, part) != part:
            raise ValueError(f"two models that differ are named {name}: rename one")
    return {
        "name": event.routing_key,
        "summary": event.summary,
        "payload": {"$ref": f"#/components/schemas/{event.model.__name__}"},
        "headers": {
            "type": "object",
            "properties": {
                "schema": {"type": "string", "const": event.schema},
                "traceparent": {"type": "string"},
            },
        },
    }


def render(topologies: dict[str, Topology], *, version: str) -> str:
    """The document as the text that is committed."""
    return json.dumps(document(topologies, version=version), indent=2, ensure_ascii=False) + "\n"
