"""libtorrent as `make bench-shards` uses it: a seeder in one process, a downloader in another.

`python -m tests.benchmarks.torrent seed FILE` prints its port and seeds; `... fetch FILE PORT FOLDER` downloads that
file into FOLDER and prints the seconds it took. All use the same v2 torrent of FILE, with pieces of 1 MiB.

`... swarm FILE RATE FOLDER` is one of many, with RATE bytes a second both ways: it prints its port, reads everybody's
(a JSON list in one line), prints when it had FILE in FOLDER, serves on until another line, and prints what it sent.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

PIECE_SIZE = 1 << 20
POLL_S = 0.01


def torrent(file: Path) -> Any:
    import libtorrent as lt

    cached = file.with_suffix(".torrent")
    if not cached.exists():
        files = lt.file_storage()
        lt.add_files(files, str(file))
        made = lt.create_torrent(files, PIECE_SIZE, lt.create_torrent.v2_only)
        lt.set_piece_hashes(made, str(file.parent))
        cached.write_bytes(lt.bencode(made.generate()))
    return lt.torrent_info(str(cached))


def session(**settings: object) -> Any:
    import libtorrent as lt

    off = dict.fromkeys(("enable_dht", "enable_lsd", "enable_upnp", "enable_natpmp"), False)
    # As it comes, whoever connects waits up to 15 s until it is unchoked.
    at_once = {
        "unchoke_slots_limit": -1,
        "unchoke_interval": 1,
        "mixed_mode_algorithm": 0,
        "enable_incoming_utp": False,
    }
    return lt.session({"listen_interfaces": "127.0.0.1:0", "enable_outgoing_utp": False, **at_once, **off, **settings})


def seed(file: Path) -> None:
    import libtorrent as lt

    seeder = session()
    seeder.add_torrent({"ti": torrent(file), "save_path": str(file.parent), "flags": lt.torrent_flags.seed_mode})
    print(seeder.listen_port(), flush=True)
    sys.stdin.read()


def fetch(file: Path, port: int, folder: Path) -> None:
    import libtorrent as lt

    info, downloader = torrent(file), session()
    began = time.perf_counter()
    handle = downloader.add_torrent({"ti": info, "save_path": str(folder)})
    while handle.status().state in {lt.torrent_status.checking_files, lt.torrent_status.checking_resume_data}:
        time.sleep(POLL_S)  # a peer that is named earlier is forgotten
    handle.connect_peer(("127.0.0.1", port))
    while not handle.status().is_seeding:
        time.sleep(POLL_S)
    downloader.remove_torrent(handle)
    print(time.perf_counter() - began, flush=True)


def swarm(file: Path, rate: int, folder: Path) -> None:
    import libtorrent as lt

    # What is sent of protocol and headers is not counted, as it is not in ours.
    limits = {"upload_rate_limit": rate, "download_rate_limit": rate, "rate_limit_ip_overhead": False}
    one = session(**limits, allow_multiple_connections_per_ip=True)
    everybody = lt.ip_filter()  # as it comes, peers on the same machine have no limit
    everybody.add_rule("0.0.0.0", "255.255.255.255", 1 << lt.session.global_peer_class_id)
    one.set_peer_class_filter(everybody)
    flags = lt.torrent_flags.default_flags
    if (
        folder == file.parent
    ):  # the seeder: without this it gives each piece nearly twice, and all take a quarter longer
        flags |= lt.torrent_flags.super_seeding
    handle = one.add_torrent({"ti": torrent(file), "save_path": str(folder), "flags": flags})
    while handle.status().state in {lt.torrent_status.checking_files, lt.torrent_status.checking_resume_data}:
        time.sleep(POLL_S)
    print(one.listen_port(), flush=True)
    for port in json.loads(sys.stdin.readline()):
        if port != one.listen_port():
            handle.connect_peer(("127.0.0.1", port))
    while not handle.status().is_seeding:
        time.sleep(POLL_S)
    print(time.monotonic(), flush=True)
    sys.stdin.readline()
    print(handle.status().total_payload_upload, flush=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["seed", file]:
            seed(Path(file))
        case ["fetch", file, port, folder]:
            fetch(Path(file), int(port), Path(folder))
        case ["swarm", file, rate, folder]:
            swarm(Path(file), int(rate), Path(folder))
