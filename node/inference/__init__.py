"""The inference engine: verified shards in, text out. Knows no ledger, no sockets of other nodes and no RPC."""
