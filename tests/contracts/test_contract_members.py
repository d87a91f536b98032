"""Members: a node belongs to one operator, from joining to leaving."""

from typing import Any

import msgspec
import pytest

from contracts.calls import ExpelAccount, JoinNode, LeaveNode, RenewLease
from contracts.events import LeaseRenewed, NodeJoined, NodeLeft
from contracts.limits import ENDPOINT_BYTES_MAX, ENDPOINTS_PER_NODE_MAX, NODES_PER_OPERATOR_MAX, ROLES, UINT64_MAX
from contracts.types import NodeId
from tests.contracts.chain import ADMIN, JOIN, NODE_ID, OPERATOR, STRANGER, USER, Chain, Reverted, encode_loosely


def joining(**changes: Any) -> JoinNode:
    return msgspec.structs.replace(JOIN, **changes)


def node_id(i: int) -> NodeId:
    digits = "123456789"
    return NodeId("12D3KooW" + digits[i // 81 % 9] + digits[i // 9 % 9] + digits[i % 9])


@pytest.mark.parametrize("role", ROLES)
def test_join_and_leave(chain: Chain, role: str) -> None:
    assert chain.send(OPERATOR, joining(role=role)) == [NodeJoined(NODE_ID, OPERATOR.address, role, JOIN.endpoints)]
    assert chain.view("Members", "operator_of", NODE_ID) == OPERATOR.address
    assert chain.view("Members", "is_operator", OPERATOR.address)
    assert chain.send(OPERATOR, LeaveNode(NODE_ID)) == [NodeLeft(NODE_ID)]
    assert chain.view("Members", "operator_of", NODE_ID) == bytes(20)
    assert not chain.view("Members", "is_operator", OPERATOR.address)
    with pytest.raises(Reverted, match="unknown node"):
        chain.send(OPERATOR, LeaveNode(NODE_ID))


def test_join_again_changes_role_and_endpoints(chain: Chain) -> None:
    chain.send(OPERATOR, JOIN)
    short = [f"/dns4/{i}.example/tcp/1" for i in range(ENDPOINTS_PER_NODE_MAX - 1)]
    endpoints = (*short, "e" * ENDPOINT_BYTES_MAX)
    again = joining(role="storage", endpoints=endpoints)
    assert chain.send(OPERATOR, again) == [NodeJoined(NODE_ID, OPERATOR.address, "storage", endpoints)]
    assert chain.view("Members", "node_count", OPERATOR.address) == 1
    assert chain.send(OPERATOR, joining(endpoints=())) == [NodeJoined(NODE_ID, OPERATOR.address, "worker", ())]


def test_an_operator_may_have_more_nodes_than_one(chain: Chain) -> None:
    chain.send(OPERATOR, JOIN)
    chain.send(OPERATOR, joining(node_id=node_id(1)))
    chain.send(OPERATOR, LeaveNode(NODE_ID))
    assert chain.view("Members", "is_operator", OPERATOR.address)


def test_a_node_belongs_to_its_operator_until_it_leaves(chain: Chain) -> None:
    chain.send(OPERATOR, JOIN)
    for other in (USER, ADMIN):
        with pytest.raises(Reverted, match="node belongs to another operator"):
            chain.send(other, JOIN)
    with pytest.raises(Reverted, match="neither the node's operator nor an admin"):
        chain.send(USER, LeaveNode(NODE_ID))
    assert chain.send(ADMIN, LeaveNode(NODE_ID)) == [NodeLeft(NODE_ID)]
    assert chain.view("Members", "node_count", OPERATOR.address) == 0
    assert chain.view("Members", "node_count", ADMIN.address) == 0
    chain.send(USER, JOIN)
    assert chain.view("Members", "operator_of", NODE_ID) == USER.address


def test_who_is_expelled_may_only_leave(chain: Chain) -> None:
    chain.send(OPERATOR, JOIN)
    chain.send(ADMIN, ExpelAccount(OPERATOR.address))
    with pytest.raises(Reverted, match="sender is not enrolled"):
        chain.send(OPERATOR, JOIN)
    assert chain.send(OPERATOR, LeaveNode(NODE_ID)) == [NodeLeft(NODE_ID)]


def test_a_lease_is_renewed_by_the_nodes_operator_alone(chain: Chain) -> None:
    renewal = RenewLease(NODE_ID, 5 << 40)
    with pytest.raises(Reverted, match="unknown node"):
        chain.send(OPERATOR, renewal)
    chain.send(OPERATOR, JOIN)
    assert chain.send(OPERATOR, renewal) == [LeaseRenewed(NODE_ID, 5 << 40)]
    assert chain.send(OPERATOR, RenewLease(NODE_ID, UINT64_MAX)) == [LeaseRenewed(NODE_ID, UINT64_MAX)]
    for other in (USER, ADMIN):
        with pytest.raises(Reverted, match="sender is not the node's operator"):
            chain.send(other, renewal)
    chain.send(ADMIN, ExpelAccount(OPERATOR.address))
    with pytest.raises(Reverted, match="sender is not enrolled"):
        chain.send(OPERATOR, renewal)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"node_id": ""}, "node_id is not base58"),
        ({"node_id": "12D3 KooW"}, "node_id is not base58"),
        ({"node_id": "12D3-KooW"}, "node_id is not base58"),
        ({"role": ""}, "role is not worker, storage or gateway"),
        ({"role": "Worker"}, "role is not worker, storage or gateway"),
        ({"role": "authority"}, "role is not worker, storage or gateway"),
        ({"endpoints": ("",)}, "an endpoint is empty or not printable"),
        ({"endpoints": ("/ip4/1.2.3.4/tcp/1", "a b")}, "an endpoint is empty or not printable"),
        ({"endpoints": ("/ip4/1.2.3.4/tcp/1\n",)}, "an endpoint is empty or not printable"),
        ({"endpoints": ("é",)}, "an endpoint is empty or not printable"),
    ],
)
def test_join_refuses(chain: Chain, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(Reverted, match=reason):
        chain.send(OPERATOR, joining(**changes))


def test_join_refuses_strangers_and_bytes_that_are_no_text(chain: Chain) -> None:
    with pytest.raises(Reverted, match="sender is not enrolled"):
        chain.send(STRANGER, JOIN)
    for changes in ({"node_id": b"\xff"}, {"role": b"\xff"}, {"endpoints": (b"\xff",)}):
        with pytest.raises(Reverted):
            chain.send_raw(OPERATOR, JOIN.to, encode_loosely(joining(**changes)))


def test_nodes_of_an_operator_are_bounded(chain: Chain) -> None:
    for i in range(NODES_PER_OPERATOR_MAX):
        chain.send(OPERATOR, joining(node_id=node_id(i)))
    with pytest.raises(Reverted, match="already operates 256 nodes"):
        chain.send(OPERATOR, JOIN)
    chain.send(OPERATOR, joining(node_id=node_id(0), role="gateway"))
    chain.send(OPERATOR, LeaveNode(node_id(0)))
    chain.send(OPERATOR, JOIN)
