"""The named maximums of the contracts, for Python to refuse early what the ledger would refuse late.

The contracts enforce each of them; tests hold these numbers against what the compiled code accepts. Knows no contract.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from contracts.types import SHARDS_PER_MODEL_MAX

NAME_BYTES_MAX: Final = 64
"""Bytes of a model_id, version or tier."""

NODE_ID_BYTES_MAX: Final = 64
ROLE_BYTES_MAX: Final = 16
ENDPOINT_BYTES_MAX: Final = 128
BACKEND_BYTES_MAX: Final = 8
URI_BYTES_MAX: Final = 256
ARCHITECTURE_BYTES_MAX: Final = 64
METADATA_BYTES_MAX: Final = 1024

ACCOUNTS_PER_CALL_MAX: Final = 256
AUTHORITIES_MAX: Final = 31
ENDPOINTS_PER_NODE_MAX: Final = 8
NODES_PER_OPERATOR_MAX: Final = 256
MIRRORS_PER_MODEL_MAX: Final = 64

CHECK_PERIOD_S_MAX: Final = 366 * 24 * 3600
RANK_MAX: Final = 255
UINT64_MAX: Final = 2**64 - 1

ROLES: Final = ("worker", "storage", "gateway")
BACKENDS: Final = ("http", "ipfs")

TEXT_BYTES_MAX: Final[Mapping[str, int]] = MappingProxyType(
    {
        "model_id": NAME_BYTES_MAX,
        "version": NAME_BYTES_MAX,
        "name": NAME_BYTES_MAX,
        "tier": NAME_BYTES_MAX,
        "minimum_tier": NAME_BYTES_MAX,
        "architecture": ARCHITECTURE_BYTES_MAX,
        "metadata": METADATA_BYTES_MAX,
        "node_id": NODE_ID_BYTES_MAX,
        "role": ROLE_BYTES_MAX,
        "endpoints": ENDPOINT_BYTES_MAX,
        "backend": BACKEND_BYTES_MAX,
        "uri": URI_BYTES_MAX,
    }
)
"""The most bytes of each text argument; of a list, of each of its items."""

ITEMS_MAX: Final[Mapping[str, int]] = MappingProxyType(
    {
        "accounts": ACCOUNTS_PER_CALL_MAX,
        "endpoints": ENDPOINTS_PER_NODE_MAX,
        "shard_hashes": SHARDS_PER_MODEL_MAX,
        "shard_indices": SHARDS_PER_MODEL_MAX,
    }
)
"""The most items of each list argument."""
