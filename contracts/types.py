"""The names and bounds the whole house shares. Knows no storage, no network and no other module."""

from typing import NewType

ModelId = NewType("ModelId", str)
"""A model's name on the ledger, `[a-z0-9][a-z0-9._-]{0,63}`."""

Version = NewType("Version", str)
"""A model's version on the ledger, the same alphabet as a ModelId."""

NodeId = NewType("NodeId", str)
"""A libp2p peer id of an Ed25519 key, base58 (`12D3KooW...`)."""

ShardHash = NewType("ShardHash", bytes)
"""The SHA-256 of a whole shard, 32 bytes."""

ManifestHash = NewType("ManifestHash", bytes)
"""The SHA-256 of a manifest's canonical bytes, 32 bytes."""

Address = NewType("Address", bytes)
"""An account or contract of the ledger, 20 bytes."""

TransactionHash = NewType("TransactionHash", bytes)
"""The Keccak-256 of a signed transaction, 32 bytes."""

EvidenceHash = NewType("EvidenceHash", bytes)
"""Names the proof that an authority contradicted itself, 32 bytes; zero for none."""

NAME_PATTERN = r"[a-z0-9][a-z0-9._-]{0,63}"
"""What a model_id, a version and a tier may be called (enforced by the contracts too)."""

PIECE_SIZE = 1 << 20
"""Bytes of a piece; also the raw leaf of the IPFS profile unixfs-v1-2025 (IPIP-499)."""

SHARD_SIZE_DEFAULT = 4 << 30
"""Bytes of a shard unless the genesis file says otherwise."""

SHARDS_PER_MODEL_MAX = 1024
"""The most shards one model may have: 4 TiB at the default shard size."""
