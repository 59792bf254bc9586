"""A libtorrent client on one host of a `network_rig`; runs in libtorrent's own environment.

    python libtorrent_host.py TORRENT DIRECTORY ADDRESS PEERS [super]

The file is in DIRECTORY, or comes there. A client that has it says `ready` once it is checked. One that has not says
so when its session is up, waits for a line on stdin, and gives the complete file the second name `../image`. PEERS are
addresses to connect to, with commas between. With `super` it is a super-seed.

Everything that helps is on: TCP only (its uTP is slower here and takes a core), no discovery, many connections at
once, every peer unchoked, deep queues.
"""

import os
import sys
import time
from pathlib import Path

import libtorrent as lt

PORT = 6881


def session(address: str) -> lt.session:
    """A session as well tuned for a closed network as it gets."""
    return lt.session(
        {
            "listen_interfaces": f"{address}:{PORT}",
            "outgoing_interfaces": address,
            "alert_mask": lt.alert.category_t.status_notification
            | lt.alert.category_t.storage_notification,
            "enable_dht": False,
            "enable_lsd": False,
            "enable_upnp": False,
            "enable_natpmp": False,
            "enable_incoming_utp": False,
            "enable_outgoing_utp": False,
            "connection_speed": 500,
            "connections_limit": 500,
            "unchoke_slots_limit": 20,
            "unchoke_interval": 1,
            "optimistic_unchoke_interval": 2,
            "allow_multiple_connections_per_ip": True,
            "peer_turnover": 0,
            "max_out_request_queue": 500,
            "request_queue_time": 3,
            "send_buffer_watermark": 1 << 20,
            "send_buffer_low_watermark": 1 << 18,
            "send_buffer_watermark_factor": 150,
            "strict_end_game_mode": True,
            "announce_to_all_trackers": False,
            "min_reconnect_time": 1,
        }
    )


def add(
    client: lt.session, torrent: Path, directory: Path, peers: list[str], *, is_super: bool
) -> lt.torrent_handle:
    """The torrent is added, and its peers are known."""
    wanted = lt.add_torrent_params()
    wanted.ti = lt.torrent_info(str(torrent))
    wanted.save_path = str(directory)
    flags = lt.torrent_flags
    wanted.flags &= ~(flags.auto_managed | flags.paused)
    if is_super:
        wanted.flags |= flags.super_seeding
    handle = client.add_torrent(wanted)
    for peer in peers:
        handle.connect_peer((peer, PORT))
    return handle


def wait_complete(handle: lt.torrent_handle) -> None:
    """Return when every piece is here."""
    while not handle.status().is_seeding:
        time.sleep(0.005)


def main() -> None:
    """Seed, or fetch and seed, until told to end."""
    torrent, directory, address, others, *words = sys.argv[1:]
    path, peers = Path(directory), [peer for peer in others.split(",") if peer]
    client = session(address)
    name = lt.torrent_info(torrent).name()
    if (path / name).exists():
        wait_complete(add(client, Path(torrent), path, peers, is_super="super" in words))
        print("ready", flush=True)
    else:
        print("ready", flush=True)
        sys.stdin.readline()
        handle = add(client, Path(torrent), path, peers, is_super=False)
        wait_complete(handle)
        handle.flush_cache()
        while not any(isinstance(alert, lt.cache_flushed_alert) for alert in client.pop_alerts()):
            time.sleep(0.005)
        os.link(path / name, path.parent / "image")
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    main()
