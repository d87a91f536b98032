"""Models as bytes on disk: manifests, shards, pieces, import and repair. Knows no ledger, no sockets and no engine."""
