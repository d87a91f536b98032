"""The model registry: which models exist, which is core. A pure fold; no I/O, clock or randomness."""

from __future__ import annotations

import msgspec
from immutables import Map

from contracts import events
from contracts.errors import NotFound
from contracts.types import ManifestHash, ModelId, ShardHash, Version

ModelKey = tuple[ModelId, Version]


class Model(msgspec.Struct, frozen=True):
    """A registered model. Sizes in bytes; every shard but the last has `shard_size`."""

    model_id: ModelId
    version: Version
    total_size: int
    shard_size: int
    shard_count: int
    shard_hashes: tuple[ShardHash, ...]
    manifest_hash: ManifestHash
    minimum_tier: str
    architecture: str
    metadata: str
    registered: int
    """How many registrations came before it: the order of models is theirs."""
    retired: bool = False
    public: bool = False
    """Nodes serve its bytes to whoever proves a key, and not to members alone."""

    @property
    def key(self) -> ModelKey:
        return self.model_id, self.version

    def size_of_shard(self, shard_index: int) -> int:
        return min(self.shard_size, self.total_size - shard_index * self.shard_size)


class Registry(msgspec.Struct, frozen=True):
    """Models in the order they were registered, and the network's core model."""

    models: Map[ModelKey, Model] = Map()
    core: ModelKey | None = None

    def public_hashes(self) -> frozenset[bytes]:
        """The manifests and shards of public models: what is served to anybody."""
        public = [model for model in self.models.values() if model.public]
        return frozenset(found for model in public for found in (model.manifest_hash, *model.shard_hashes))

    def find(self, model_id: str, version: str | None = None) -> Model:
        """The named version, or the newest that is not retired. Raises NotFound."""
        versions = [model for model in self.models.values() if model.model_id == model_id]
        if version is not None:
            versions = [model for model in versions if model.version == version]
        elif in_service := [model for model in versions if not model.retired]:
            versions = in_service
        if not versions:
            name = model_id if version is None else f"{model_id} version {version}"
            raise NotFound(f"no model {name} is registered: `aigen model list` shows those that are")
        return max(versions, key=lambda model: model.registered)


def apply(state: Registry, event: events.ContractEvent) -> Registry:
    match event:
        case events.ModelRegistered():
            model = Model(
                model_id=ModelId(event.model_id),
                version=Version(event.version),
                total_size=event.total_size,
                shard_size=event.shard_size,
                shard_count=event.shard_count,
                shard_hashes=tuple(ShardHash(value) for value in event.shard_hashes),
                manifest_hash=ManifestHash(event.manifest_hash),
                minimum_tier=event.minimum_tier,
                architecture=event.architecture,
                metadata=event.metadata,
                registered=len(state.models),
            )
            return _with_model(state, model)
        case events.ModelRetired():
            key = ModelId(event.model_id), Version(event.version)
            return _with_model(state, msgspec.structs.replace(state.models[key], retired=True, public=False))
        case events.ModelPublicSet():
            key = ModelId(event.model_id), Version(event.version)
            return _with_model(state, msgspec.structs.replace(state.models[key], public=event.is_public))
        case events.CoreModelSet():
            return msgspec.structs.replace(state, core=(ModelId(event.model_id), Version(event.version)))
        case _:
            return state


def _with_model(state: Registry, model: Model) -> Registry:
    return msgspec.structs.replace(state, models=state.models.set(model.key, model))
