"""Python processes of this node's own: what they see of its environment, and how one ended. Knows none of them."""

import os
import signal
from pathlib import Path


def environment() -> dict[str, str]:
    """Our code first, and no secrets of the node."""
    found = {name: value for name, value in os.environ.items() if not name.startswith("AIGEN_")}
    house = str(Path(__file__).resolve().parents[1])
    path = found.get("PYTHONPATH")
    found["PYTHONPATH"] = house if not path else os.pathsep.join((house, path))
    return found


def ending(returncode: int) -> str:
    """For a person to read."""
    if returncode >= 0:
        return f"exit status {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:  # a real-time signal
        return f"signal {-returncode}"
    return f"{name}, perhaps out of memory" if name == "SIGKILL" else name
