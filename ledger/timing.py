"""Where the ledger's time comes from and where its work is done: both can be replaced by a simulation."""

from collections.abc import Callable

import trio

Clock = Callable[[], float]
"""Seconds since the epoch. Read on trio's thread only."""

in_thread = trio.to_thread.run_sync
"""How everything that executes or syncs is run."""
