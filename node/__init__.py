"""Events in, model answers out. Uses contracts, genesis and ledger; none of them knows it."""
