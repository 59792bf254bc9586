"""A whole Swift on one disk with one replica, run by the Python of its own environment.

    ENVIRONMENT/bin/python swift_server.py --directory DIRECTORY --port PORT [--keystone-url URL]

Four servers (account, container, object, proxy) and a memcached, everything in the directory, which
must exist on a file system with user xattrs. Without Keystone, `tempauth` at /auth/v1.0 knows user
`test:tester` with key `testing`. This process starts them and ends them: whoever started it ends it,
with SIGTERM.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

SWIFT = """\
[swift-hash]
swift_hash_path_prefix = hostler
swift_hash_path_suffix = tests
[storage-policy:0]
name = one
default = yes
[swift-constraints]
"""

SERVER = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
swift_dir = {directory}
devices = {directory}/devices
mount_check = false
disable_fallocate = true
log_address = {directory}/no-syslog
[pipeline:main]
pipeline = {name}-server
[app:{name}-server]
use = egg:swift#{name}
"""

PROXY = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
swift_dir = {directory}
log_address = {directory}/no-syslog
[pipeline:main]
pipeline = catch_errors cache {auth} slo dlo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:{memcached}
[filter:slo]
use = egg:swift#slo
# segments of a test's size
min_segment_size = 1
[filter:dlo]
use = egg:swift#dlo
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin
[filter:authtoken]
paste.filter_factory = keystonemiddleware.auth_token:filter_factory
www_authenticate_uri = {keystone}
auth_url = {keystone}
auth_type = password
interface = public
username = admin
password = admin
project_name = admin
user_domain_name = Default
project_domain_name = Default
delay_auth_decision = true
token_cache_time = -1
[filter:keystoneauth]
use = egg:swift#keystoneauth
operator_roles = admin, member
"""


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def main() -> None:
    """Configure it, make its rings, and watch over its servers until told to stop."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--keystone-url", default="")
    options = parser.parse_args()
    directory, binaries = options.directory.resolve(), Path(sys.prefix) / "bin"
    (directory / "devices" / "d1").mkdir(parents=True)
    (directory / "swift.conf").write_text(SWIFT)
    ports = {name: free_port() for name in ("account", "container", "object")}
    memcached = free_port()
    for name, port in ports.items():
        (directory / f"{name}.conf").write_text(
            SERVER.format(name=name, port=port, directory=directory)
        )
        ring = [str(binaries / "swift-ring-builder"), str(directory / f"{name}.builder")]
        for command in (
            ["create", "4", "1", "1"],
            ["add", f"r1z1-127.0.0.1:{port}/d1", "1"],
            ["rebalance"],
        ):
            subprocess.run([*ring, *command], check=True)
    (directory / "proxy.conf").write_text(
        PROXY.format(
            port=options.port,
            directory=directory,
            memcached=memcached,
            auth="authtoken keystoneauth" if options.keystone_url else "tempauth",
            keystone=options.keystone_url,
        )
    )
    commands = [["memcached", "-l", "127.0.0.1", "-p", str(memcached), "-u", "nobody"]]
    commands += [
        [str(binaries / f"swift-{name}-server"), str(directory / f"{name}.conf"), "-v"]
        for name in (*ports, "proxy")
    ]
    servers = [subprocess.Popen(command, cwd=directory) for command in commands]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        os.waitpid(-1, 0)  # none of them ends by itself
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            server.wait()


if __name__ == "__main__":
    main()
