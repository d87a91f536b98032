"""A real web server as a mirror: nginx over a store, as it comes, without a line of configuration for it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from contracts.errors import Busy
from node.network.fetching.fetcher import Fetcher
from node.network.sources import MirrorSource
from node.network.wire import DataLimits
from tests.node.network.test_data_plane import World

DEADLINE_S = 30.0

CONFIG = """\
daemon off;
master_process off;
pid {root}/nginx.pid;
error_log stderr;
events {{}}
http {{
    access_log off;
    client_body_temp_path {root}/body; proxy_temp_path {root}/proxy; fastcgi_temp_path {root}/fastcgi;
    uwsgi_temp_path {root}/uwsgi; scgi_temp_path {root}/scgi;
    server {{
        listen 127.0.0.1:{port};
        location / {{ root {files}; }}
        location /compressed/ {{ alias {files}/; gzip on; gzip_types *; }}
        location /moved/ {{ rewrite ^/moved/(.*)$ /$1 permanent; }}
        location /closed/ {{ return 403; }}
    }}
}}
"""


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def nginx(world: World, tmp_path: Path) -> Iterator[str]:
    """Its URL; its files are the holder's store."""
    if shutil.which("nginx") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("no nginx: CI has to run this")
        pytest.skip("no nginx to test a mirror with")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    root = tmp_path / "nginx"
    root.mkdir()
    (root / "nginx.conf").write_text(CONFIG.format(root=root, port=port, files=world.holder.store.root))
    with subprocess.Popen(["nginx", "-p", root, "-c", root / "nginx.conf"]) as process:
        try:
            deadline = time.monotonic() + DEADLINE_S
            while not answers(port):
                assert process.poll() is None
                assert time.monotonic() < deadline
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return False
    return True


async def take_all(world: World, prefix: str) -> Fetcher:
    fetcher = world.fetcher(DataLimits())
    with trio.fail_after(DEADLINE_S):
        manifest = await fetcher.fetch_manifest(world.manifest_hash, [MirrorSource(prefix)])
        for shard in manifest.shards:
            await fetcher.fetch_shard(shard, [MirrorSource(prefix)])
    return fetcher


@pytest.mark.parametrize("path", ["", "/compressed", "/moved"])
async def test_nginx_is_a_mirror(world: World, nginx: str, path: str) -> None:
    fetcher = await take_all(world, nginx + path)
    assert [world.fetched(0), world.fetched(1)] == world.shards
    assert fetcher.statistics().source_failures == 0


async def test_what_nginx_refuses_is_said(world: World, nginx: str) -> None:
    with pytest.raises(Busy, match="answers 403 Forbidden"):
        await take_all(world, f"{nginx}/closed")
