"""A new network from a ready-made one. Knows no EVM and reads no clock."""

from collections.abc import Sequence

import msgspec

from contracts.types import Address
from genesis.checks import check
from genesis.config import Account, GenesisConfig, template


def new_genesis(
    template_name: str,
    *,
    admins: Sequence[Address],
    authorities: Sequence[Address],
    timestamp: int,
    accounts: Sequence[Account] = (),
    name: str | None = None,
    chain_id: int | None = None,
    shard_size: int | None = None,
) -> GenesisConfig:
    """A ready-made network with its founders filled in; what is not given stays as the template has it.

    `timestamp` is in Unix seconds, `shard_size` in bytes. Raises NotFound for an unknown template and BadInput for a
    value that no network could start with.
    """
    base = template(template_name)
    network = msgspec.structs.replace(
        base.network,
        timestamp=timestamp,
        name=base.network.name if name is None else name,
        chain_id=base.network.chain_id if chain_id is None else chain_id,
    )
    size = base.shards.size if shard_size is None else shard_size
    config = msgspec.structs.replace(
        base,
        network=network,
        admins=tuple(admins),
        authorities=tuple(authorities),
        accounts=(*base.accounts, *accounts),
        shards=msgspec.structs.replace(base.shards, size=size),
    )
    check(config)
    return config
