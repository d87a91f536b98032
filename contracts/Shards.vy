# pragma version 0.4.3
# pragma evm-version cancun
"""
@title Who holds which shard, and where else the bytes are
@notice Owns the rules of announcements and the set of mirrors. Announcements are leases, repeated to renew them, and
        live in the log only; a mirror is stored so that it is added and removed once.
        Asks Accounts, Models and Members.
"""

import text

interface Accounts:
    def is_admin(account: address) -> bool: view
    def is_enrolled(account: address) -> bool: view

interface Models:
    def active_shard_count(model_id: String[64], version: String[64]) -> uint32: view
    def shard_count_of(model_id: String[64], version: String[64]) -> uint32: view

interface Members:
    def operator_of(node_id: String[64]) -> address: view

SHARDS_PER_MODEL_MAX: constant(uint256) = 1024
MIRRORS_PER_MODEL_MAX: constant(uint256) = 64

event ShardsAnnounced:
    node_id: String[64]
    model_id: String[64]
    version: String[64]
    shard_indices: DynArray[uint16, SHARDS_PER_MODEL_MAX]

event ShardsWithdrawn:
    node_id: String[64]
    model_id: String[64]
    version: String[64]
    shard_indices: DynArray[uint16, SHARDS_PER_MODEL_MAX]

event MirrorAdded:
    model_id: String[64]
    version: String[64]
    backend: String[8]
    uri: String[256]

event MirrorRemoved:
    model_id: String[64]
    version: String[64]
    backend: String[8]
    uri: String[256]

accounts: public(immutable(address))
models: public(immutable(address))
members: public(immutable(address))

_mirrors: HashMap[bytes32, bool]
mirror_count: public(HashMap[String[64], HashMap[String[64], uint256]])


@deploy
def __init__(accounts_: address, models_: address, members_: address):
    accounts = accounts_
    models = models_
    members = members_


@external
def announce(
    node_id: String[64],
    model_id: String[64],
    version: String[64],
    shard_indices: DynArray[uint16, SHARDS_PER_MODEL_MAX],
):
    """
    @notice Say that a node holds shards, verified. By the node's operator; again to renew.
    @param shard_indices From 0, strictly ascending.
    """
    operator: address = self._operator_of(node_id)
    assert operator == msg.sender, "sender is not the node's operator"
    assert staticcall Accounts(accounts).is_enrolled(msg.sender), "sender is not enrolled"
    shard_count: uint32 = staticcall Models(models).active_shard_count(model_id, version)
    self._require_indices(shard_indices, shard_count)
    log ShardsAnnounced(node_id=node_id, model_id=model_id, version=version, shard_indices=shard_indices)


@external
def withdraw(
    node_id: String[64],
    model_id: String[64],
    version: String[64],
    shard_indices: DynArray[uint16, SHARDS_PER_MODEL_MAX],
):
    """
    @notice Say that a node holds shards no longer. By the node's operator or an admin; also of a retired model.
    @param shard_indices From 0, strictly ascending.
    """
    operator: address = self._operator_of(node_id)
    if operator != msg.sender:
        assert staticcall Accounts(accounts).is_admin(msg.sender), "sender is neither the node's operator nor an admin"
    shard_count: uint32 = staticcall Models(models).shard_count_of(model_id, version)
    self._require_indices(shard_indices, shard_count)
    log ShardsWithdrawn(node_id=node_id, model_id=model_id, version=version, shard_indices=shard_indices)


@external
def add_mirror(model_id: String[64], version: String[64], backend: String[8], uri: String[256]):
    """
    @notice Name a place outside the network that serves a model's bytes. Trusted with nothing: every piece is proved.
    """
    self._require_admin()
    assert backend == "http" or backend == "ipfs", "backend is not http or ipfs"
    assert text.is_uri(uri), "uri is empty or not printable ASCII without blanks"
    if backend == "http":
        assert self._is_http(uri), "uri of an http mirror must begin with http:// or https://"
    assert staticcall Models(models).active_shard_count(model_id, version) > 0  # it reverts with the reason itself
    key: bytes32 = self._mirror_key(model_id, version, backend, uri)
    assert not self._mirrors[key], "mirror is already added"
    assert self.mirror_count[model_id][version] < MIRRORS_PER_MODEL_MAX, "model already has 64 mirrors"
    self._mirrors[key] = True
    self.mirror_count[model_id][version] += 1
    log MirrorAdded(model_id=model_id, version=version, backend=backend, uri=uri)


@external
def remove_mirror(model_id: String[64], version: String[64], backend: String[8], uri: String[256]):
    """
    @notice Take a mirror out; also of a retired model.
    """
    self._require_admin()
    key: bytes32 = self._mirror_key(model_id, version, backend, uri)
    assert self._mirrors[key], "unknown mirror"
    self._mirrors[key] = False
    self.mirror_count[model_id][version] -= 1
    log MirrorRemoved(model_id=model_id, version=version, backend=backend, uri=uri)


@external
@view
def is_mirror(model_id: String[64], version: String[64], backend: String[8], uri: String[256]) -> bool:
    """
    @notice Whether this mirror is added.
    """
    return self._mirrors[self._mirror_key(model_id, version, backend, uri)]


@internal
@view
def _operator_of(node_id: String[64]) -> address:
    operator: address = staticcall Members(members).operator_of(node_id)
    assert operator != empty(address), "unknown node"
    return operator


@internal
@pure
def _require_indices(shard_indices: DynArray[uint16, SHARDS_PER_MODEL_MAX], shard_count: uint32):
    assert len(shard_indices) > 0, "no shard_indices given"
    next_lowest: uint32 = 0
    for shard_index: uint16 in shard_indices:
        index: uint32 = convert(shard_index, uint32)
        assert index < shard_count, "unknown shard"
        assert index >= next_lowest, "shard_indices are not strictly ascending"
        next_lowest = index + 1


@internal
@pure
def _is_http(uri: String[256]) -> bool:
    if len(uri) > 8 and slice(uri, 0, 8) == "https://":
        return True
    return len(uri) > 7 and slice(uri, 0, 7) == "http://"


@internal
@pure
def _mirror_key(model_id: String[64], version: String[64], backend: String[8], uri: String[256]) -> bytes32:
    return keccak256(abi_encode(model_id, version, backend, uri))


@internal
@view
def _require_admin():
    assert staticcall Accounts(accounts).is_admin(msg.sender), "sender is not an admin"
