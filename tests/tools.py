"""Tools beside Python that some tests need: a web server, libraries of npm, an IPFS node.

`make test` installs what it can; a test whose tool is lacking is skipped and says so, but never in CI.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BUILD = Path(__file__).parents[1] / "build"
DEADLINE_S = 60.0

NGINX = """\
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


def require(there: bool, reason: str) -> None:
    """Skip the test unless its tool is there; in CI that is a failure."""
    if not there:
        if os.environ.get("CI") == "true":
            pytest.fail(f"{reason}: CI has to run this")
        pytest.skip(reason)


@contextmanager
def nginx(files: Path, root: Path) -> Iterator[str]:
    """A real nginx over a directory: its URL. `root` is made for what it writes itself."""
    require(shutil.which("nginx") is not None, "no nginx to test a mirror with")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    root.mkdir()
    (root / "nginx.conf").write_text(NGINX.format(root=root, port=port, files=files))
    with subprocess.Popen(["nginx", "-p", root, "-c", root / "nginx.conf"]) as process:
        try:
            deadline = time.monotonic() + DEADLINE_S
            while not _answers(port):
                assert process.poll() is None
                assert time.monotonic() < deadline
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return False
    return True


def npm_libraries(name: str) -> Path:
    """Where `make test` has installed some libraries of npm."""
    path = BUILD / name
    there = shutil.which("npm") is not None and (path / ".ready").exists()
    require(there, f"the libraries in build/{name} are not there: `make test` installs them when it finds npm")
    return path


def run_node(libraries: Path, script: Path, job: Any) -> Any:
    """What a script prints. It runs where its libraries are installed, in a process of its own."""
    done = subprocess.run(
        ["node", "--input-type=module", "-"],
        input=script.read_text(),
        cwd=libraries,
        env={**os.environ, "JOB": json.dumps(job)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
