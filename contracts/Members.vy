# pragma version 0.4.3
# pragma evm-version cancun
"""
@title The member nodes
@notice Owns which nodes belong to the network and which account operates each. Role, endpoints, leases and the room
        for shards live in the log. Asks Accounts who is enrolled and who is an admin.
@dev That a node holds the key behind its node_id cannot be proved here (the EVM has no Ed25519): peers prove it to
     one another when they connect. An admin can remove a node that was registered in another's name.
"""

import text

interface Accounts:
    def is_admin(account: address) -> bool: view
    def is_enrolled(account: address) -> bool: view

ENDPOINTS_PER_NODE_MAX: constant(uint256) = 8
NODES_PER_OPERATOR_MAX: constant(uint256) = 256

event NodeJoined:
    node_id: String[64]
    operator: indexed(address)
    role: String[16]
    endpoints: DynArray[String[128], ENDPOINTS_PER_NODE_MAX]

event NodeLeft:
    node_id: String[64]

event LeaseRenewed:
    node_id: String[64]
    room: uint64

accounts: public(immutable(address))

operator_of: public(HashMap[String[64], address])
node_count: public(HashMap[address, uint256])


@deploy
def __init__(accounts_: address):
    accounts = accounts_


@external
def join(node_id: String[64], role: String[16], endpoints: DynArray[String[128], ENDPOINTS_PER_NODE_MAX]):
    """
    @notice Enter a node, whose operator is the sender; by the same operator again: change its role and endpoints.
    @param node_id The libp2p peer id, base58.
    @param endpoints Where peers reach it, best first; none for a node that only calls others.
    """
    assert staticcall Accounts(accounts).is_enrolled(msg.sender), "sender is not enrolled"
    assert text.is_base58(node_id), "node_id is not base58"
    known_role: bool = role == "worker" or role == "storage" or role == "gateway"
    assert known_role, "role is not worker, storage or gateway"
    for endpoint: String[128] in endpoints:
        assert text.is_uri(endpoint), "an endpoint is empty or not printable ASCII without blanks"
    operator: address = self.operator_of[node_id]
    if operator == empty(address):
        assert self.node_count[msg.sender] < NODES_PER_OPERATOR_MAX, "sender already operates 256 nodes"
        self.operator_of[node_id] = msg.sender
        self.node_count[msg.sender] += 1
    else:
        assert operator == msg.sender, "node belongs to another operator"
    log NodeJoined(node_id=node_id, operator=msg.sender, role=role, endpoints=endpoints)


@external
def leave(node_id: String[64]):
    """
    @notice Take a node out, by its operator or an admin. What it announced ends with it.
    """
    operator: address = self.operator_of[node_id]
    assert operator != empty(address), "unknown node"
    if operator != msg.sender:
        assert staticcall Accounts(accounts).is_admin(msg.sender), "sender is neither the node's operator nor an admin"
    self.operator_of[node_id] = empty(address)
    self.node_count[operator] -= 1
    log NodeLeft(node_id=node_id)


@external
def renew(node_id: String[64], room: uint64):
    """
    @notice Say that a node is there: what it announced stands for another lease, whose length the genesis config has.
            By its operator.
    @param room How many bytes of shards it would take beyond those it holds.
    """
    operator: address = self.operator_of[node_id]
    assert operator != empty(address), "unknown node"
    assert operator == msg.sender, "sender is not the node's operator"
    assert staticcall Accounts(accounts).is_enrolled(msg.sender), "sender is not enrolled"
    log LeaseRenewed(node_id=node_id, room=room)


@external
@view
def is_operator(account: address) -> bool:
    """
    @notice Whether an account operates at least one member node.
    """
    return self.node_count[account] > 0
