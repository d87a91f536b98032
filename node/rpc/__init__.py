"""The node's voice: JSON-RPC 2.0 over HTTP and WebSocket. Knows the node only through `port.NodePort`, and
for Ethereum's methods the ledger itself."""
