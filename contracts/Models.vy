# pragma version 0.4.3
# pragma evm-version cancun
"""
@title The approved models
@notice Owns which models are registered, what they consist of, which are retired or public, and which one is core.
        The hash lists live in the log of the registration; storage keeps their count and a digest of them.
        Asks Accounts who is an admin and Tiers which tiers exist.
"""

import text

interface Accounts:
    def is_admin(account: address) -> bool: view

interface Tiers:
    def is_tier(name: String[64]) -> bool: view

struct Model:
    shard_count: uint32
    retired: bool
    shard_hashes_digest: bytes32
    manifest_hash: bytes32
    minimum_tier: String[64]

SHARDS_PER_MODEL_MAX: constant(uint256) = 1024
SHARD_SIZE_STEP: constant(uint64) = 1048576  # bytes: a shard is whole pieces of 1 MiB

event ModelRegistered:
    model_id: String[64]
    version: String[64]
    total_size: uint64
    shard_size: uint64
    shard_count: uint32
    shard_hashes: DynArray[bytes32, SHARDS_PER_MODEL_MAX]
    manifest_hash: bytes32
    minimum_tier: String[64]
    core: bool
    architecture: String[64]
    metadata: String[1024]
    admin: indexed(address)

event ModelRetired:
    model_id: String[64]
    version: String[64]

event ModelPublicSet:
    model_id: String[64]
    version: String[64]
    is_public: bool

event CoreModelSet:
    model_id: String[64]
    version: String[64]

accounts: public(immutable(address))
tiers: public(immutable(address))

_models: HashMap[String[64], HashMap[String[64], Model]]
core_model_id: public(String[64])
core_version: public(String[64])
is_public: public(HashMap[String[64], HashMap[String[64], bool]])


@deploy
def __init__(accounts_: address, tiers_: address):
    accounts = accounts_
    tiers = tiers_


@external
def register(
    model_id: String[64],
    version: String[64],
    total_size: uint64,
    shard_size: uint64,
    shard_count: uint32,
    shard_hashes: DynArray[bytes32, SHARDS_PER_MODEL_MAX],
    manifest_hash: bytes32,
    minimum_tier: String[64],
    core: bool,
    architecture: String[64],
    metadata: String[1024],
):
    """
    @notice Register a model once and for all; with `core` it becomes the core model in the same transaction.
    @param total_size Bytes of the artifact.
    @param shard_size Bytes of every shard but the last, a multiple of 1 MiB.
    @param shard_hashes SHA-256 of each shard in order.
    @param manifest_hash SHA-256 of the manifest.
    @param minimum_tier The lowest tier that may use it.
    @param metadata Free printable ASCII, by custom a JSON object.
    """
    self._require_admin()
    assert text.is_name(model_id), "model_id must match [a-z0-9][a-z0-9._-]{0,63}"
    assert text.is_name(version), "version must match [a-z0-9][a-z0-9._-]{0,63}"
    assert not self._is_known(model_id, version), "model is already registered"
    assert total_size > 0, "total_size is zero"
    assert shard_size > 0, "shard_size is zero"
    assert shard_size % SHARD_SIZE_STEP == 0, "shard_size is not a multiple of 1 MiB"
    # Adding before dividing could overflow; this cannot, as total_size is at least 1.
    count: uint64 = (total_size - 1) // shard_size + 1
    assert convert(shard_count, uint64) == count, "shard_count is not ceil(total_size / shard_size)"
    assert convert(shard_count, uint256) == len(shard_hashes), "shard_count is not the number of shard_hashes"
    for shard_hash: bytes32 in shard_hashes:
        assert shard_hash != empty(bytes32), "a shard hash is zero"
    assert manifest_hash != empty(bytes32), "manifest_hash is zero"
    assert staticcall Tiers(tiers).is_tier(minimum_tier), "unknown tier"
    assert text.is_printable(architecture), "architecture is not printable ASCII"
    assert text.is_printable(metadata), "metadata is not printable ASCII"
    self._models[model_id][version] = Model(
        shard_count=shard_count,
        retired=False,
        shard_hashes_digest=keccak256(abi_encode(shard_hashes)),
        manifest_hash=manifest_hash,
        minimum_tier=minimum_tier,
    )
    log ModelRegistered(
        model_id=model_id,
        version=version,
        total_size=total_size,
        shard_size=shard_size,
        shard_count=shard_count,
        shard_hashes=shard_hashes,
        manifest_hash=manifest_hash,
        minimum_tier=minimum_tier,
        core=core,
        architecture=architecture,
        metadata=metadata,
        admin=msg.sender,
    )
    if core:
        self._set_core(model_id, version)


@external
def retire(model_id: String[64], version: String[64]):
    """
    @notice Withdraw a model from use for good; it is public no longer. The core model stays until another is core.
    """
    self._require_admin()
    self._require_active(model_id, version)
    assert not self._is_core(model_id, version), "model is the core model, set another core first"
    self._models[model_id][version].retired = True
    self.is_public[model_id][version] = False
    log ModelRetired(model_id=model_id, version=version)


@external
def set_core(model_id: String[64], version: String[64]):
    """
    @notice Make a model the one that workers preload and pin.
    """
    self._require_admin()
    self._require_active(model_id, version)
    assert not self._is_core(model_id, version), "model is already the core model"
    self._set_core(model_id, version)


@external
def set_public(model_id: String[64], version: String[64], is_public: bool):
    """
    @notice Let nodes serve a model's bytes to anybody, for mirrors outside the network, or to members alone again.
            Who may use the model stays a matter of tiers.
    """
    self._require_admin()
    self._require_active(model_id, version)
    if is_public:
        assert not self.is_public[model_id][version], "model is already public"
    else:
        assert self.is_public[model_id][version], "model is not public"
    self.is_public[model_id][version] = is_public
    log ModelPublicSet(model_id=model_id, version=version, is_public=is_public)


@external
@view
def required_tier(model_id: String[64], version: String[64]) -> String[64]:
    """
    @notice The lowest tier that may use a model. Reverts for a model that is unknown or retired.
    """
    self._require_active(model_id, version)
    return self._models[model_id][version].minimum_tier


@external
@view
def active_shard_count(model_id: String[64], version: String[64]) -> uint32:
    """
    @notice The shard_count of a model in use. Reverts for a model that is unknown or retired.
    """
    self._require_active(model_id, version)
    return self._models[model_id][version].shard_count


@external
@view
def shard_count_of(model_id: String[64], version: String[64]) -> uint32:
    """
    @notice The shard_count of a model, retired or not. Reverts for one that is unknown.
    """
    assert self._is_known(model_id, version), "unknown model"
    return self._models[model_id][version].shard_count


@external
@view
def model(model_id: String[64], version: String[64]) -> Model:
    """
    @notice What storage holds of a model; shard_count 0 means that it is unknown.
    """
    return self._models[model_id][version]


@internal
@view
def _is_known(model_id: String[64], version: String[64]) -> bool:
    return self._models[model_id][version].shard_count > 0


@internal
@view
def _is_core(model_id: String[64], version: String[64]) -> bool:
    return self.core_model_id == model_id and self.core_version == version


@internal
@view
def _require_active(model_id: String[64], version: String[64]):
    assert self._is_known(model_id, version), "unknown model"
    assert not self._models[model_id][version].retired, "model is retired"


@internal
def _set_core(model_id: String[64], version: String[64]):
    self.core_model_id = model_id
    self.core_version = version
    log CoreModelSet(model_id=model_id, version=version)


@internal
@view
def _require_admin():
    assert staticcall Accounts(accounts).is_admin(msg.sender), "sender is not an admin"
