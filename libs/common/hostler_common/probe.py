"""``python -m hostler_common.probe``: is the process in this container ready? What a container's health check runs.

It asks ``/readyz`` on loopback, at ``HOSTLER_HTTP_PORT`` or the port given as the argument, and prints the answer.
Standard library only and no settings: it runs every few seconds, so it starts fast, and no secret is read for it.
"""

import http.client
import os
import sys

TIMEOUT_SECONDS = 4.0


def readiness(port: int) -> tuple[bool, str]:
    """Whether the process that listens on the loopback port says that it is ready, and its answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_SECONDS)
    try:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        body = answer.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as exc:
        return False, f"port {port}: {exc or type(exc).__name__}"
    finally:
        connection.close()
    return answer.status == http.HTTPStatus.OK, body


def main() -> int:
    """0 if ready, 1 if not, 2 if the port is no number."""
    text = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("HOSTLER_HTTP_PORT", "")
    if not text.isdecimal():
        print("the port is not said: HOSTLER_HTTP_PORT, or an argument", file=sys.stderr)
        return 2
    ready, answer = readiness(int(text))
    print(answer)  # `docker inspect` shows it beside the verdict
    return 0 if ready else 1


if __name__ == "__main__":
    sys.exit(main())
