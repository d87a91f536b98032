"""What `getProof` may be asked, and which event on the ledger answers it. Knows no tries and no files.

| kind  | params                                   | the event                                      |
|-------|------------------------------------------|------------------------------------------------|
| model | model_id, version?                       | its registration, retired or not               |
| tier  | account                                  | the grant in force                             |
| shard | model_id, version?, shard_index, node_id | the node's newest announcement, not withdrawn  |
"""

from __future__ import annotations

from typing import Literal

from contracts.errors import BadInput, NotFound
from contracts.events import ContractEvent, ModelRegistered, ShardsAnnounced, TierGranted
from contracts.types import ModelId, NodeId, Version
from ledger.prover import Shows
from node.rpc import params
from node.rpc.port import NodePort
from node.rpc.values import ModelInfo

KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "model": (("model_id",), ("version",)),
    "tier": (("account",), ()),
    "shard": (("model_id", "shard_index", "node_id"), ("version",)),
}
"""The params each kind needs, and those it may have."""


class ProofParams(params.Params, frozen=True):
    kind: Literal["model", "tier", "shard"]
    model_id: ModelId | None = None
    version: Version | None = None
    account: str | None = None
    shard_index: int | None = None
    node_id: NodeId | None = None


def question(node: NodePort, given: ProofParams, model: ModelInfo | None) -> Shows:
    """The event to look for; `model` is the one that `given` names. Raises BadInput, or NotFound when the ledger as it
    stands has no such event."""
    _check_kind(given)
    if given.kind == "tier":
        assert given.account is not None
        return _grant(node, given.account)
    assert model is not None
    if given.kind == "model":
        return _registration(model)
    assert given.shard_index is not None
    assert given.node_id is not None
    return _announcement(node, model, given.shard_index, given.node_id)


def _check_kind(given: ProofParams) -> None:
    needed, allowed = KINDS[given.kind]
    names = {name for name in given.__struct_fields__[1:] if getattr(given, name) is not None}
    if not set(needed) <= names <= {*needed, *allowed}:
        raise BadInput(
            f"getProof of kind {given.kind} takes {', '.join((*needed, *(f'{name}?' for name in allowed)))}; "
            f"given were {', '.join(sorted(names)) or 'none'}"
        )


def _registration(model: ModelInfo) -> Shows:
    def shows(event: ContractEvent) -> bool:
        return isinstance(event, ModelRegistered) and _key(event) == (model.model_id, model.version)

    return shows


def _grant(node: NodePort, text: str) -> Shows:
    account = params.address("account", text)
    if node.account(account).tier is None:
        raise NotFound(f"account 0x{account.hex()} holds no tier now: an admin runs `aigen tier grant`")

    def shows(event: ContractEvent) -> bool:
        return isinstance(event, TierGranted) and event.account == account

    return shows


def _announcement(node: NodePort, model: ModelInfo, shard_index: int, node_id: NodeId) -> Shows:
    shards = node.shards(model.model_id, model.version)
    if not 0 <= shard_index < model.shard_count:
        raise BadInput(
            f"shard_index is {shard_index}; {model.model_id} version {model.version} has shards 0 to "
            f"{model.shard_count - 1}"
        )
    if node_id not in {location.node_id for location in shards[shard_index].locations}:
        raise NotFound(
            f"node {params.shown(node_id)} does not announce shard {shard_index} of {model.model_id} version "
            f"{model.version}: getShardLocations (`aigen shard list`) shows who does"
        )

    def shows(event: ContractEvent) -> bool:
        return (
            isinstance(event, ShardsAnnounced)
            and (event.node_id, *_key(event)) == (node_id, model.model_id, model.version)
            and shard_index in event.shard_indices
        )

    return shows


def _key(event: ModelRegistered | ShardsAnnounced) -> tuple[ModelId, Version]:
    return event.model_id, event.version
