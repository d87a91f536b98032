"""What the ledger accepts: Vyper sources, their ABI and bytecode, typed events and calls. No storage, no network."""
