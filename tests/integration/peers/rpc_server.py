"""A foreign compute agent: an unmodified oslo.messaging RPC server on topic `compute`.

It prints a line when it listens, and one JSON line for each `cache(image_id, meta)` it is called
with. Run as a program, with the transport's address as its argument.
"""

import json
import sys
import time
from typing import Any

import oslo_messaging
from oslo_config import cfg


def say(line: str) -> None:
    """Print a line at once: the test reads it."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


class ComputeEndpoint:
    """What Nova's own manager would be."""

    target = oslo_messaging.Target(version="1.0")

    def cache(self, context: dict[str, Any], image_id: str, meta: dict[str, Any]) -> None:
        """Print the call."""
        del context
        say(json.dumps({"image_id": image_id, "meta": meta}))


def main() -> None:
    """Serve until the process is ended."""
    # the global configuration, as Nova uses it: oslo.messaging registers some options only there
    cfg.CONF([], project="foreign", default_config_files=[])
    transport = oslo_messaging.get_rpc_transport(cfg.CONF, url=sys.argv[1])
    server = oslo_messaging.get_rpc_server(
        transport,
        oslo_messaging.Target(topic="compute", server="foreign-1"),
        [ComputeEndpoint()],
        executor="threading",
    )
    server.start()
    say("listening")
    while True:
        time.sleep(60)


if __name__ == "__main__":
    main()
