"""What the ledger accepts: Vyper sources, their ABI and bytecode, typed events and calls. No storage, no network."""

import os

os.environ.setdefault("ETH_HASH_BACKEND", "pysha3")
"""eth-hash takes pycryptodome when both are there, and that needs five times as long for the same hash."""
