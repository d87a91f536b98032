"""JSON from outside, decoded without trusting how deep it is nested. Knows nothing else.

msgspec (like the standard library) decodes nested values by recursion on the C stack and relies on Python's recursion
limit to stop in time. py-evm and py_ecc, which this process imports, raise that limit to 100,000: a body of 100 kB of
opening brackets then ends the process with a segmentation fault. So the depth is measured first, without recursion.
"""

from __future__ import annotations

import re
from array import array
from itertools import accumulate
from typing import Any

import msgspec

DEPTH_MAX = 64
"""Arrays and objects within one another. No method takes more than five."""

_STRINGS = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_STEPS = bytes.maketrans(b"[{]}", bytes([1, 1, 255, 255]))
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


class NotJson(ValueError):
    """The bytes are no JSON, or are nested too deep."""


def decode_json(data: bytes) -> Any:
    """The value; integers of any size stay exact. Raises NotJson."""
    # Counting is quicker than measuring, and settles almost every request.
    if data.count(b"[") + data.count(b"{") > DEPTH_MAX and depth(data) > DEPTH_MAX:
        raise NotJson(f"arrays and objects are nested more than {DEPTH_MAX} deep")
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise NotJson(str(error)) from error


def depth(data: bytes) -> int:
    """How deep the brackets outside strings are nested; of malformed JSON, no less than a decoder would go."""
    brackets = _STRINGS.sub(b"", data).translate(None, _NO_BRACKETS)
    return max(accumulate(array("b", brackets.translate(_STEPS))), default=0)
