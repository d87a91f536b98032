"""Where the layout says a value lies, the compiled contracts keep it."""

import pytest

from contracts import layout
from contracts.addresses import ADDRESSES, ContractName
from contracts.calls import AddAuthority, Call, DefineTier, GrantTier, RemoveAuthority, RetireModel, RevokeTier
from contracts.events import ContractEvent, ModelRegistered, ShardsAnnounced, TierGranted
from contracts.limits import AUTHORITIES_MAX, NAME_BYTES_MAX
from contracts.types import Address, ModelId, Version
from tests.contracts.chain import ADMIN, AUTHORITY, NODE_ID, NOW, USER, Chain, model

LONG = "n" * NAME_BYTES_MAX


def reader(chain: Chain, contract: ContractName) -> layout.ReadSlot:
    return lambda slot: chain.state.get_storage(ADDRESSES[contract], slot)


def done(chain: Chain, call: Call, kind: type) -> ContractEvent:
    return next(event for event in chain.send(ADMIN, call) if isinstance(event, kind))


def stands(chain: Chain, event: ContractEvent) -> bool:
    contract = layout.standing_in(event)
    assert contract is not None
    return layout.stands(event, reader(chain, contract))


def test_authorities_in_their_order(chain: Chain) -> None:
    read = reader(chain, "Accounts")
    assert layout.authorities(read) == (AUTHORITY.address,)
    others = [Address(bytes([i]) * 20) for i in range(1, AUTHORITIES_MAX)]
    for account in others:
        chain.send(ADMIN, AddAuthority(account))
    assert layout.authorities(read) == (AUTHORITY.address, *others)
    chain.send(ADMIN, RemoveAuthority(AUTHORITY.address))
    chain.send(ADMIN, RemoveAuthority(others[-1]))
    assert layout.authorities(read) == tuple(others[:-1])
    assert layout.authorities(read) == chain.view("Accounts", "authorities")


@pytest.mark.parametrize("names", [("smol", "1"), (LONG, LONG), ("a", LONG)], ids=["short", "long", "mixed"])
def test_registration_stands_until_it_is_retired(chain: Chain, names: tuple[str, str]) -> None:
    model_id, version = ModelId(names[0]), Version(names[1])
    event = done(chain, model(model_id=model_id, version=version), ModelRegistered)
    assert stands(chain, event)
    other = done(chain, model(model_id=ModelId("other")), ModelRegistered)
    chain.send(ADMIN, RetireModel(model_id, version))
    assert not stands(chain, event)
    assert stands(chain, other)


@pytest.mark.parametrize("name", ["basic", "t" * 32, "t" * 33, LONG], ids=[5, 32, 33, 64])
def test_grant_stands_until_it_is_revoked_or_replaced(chain: Chain, name: str) -> None:
    if name != "basic":
        chain.send(ADMIN, DefineTier(name, 200, 1))
    event = done(chain, GrantTier(USER.address, name, NOW + 100), TierGranted)
    assert stands(chain, event)
    longer = done(chain, GrantTier(USER.address, name, NOW + 101), TierGranted)
    assert (stands(chain, event), stands(chain, longer)) == (False, True)
    other = done(chain, GrantTier(USER.address, "pro", NOW + 101), TierGranted)
    assert (stands(chain, longer), stands(chain, other)) == (False, True)
    chain.send(ADMIN, RevokeTier(USER.address))
    assert not stands(chain, other)


def test_bytes_behind_a_text_mean_nothing(chain: Chain) -> None:
    """A client may fill the padding of a text with anything, and a shorter tier leaves the end of a longer one."""
    chain.send(ADMIN, DefineTier(LONG, 200, 1))
    chain.send(ADMIN, GrantTier(USER.address, LONG, NOW + 100))
    call = GrantTier(USER.address, "pro", NOW + 100)
    data = call.encode()
    assert data.endswith(b"pro" + bytes(29))
    (event,) = chain.send_raw(ADMIN, call.to, data[:-29] + b"\xff" * 29)
    assert event == TierGranted(USER.address, "pro", NOW + 100)
    assert stands(chain, event)
    assert not stands(chain, TierGranted(USER.address, "pr", NOW + 100))
    assert not stands(chain, TierGranted(USER.address, "prx", NOW + 100))
    assert not stands(chain, TierGranted(USER.address, "prp", NOW + 100))


def test_of_announcements_no_storage_tells() -> None:
    assert layout.standing_in(ShardsAnnounced(NODE_ID, ModelId("smol"), Version("1"), (0,))) is None
