"""A whole Glance with a file store and no Keystone, run by the Python of its own environment.

    ENVIRONMENT/bin/python glance_server.py --directory DIRECTORY --port PORT [--amqp-url URL]
        [--tenants | --keystone-url URL]

Everything it keeps is in the directory, which must exist; images are in DIRECTORY/images, each a file
named by its id. The process becomes the server: whoever started it ends it. With an address of a
broker it notifies, as messagingv2, on exchange `glance`.

Anybody may do anything in it. Without `--tenants` a request has no project, and an image no owner;
with it, Keystone's middleware is left out of Keystone's pipeline, and Glance takes the headers that
the middleware would have set (X-Identity-Status: Confirmed, X-Project-Id, X-User-Id, X-Roles) from
whoever sends them. With Keystone's URL the middleware is there, and asks Keystone of each token anew.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

CONFIGURATION = """\
[DEFAULT]
enabled_backends = fs:file
enabled_import_methods = [glance-direct]
worker_self_reference_url = http://127.0.0.1:{port}
limit_param_default = 2
[database]
connection = sqlite:///{directory}/glance.sqlite
[glance_store]
default_backend = fs
[fs]
filesystem_store_datadir = {directory}/images
[os_glance_staging_store]
filesystem_store_datadir = {directory}/staging
[os_glance_tasks_store]
filesystem_store_datadir = {directory}/tasks
[paste_deploy]
flavor = {flavor}
[oslo_policy]
policy_file = {directory}/policy.yaml
enforce_scope = false
enforce_new_defaults = false
"""

NOTIFICATIONS = """\
[oslo_messaging_notifications]
driver = messagingv2
transport_url = {url}
"""


AUTHTOKEN = """\
[keystone_authtoken]
www_authenticate_uri = {url}
auth_url = {url}
auth_type = password
interface = public
username = admin
password = admin
project_name = admin
user_domain_name = Default
project_domain_name = Default
token_cache_time = -1
"""


def main() -> None:
    """Configure it, make its database, and become it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--amqp-url")
    parser.add_argument("--tenants", action="store_true")
    parser.add_argument("--keystone-url")
    options = parser.parse_args()
    directory, binaries = options.directory, Path(sys.prefix) / "bin"
    for name in ("images", "staging", "tasks"):
        (directory / name).mkdir()
    configuration = CONFIGURATION.format(
        directory=directory,
        port=options.port,
        flavor="keystone" if options.tenants or options.keystone_url else "",
    )
    if options.amqp_url:
        url = options.amqp_url.replace("amqp://", "rabbit://", 1)
        configuration += NOTIFICATIONS.format(url=url)
    if options.keystone_url:
        configuration += AUTHTOKEN.format(url=options.keystone_url)
    (directory / "glance-api.conf").write_text(configuration)
    packaged = Path(sys.prefix) / "etc" / "glance" / "glance-api-paste.ini"
    paste = packaged.read_text()
    if not options.keystone_url:
        paste = paste.replace(" authtoken context ", " context ")
    (directory / "glance-api-paste.ini").write_text(paste)
    sample = subprocess.run(
        [binaries / "oslopolicy-sample-generator", "--namespace", "glance"],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    rules = {
        line.split('"')[1] for line in sample.splitlines() if line.lstrip("#").startswith('"')
    }
    (directory / "policy.yaml").write_text("".join(f'"{rule}": "@"\n' for rule in sorted(rules)))
    os.chdir(directory)
    os.environ["OS_GLANCE_CONFIG_DIR"] = str(directory)
    subprocess.run(
        [
            binaries / "glance-manage", "--config-file", directory / "glance-api.conf",
            "db", "sync",
        ],
        check=True,
    )  # fmt: skip
    gunicorn = str(binaries / "gunicorn")
    os.execv(
        gunicorn,
        [
            gunicorn, "-k", "gthread", "--threads", "4", "-w", "1", "-t", "600", "--no-control-socket",
            "-b", f"127.0.0.1:{options.port}", "glance.wsgi.api:application",
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
