"""The import of large libraries by a process that keeps them until it ends. Knows none of them."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """`with importing(): import torch`: what an import makes stays, so nobody looks for garbage among it, now or later.

    To look at it over and over while it grows takes a fifth of the time that torch and transformers need.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
