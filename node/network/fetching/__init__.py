"""Fetching a shard from many untrusted sources at once. Knows no ledger: the caller says who may have what.

    sources on the ledger ──> Fetcher ──> Flight: one for each shard under way
                                 │          │
                              Records       ├── PieceQueue: what is asked of whom (pure)
                       (speed, failures)    │
                                            ├── lane <── peer ─────┐
                                            ├── lane <── mirror ───┼── piece ──> its SHA-256 ──> PartialShard ──> held
                                            └── lane <── gateway ──┘        in the lane's thread      └─ the shard's

A lane is one connection with a worker thread at a time: it receives a piece, proves it and writes it. One more thread
takes the shard's own SHA-256 in order behind the pieces, out of the page cache.
"""
