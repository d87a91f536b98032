"""The network room: identity, peers and block sync (control plane), serving and fetching pieces (data plane)."""
