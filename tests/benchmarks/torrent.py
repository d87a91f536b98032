"""libtorrent as `make bench-shards` uses it: a seeder in one process, a downloader in another.

`python -m tests.benchmarks.torrent seed FILE` prints its port and seeds; `... fetch FILE PORT FOLDER` downloads that
file into FOLDER and prints the seconds it took. Both use the same v2 torrent of FILE, with pieces of 1 MiB.
"""

from __future__ import annotations

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


def session() -> Any:
    import libtorrent as lt

    off = dict.fromkeys(("enable_dht", "enable_lsd", "enable_upnp", "enable_natpmp"), False)
    # As it comes, whoever connects waits up to 15 s until it is unchoked.
    at_once = {
        "unchoke_slots_limit": -1,
        "unchoke_interval": 1,
        "mixed_mode_algorithm": 0,
        "enable_incoming_utp": False,
    }
    return lt.session({"listen_interfaces": "127.0.0.1:0", "enable_outgoing_utp": False, **at_once, **off})


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


if __name__ == "__main__":
    if sys.argv[1] == "seed":
        seed(Path(sys.argv[2]))
    else:
        fetch(Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
