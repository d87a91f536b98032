"""Who has a place at a node's data plane, and who has to wait."""

from __future__ import annotations

import pytest

from contracts.errors import Busy
from contracts.types import PIECE_SIZE, NodeId
from node.network.places import Places
from node.network.wire import DataLimits

LIMITS = DataLimits(connections_max=6, connections_per_peer_max=2, handshakes_max=3, handshakes_per_address_max=2)
A, B, C, D = map(NodeId, "abcd")


def test_handshakes_are_bounded_by_address_and_altogether() -> None:
    places = Places(LIMITS, 0)
    assert [places.enter_handshake(address) for address in "xxxyy"] == [True, True, False, True, False]
    assert places.handshakes == 3
    places.leave_handshake("x")
    assert places.enter_handshake("y")
    for address in "xyy":
        places.leave_handshake(address)
    assert places.handshakes == 0


def test_members_are_bounded_by_node_and_altogether() -> None:
    places = Places(LIMITS, 0)
    for node_id in (A, A, B, B, C):
        places.take(node_id)
    with pytest.raises(Busy, match="a has 2 connections already"):
        places.take(A)
    places.take(D)
    with pytest.raises(Busy, match="6 connections are open, the most this node serves"):
        places.take(C)
    places.leave(A)
    places.take(C)
    assert places.connections == 6


def test_strangers_have_a_part_of_the_places_however_many_keys_they_have() -> None:
    places = Places(DataLimits(connections_max=16, connections_per_peer_max=3), 0)
    for node_id in (A, A, B, C):
        places.take(node_id, is_member=False)
    with pytest.raises(Busy, match="4 connections of strangers are open, the most this node serves"):
        places.take(D, is_member=False)
    for name in "mnop":
        for _ in range(3):
            places.take(NodeId(name))
    assert places.connections == 16
    places.leave(A, is_member=False)
    places.take(D, is_member=False)
    places.leave(NodeId("m"))
    with pytest.raises(Busy, match="strangers"):
        places.take(A, is_member=False)
    places.take(A)


@pytest.mark.parametrize(("most", "strangers"), [(1, 0), (2, 1), (3, 1), (4, 1), (6, 2), (64, 16)])
def test_strangers_never_have_the_last_place(most: int, strangers: int) -> None:
    assert Places(DataLimits(connections_max=most), 0).strangers_most == strangers


@pytest.mark.parametrize(("pieces_per_s", "most"), [(0, 6), (10, 6), (0.2, 3), (0.01, 1)])
def test_with_a_narrow_link_fewer_have_a_place(pieces_per_s: float, most: int) -> None:
    """Each still gets a piece in half the 30 s that it waits for one."""
    assert Places(LIMITS, int(pieces_per_s * PIECE_SIZE) + (pieces_per_s > 0)).most == most
