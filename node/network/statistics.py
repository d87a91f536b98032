"""What the control plane says of itself and peers are told nothing of: frozen values, JSON as they stand."""

import msgspec


class GossipStatistics(msgspec.Struct, frozen=True):
    """`peers` are told at once now; the others are messages so far. `told`: by this node first. `taken`: from peers,
    new and right, and so told to others in turn. `passed_over`: from peers, known here or not right."""

    peers: int = 0
    told: int = 0
    taken: int = 0
    passed_over: int = 0
