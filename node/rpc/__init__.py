"""The node's voice: JSON-RPC 2.0 over HTTP. Knows the node only through `port.NodePort`."""
