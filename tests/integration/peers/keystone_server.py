"""A whole Keystone on SQLite, run by the Python of its own environment.

    ENVIRONMENT/bin/python keystone_server.py --directory DIRECTORY --port PORT [--amqp-url URL --format cadf]

Everything it keeps is in the directory, which must exist. User `admin` of project `admin` has the
password `admin`. With an address of a broker it notifies, as messagingv2, on exchange `keystone`, in format
`cadf` or `basic`.
The process becomes the server: whoever started it ends it.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

CONFIGURATION = """\
[DEFAULT]
notification_format = {format}
[database]
connection = sqlite:///{directory}/keystone.sqlite
[fernet_tokens]
key_repository = {directory}/fernet
[credential]
key_repository = {directory}/credential
[identity]
password_hash_rounds = 4
"""

NOTIFICATIONS = """\
[oslo_messaging_notifications]
driver = messagingv2
transport_url = {url}
"""

# Keystone reads the command line of whatever process it is in
APPLICATION = """\
import sys

sys.argv = ["keystone"]

from keystone.wsgi.api import application
"""


def main() -> None:
    """Configure it, make its database and its first user, and become it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--amqp-url")
    parser.add_argument("--format", choices=("cadf", "basic"), default="basic")
    options = parser.parse_args()
    directory, binaries = options.directory, Path(sys.prefix) / "bin"
    configuration = directory / "keystone.conf"
    text = CONFIGURATION.format(directory=directory, format=options.format)
    if options.amqp_url:
        text += NOTIFICATIONS.format(url=options.amqp_url.replace("amqp://", "rabbit://", 1))
    configuration.write_text(text)
    (directory / "hostler_keystone.py").write_text(APPLICATION)
    os.chdir(directory)
    owner = [f"--keystone-user={os.geteuid()}", f"--keystone-group={os.getegid()}"]
    for command in (
        ["db_sync"],
        ["fernet_setup", *owner],
        ["credential_setup", *owner],
        [
            "bootstrap", "--bootstrap-password", "admin", "--bootstrap-region-id", "RegionOne",
            "--bootstrap-public-url", f"http://127.0.0.1:{options.port}/v3",
        ],
    ):  # fmt: skip
        manage = [binaries / "keystone-manage", "--config-file", configuration, *command]
        subprocess.run(manage, check=True)
    os.environ["OS_KEYSTONE_CONFIG_DIR"] = str(directory)
    os.environ["OS_KEYSTONE_CONFIG_FILES"] = str(configuration)
    gunicorn = str(binaries / "gunicorn")
    os.execv(
        gunicorn,
        [
            gunicorn, "-k", "gthread", "--threads", "2", "-w", "1", "--no-control-socket",
            "-b", f"127.0.0.1:{options.port}", "hostler_keystone:application",
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
