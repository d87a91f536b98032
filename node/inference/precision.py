"""What precision a model is loaded in: as its files have it, or in the best of fewer bits that fits. Pure numbers."""

from collections.abc import Mapping
from typing import Literal

from node.config import Quantization

Precision = Literal["stored", "int8", "int4"]
"""How the weights lie in memory; `stored` is whatever the files have."""

QUANTISED: tuple[Literal["int8", "int4"], ...] = ("int8", "int4")
"""Best first."""


def needs_sizes(setting: Quantization, stored_bytes: int, room_bytes: int) -> bool:
    """Whether a choice depends on how large the weights are in fewer bits."""
    return setting in QUANTISED or (setting == "auto" and stored_bytes > room_bytes)


def choose(setting: Quantization, stored_bytes: int, sizes: Mapping[str, int], room_bytes: int) -> Precision:
    """The best precision that fits the room, or the smallest when none does; a precision that is set is that one."""
    if setting == "none":
        return "stored"
    if setting != "auto":
        return setting
    if stored_bytes <= room_bytes:
        return "stored"
    return next((name for name in QUANTISED if sizes[name] <= room_bytes), min(QUANTISED, key=lambda name: sizes[name]))


def described(precision: Precision, stored_bytes: int, sizes: Mapping[str, int]) -> str:
    """For a refusal: what was chosen among which sizes."""
    if precision == "stored":
        return ""
    others = [f"{stored_bytes} as stored", *(f"{sizes[name]} as {name}" for name in QUANTISED if name != precision)]
    return f" as {precision} ({', '.join(others)})"
