"""Proofs: they hold for whoever has the genesis file, on any ledger, and nothing that differs from one holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import msgspec
import pytest
import rlp
from eth.db.trie import make_trie_root_and_nodes
from eth.vm.forks.cancun.blocks import CancunBlockHeader
from eth.vm.forks.cancun.transactions import CancunTransactionBuilder
from eth_hash.auto import keccak

from contracts import events, layout
from contracts.calls import GrantTier, RetireModel, RevokeTier, SetCoreModel
from contracts.errors import BadInput, Conflict, NoSpace, NotFound
from contracts.types import ModelId
from genesis.block import GenesisBlock, build
from genesis.config import GenesisConfig
from ledger import proof as proofs
from ledger import prover, seal, witness
from ledger.chain import Chain
from ledger.keys import Key
from ledger.proof import Proof, Proven, Standing, Way, shown
from ledger.prover import Shows
from ledger.seal import Certificate
from tests.ledger.proofs import (
    KEYS,
    QUESTIONS,
    UNTIL,
    Network,
    alterations,
    certified_later,
    is_announcement,
    is_grant,
    is_registration,
    written,
)
from tests.ledger.world import (
    ADMIN,
    MODEL,
    NODE,
    OPERATOR,
    STRANGER,
    VERSION,
    enrol,
    make_config,
    open_chain,
    raw_call,
    register,
)


@dataclass(frozen=True)
class World:
    """A ledger, and what a stranger to it has."""

    config: GenesisConfig
    genesis: GenesisBlock
    chain: Chain

    def prove(self, shows: Shows) -> Proof:
        return prover.prove(self.chain.store, self.chain.tip.number, shows)

    def check(self, proof: Proof | bytes) -> Proven:
        data = proof if isinstance(proof, bytes) else proof.encode()
        return proofs.check(data, self.genesis, self.config.network.chain_id)

    def refused(self, proof: Proof | bytes, match: str = ".") -> None:
        with pytest.raises(BadInput, match=match) as refusal:
            self.check(proof)
        assert len(str(refusal.value).splitlines()) == 1

    def number_of(self, shows: Shows) -> int:
        return next(r.number for r in self.chain.store.records(1, 1000) if any(map(shows, r.events())))


def opened(path: Path, authorities: int) -> Iterator[World]:
    config = make_config(KEYS[:authorities])
    with open_chain(path / "ledger", config) as chain:
        yield World(config, build(config), chain)


@pytest.fixture(scope="module", params=[1, 4, 7])
def quiet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A ledger whose authorities never change, and all vote."""
    for world in opened(tmp_path_factory.mktemp("quiet"), request.param):
        Network(world.chain).live()
        yield world


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Four authorities become seven and then five, two of them new; the events lie between and after, and some blocks
    are final by the votes for a later one."""
    with open_chain(tmp_path_factory.mktemp("changing") / "ledger", make_config(KEYS[:4])) as source:
        network = Network(source)
        network.add(KEYS[4])
        network.remove(KEYS[4])
        network.add(*KEYS[4:7])
        network.live()
        network.remove(*KEYS[:3])
        network.grow(enrol(KEYS[9].address))
        network.add(KEYS[7])
        network.grow(enrol(KEYS[8].address))
        for world in opened(tmp_path_factory.mktemp("changed"), 4):
            certified_later(source, world.chain, {4: 6, 6: 7, 8: 9})
            yield world


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One authority becomes two, and three after the events: small, for what is tried a thousand times."""
    with open_chain(tmp_path_factory.mktemp("growing") / "ledger", make_config(KEYS[:1])) as source:
        network = Network(source)
        network.add(KEYS[1])
        network.live()
        network.add(KEYS[2])
        network.grow(enrol(KEYS[8].address))
        for world in opened(tmp_path_factory.mktemp("grown"), 1):
            certified_later(source, world.chain, {2: 4, 3: 4, 4: 5})
            yield world


@pytest.fixture
def young(tmp_path: Path) -> Iterator[World]:
    """An empty ledger of four authorities, for the test alone."""
    yield from opened(tmp_path, 4)


# What holds


@pytest.mark.parametrize("question", QUESTIONS)
def test_proof_holds_and_tells(quiet: World, question: str) -> None:
    shows = QUESTIONS[question]
    proven = quiet.check(quiet.prove(shows))
    number = quiet.number_of(shows)
    record = quiet.chain.store.record(number)
    authorities = quiet.chain.tip.accounts.authorities
    assert shows(proven.event)
    assert proven.event in list(record.events())
    assert (proven.block.number, proven.block.hash, proven.block.timestamp) == (number, record.hash, record.timestamp)
    assert proven.block.authority_count == len(authorities)
    assert len(proven.block.signers) == seal.quorum(len(authorities))
    assert set(proven.block.signers) <= authorities
    transaction = next(t for t in record.transactions if proven.event in t.events)
    assert (proven.sender, proven.transaction_hash) == (transaction.sender, transaction.hash)
    assert proven.changes == ()
    assert (proven.standing is None) == (question == "shard")
    assert proven.standing is None or proven.standing.hash == quiet.chain.tip.hash


def test_events_are_told_whole(quiet: World) -> None:
    registered = quiet.check(quiet.prove(is_registration))
    assert isinstance(registered.event, events.ModelRegistered)
    assert (registered.event.model_id, registered.event.manifest_hash) == (MODEL, b"\7" * 32)
    assert registered.event.admin == registered.sender == ADMIN.address
    assert quiet.check(quiet.prove(is_grant)).event == events.TierGranted(STRANGER.address, "pro", UNTIL)
    announced = quiet.check(quiet.prove(is_announcement))
    assert announced.event == events.ShardsAnnounced(NODE, MODEL, VERSION, (0, 1, 2))
    assert announced.sender == OPERATOR.address


@pytest.mark.parametrize("question", QUESTIONS)
def test_authorities_that_changed_are_followed(changed: World, question: str) -> None:
    proven = changed.check(changed.prove(QUESTIONS[question]))
    assert proven.changes == ((1, 2, 3) if question == "shard" else (1, 2, 3, 7, 9))
    assert proven.block.authority_count == 7
    assert set(proven.block.signers) <= {key.address for key in KEYS[:7]}
    if proven.standing is not None:
        assert proven.standing.number == 10
        assert proven.standing.authority_count == 5
        assert set(proven.standing.signers) <= {key.address for key in KEYS[3:8]}


def test_votes_for_a_later_block_are_taken_with_the_headers_between(changed: World) -> None:
    proof = changed.prove(is_registration)
    assert len(proof.way.block.descendants) == 2
    assert proof.standing is not None
    assert not proof.standing.way.block.descendants


def test_proof_is_small(young: World) -> None:
    Network(young.chain).live()
    sizes = {name: len(young.prove(shows).encode()) for name, shows in QUESTIONS.items()}
    assert max(sizes.values()) < 20_000, sizes


def test_largest_registration_among_many_transactions(young: World) -> None:
    network = Network(young.chain)
    big = register("big", shards=1024)
    calls = [enrol(Key.from_secret(bytes([1, i]) * 16).address) for i in range(9)]
    network.grow(*calls, big, *(register(f"small-{i}") for i in range(9)))
    proof = young.prove(lambda event: isinstance(event, events.ModelRegistered) and event.model_id == "big")
    event = young.check(proof).event
    assert isinstance(event, events.ModelRegistered)
    assert event.shard_hashes == big.shard_hashes
    assert len(proof.transaction) > 1
    assert len(proof.encode()) < proofs.PROOF_BYTES_MAX // 10


def test_newest_event_is_taken(young: World) -> None:
    network = Network(young.chain)
    network.grow(GrantTier(STRANGER.address, "basic", UNTIL), GrantTier(STRANGER.address, "pro", UNTIL))
    network.grow(GrantTier(OPERATOR.address, "basic", UNTIL))
    wanted = lambda event: isinstance(event, events.TierGranted) and event.account == STRANGER.address  # noqa: E731
    proven = young.check(young.prove(wanted))
    assert proven.event == events.TierGranted(STRANGER.address, "pro", UNTIL)
    assert proven.standing is not None


def test_what_was_undone_no_longer_stands(young: World) -> None:
    network = Network(young.chain)
    network.live()
    network.grow(register("other"), SetCoreModel(ModelId("other"), VERSION))
    network.grow(RetireModel(MODEL, VERSION), RevokeTier(STRANGER.address))
    proof = young.prove(lambda event: isinstance(event, events.ModelRegistered) and event.model_id == MODEL)
    assert young.check(proof).standing is None
    assert young.check(young.prove(is_grant)).standing is None
    proof_of_other = young.prove(is_registration)
    assert young.check(proof_of_other).standing is not None
    young.refused(msgspec.structs.replace(proof, standing=proof_of_other.standing), "not the|missing")
    network.grow(GrantTier(STRANGER.address, "basic", UNTIL))
    assert young.check(young.prove(is_grant)).standing is not None


@pytest.mark.parametrize(("tier", "until"), [("pro", UNTIL + 1), ("basic", UNTIL)])
def test_grant_that_was_replaced_no_longer_stands(young: World, tier: str, until: int) -> None:
    network = Network(young.chain)
    network.live()
    network.grow(GrantTier(STRANGER.address, tier, until))
    first = events.TierGranted(STRANGER.address, "pro", UNTIL)
    assert young.check(young.prove(lambda event: event == first)).standing is None
    assert young.check(young.prove(is_grant)).standing is not None


def test_standing_may_be_left_out_and_then_proves_less(quiet: World) -> None:
    proof = quiet.prove(is_registration)
    less = quiet.check(msgspec.structs.replace(proof, standing=None))
    assert less.standing is None
    assert less.block == quiet.check(proof).block


# What there is no proof of


def test_nothing_to_prove(young: World) -> None:
    with pytest.raises(Conflict, match="genesis file"):
        young.prove(is_grant)  # the accounts of the config hold tiers from block 0
    with pytest.raises(NotFound, match="up to block 0"):
        young.prove(is_registration)


@pytest.mark.parametrize(("name", "match"), [("CHANGES_MAX", "changes"), ("DESCENDANTS_MAX", "blocks after it")])
def test_too_much_for_a_proof(changed: World, monkeypatch: pytest.MonkeyPatch, name: str, match: str) -> None:
    monkeypatch.setattr(prover, name, 1)
    with pytest.raises(NoSpace, match=match):
        changed.prove(is_registration)


# What does not hold


def no_alteration_holds(world: World, question: str) -> int:
    """How many were tried."""
    proof = world.prove(QUESTIONS[question])
    world.check(proof)
    tried = 0
    for where, data in alterations(proof):
        tried += 1
        refusal = refusal_of(world, data)
        assert refusal is not None, f"it holds after this change: {where}"
        assert len(refusal.splitlines()) == 1, where
    return tried


def refusal_of(world: World, data: bytes) -> str | None:
    try:
        world.check(data)
    except BadInput as refusal:
        return str(refusal)
    return None


@pytest.mark.parametrize("question", ["model", "shard"])
def test_no_alteration_of_a_proof_holds(growing: World, question: str) -> None:
    proven = growing.check(growing.prove(QUESTIONS[question]))
    assert proven.changes == ((1,) if question == "shard" else (1, 5))
    assert no_alteration_holds(growing, question) > 200


@pytest.mark.soak
@pytest.mark.parametrize("question", QUESTIONS)
def test_no_alteration_of_a_proof_of_seven_holds(changed: World, question: str) -> None:
    assert no_alteration_holds(changed, question) > 500


def test_no_altered_byte_of_the_file(quiet: World) -> None:
    data, random = quiet.prove(is_announcement).encode(), Random(5)
    for _ in range(300):
        place = random.randrange(len(data))
        changed = data[:place] + bytes([data[place] ^ random.randrange(1, 256)]) + data[place + 1 :]
        quiet.refused(changed)
        quiet.refused(data[:place])


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_other_number_of_votes_than_a_quorum(young: World, count: int) -> None:
    """More would hold as well: a proof has one form, so that nobody wonders why two differ."""
    Network(young.chain).grow(register())
    proof = young.prove(is_registration)
    votes = tuple(map(shown, young.chain.store.sealed(1).certificate.votes))
    assert proof.way.block.votes == votes[:3]
    block = msgspec.structs.replace(proof.way.block, votes=votes[:count])
    young.refused(msgspec.structs.replace(proof, way=Way((), block)), f"{count} votes, a proof has the 3")


def test_change_that_changes_nothing(young: World) -> None:
    network = Network(young.chain)
    network.live()
    before, after = young.prove(is_registration), young.prove(is_grant)
    root = young.chain.store.sealed(1).header().state_root
    change = proofs.Change(before.way.block, nodes_of(young, root))
    young.refused(msgspec.structs.replace(after, way=Way((change,), after.way.block)), "block 1 does not change")


@pytest.mark.parametrize("other", [0, 1])
def test_parts_of_another_proof(young: World, other: int) -> None:
    network = Network(young.chain)
    network.live()
    network.grow(register("another"), GrantTier(OPERATOR.address, "pro", UNTIL))
    ours = young.prove(lambda event: isinstance(event, events.ModelRegistered) and event.model_id == MODEL)
    theirs = young.prove((is_registration, is_grant)[other])
    for field in ("way", "transaction", "receipt"):
        young.refused(msgspec.structs.replace(ours, **{field: getattr(theirs, field)}))
    assert ours.standing is not None
    assert theirs.standing is not None
    young.refused(msgspec.structs.replace(ours, standing=theirs.standing))
    for field in ("header", "votes"):
        block = msgspec.structs.replace(ours.way.block, **{field: getattr(theirs.way.block, field)})
        changed = msgspec.structs.replace(ours, way=Way((), block))
        if changed != ours:
            young.refused(changed)


def test_standing_before_the_event_or_of_an_announcement(young: World) -> None:
    network = Network(young.chain)
    network.live()
    grant = young.prove(is_grant)
    network.grow(RevokeTier(STRANGER.address))
    network.grow(GrantTier(STRANGER.address, "pro", UNTIL))
    again = young.prove(is_grant)
    young.refused(msgspec.structs.replace(again, standing=grant.standing), "comes after block 5")
    announcement = young.prove(is_announcement)
    young.refused(msgspec.structs.replace(announcement, standing=again.standing), "no state tells")


def test_event_that_no_proof_is_about(young: World) -> None:
    network = Network(young.chain)
    number = network.grow(enrol(STRANGER.address))
    with pytest.raises(BadInput, match="0 events"):
        proofs.provable_event(young.chain.store.receipts(number)[0])
    failed = network.grow(enrol(STRANGER.address))
    with pytest.raises(BadInput, match="failed"):
        proofs.provable_event(young.chain.store.receipts(failed)[0])


@pytest.mark.parametrize("same_authorities", [True, False])
def test_another_genesis(quiet: World, same_authorities: bool) -> None:
    proof = quiet.prove(is_registration)
    config = make_config(
        [k for k in KEYS if k.address in quiet.config.authorities and same_authorities] or KEYS[:2], ()
    )
    other = build(config)
    with pytest.raises(BadInput, match="of the network with genesis 0x"):
        proofs.check(proof.encode(), other, config.network.chain_id)
    renamed = msgspec.structs.replace(proof, genesis_hash=shown(other.hash))
    with pytest.raises(BadInput, match="does not hold"):
        proofs.check(renamed.encode(), other, config.network.chain_id)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        b"null",
        b"{}",
        b"\xff\xfe",
        b"[" * 200_000,
        b'{"format":' + b"[" * 200_000,
        b'{"more":' + b"[" * 200_000,
        b'{"way":{"changes":[' + b'{"block":' * 200_000,
        b'{"transaction_index":' + b"9" * 5000 + b"}",
        bytes(proofs.PROOF_BYTES_MAX + 1),
        b"[" * proofs.PROOF_BYTES_MAX,
    ],
    ids=range(12),
)
def test_no_proof_at_all(quiet: World, data: bytes) -> None:
    quiet.refused(data, "not a proof|at most")


def test_size_is_looked_at_first(quiet: World) -> None:
    data = quiet.prove(is_registration).encode()
    quiet.refused(data + b" " * proofs.PROOF_BYTES_MAX, "at most 8388608 are read")


def test_only_the_text_as_it_was_made(quiet: World) -> None:
    data = quiet.prove(is_registration).encode()
    tree = msgspec.json.decode(data)
    assert written(tree) == data
    for other in (
        msgspec.json.encode(tree),
        data[:-1],
        data + b"\n",
        data.replace(b'"format"', b'"\\u0066ormat"', 1),
        data.replace(b'"transaction_index"', b'"transaction_index": 1,\n "transaction_index"', 1),
        written(dict(reversed(tree.items()))),
    ):
        quiet.refused(other, "as it was made")


def test_lists_are_bounded(quiet: World) -> None:
    proof = quiet.prove(is_registration)
    assert proof.standing is not None
    block = proof.way.block
    replace = msgspec.structs.replace
    change = proofs.Change(block, proof.transaction)
    for wrong in (
        replace(proof, transaction=proof.transaction * (proofs.NODES_MAX + 1)),
        replace(proof, receipt=("0x" + "00" * (proofs.NODE_BYTES_MAX + 1),)),
        replace(proof, way=Way((change,) * (proofs.CHANGES_MAX + 1), block)),
        replace(proof, way=Way((), replace(block, descendants=(block.header,) * (proofs.DESCENDANTS_MAX + 1)))),
        replace(proof, way=Way((), replace(block, votes=block.votes * 32))),
        replace(proof, way=Way((), replace(block, header="0x" + "00" * (seal.HEADER_BYTES_MAX + 1)))),
    ):
        quiet.refused(wrong, "length <=|at most")


# Authorities that lie, or did


def test_honest_vote_of_a_former_quorum_is_none_of_the_authorities_in_force(tmp_path: Path) -> None:
    """One authority became seven. It votes for a block that the other six never make final; by a proof that leaves the
    change out, its vote would be the quorum of one."""
    for world in opened(tmp_path, 1):
        network = Network(world.chain)
        network.add(*KEYS[1:7])
        executed, raws = network.execute(register())
        certificate = seal.certify(world.chain.tip.epoch, executed.header, [KEYS[0]])
        proof = by_hand(executed.header, raws[0], executed.receipts[0].encode(), world, certificate)
        world.refused(proof, f"not of the epoch that began with 0x{world.genesis.hash.hex()}")
        # Its vote alone does not count either: what it signed is of its epoch.
        old = executed.header.copy(extra_data=seal.unsealed_extra_data(world.genesis.hash, 2))
        header = seal.seal(old, KEYS[0])
        certificate = seal.certify(world.chain.tip.epoch, header, [KEYS[0]])
        proof = by_hand(header, raws[0], executed.receipts[0].encode(), world, certificate)
        world.refused(proof, "voted and is no authority")


def test_change_cannot_be_left_out_nor_told_twice(changed: World) -> None:
    proof = changed.prove(is_registration)
    replace = msgspec.structs.replace
    ways = [proof.way] if proof.standing is None else [proof.way, proof.standing.way]
    for part, way in enumerate(ways):
        first, *others = way.changes
        for changes in ((), (first,), others, (*others, first), (first, first, *others), (first, *others, others[-1])):
            other = Way(tuple(changes), way.block)
            assert proof.standing is not None
            standing = Standing(other, proof.standing.state)
            changed.refused(replace(proof, **({"standing": standing} if part else {"way": other})))


def nodes_of(world: World, state_root: bytes) -> tuple[str, ...]:
    found = witness.gathered(world.chain.store.state_node, lambda w: witness.authorities(w, bytes(state_root)))
    return tuple(map(shown, found[1]))


def by_hand(
    header: CancunBlockHeader, transaction: bytes, receipt: bytes, world: World, certificate: Certificate
) -> Proof:
    """A proof of the only transaction of a block that is not in the ledger."""
    votes = tuple(map(shown, certificate.votes))
    return Proof(
        format="aigen-proof-1",
        genesis_hash=shown(world.genesis.hash),
        way=Way((), proofs.FinalBlock(header=shown(rlp.encode(header)), descendants=(), votes=votes)),
        transaction_index=0,
        transaction=(leaf(transaction),),
        receipt=(leaf(receipt),),
        standing=None,
    )


def leaf(value: bytes) -> str:
    """The only node of a trie with one item, under index 0 (its key is 0x80: two nibbles, an even leaf)."""
    return shown(rlp.encode([b"\x20\x80", value]))


@dataclass(frozen=True)
class Draft:
    """A block with a registration that the only authority of a ledger has executed and not made final."""

    world: World
    network: Network
    header: CancunBlockHeader
    transaction: bytes
    receipt: bytes

    def proof(self, **roots: bytes) -> Proof:
        """Of that block, whose header says what it should, or these roots; signed by the authority either way."""
        unsealed = self.header.copy(extra_data=self.header.extra_data[: seal.UNSEALED_SIZE], **roots)
        header = seal.seal(unsealed, KEYS[0])
        certificate = seal.certify(self.world.genesis.hash, header, [KEYS[0]])
        return by_hand(header, self.transaction, self.receipt, self.world, certificate)


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Draft]:
    for world in opened(tmp_path_factory.mktemp("draft"), 1):
        network = Network(world.chain)
        executed, raws = network.execute(register())
        yield Draft(world, network, executed.header, raws[0], executed.receipts[0].encode())


DEEP = b"\xc0"
for _ in range(4_000):
    DEEP += rlp.codec.length_prefix(len(DEEP), 192)[::-1]
DEEP = DEEP[::-1]
"""A list in a list and so on, in 12 kB: deeper than Python goes unless something raised its limit."""

NO_TRIES = [
    b"\0",
    b"\xc0",
    b"\xff" * 40,
    DEEP,
    rlp.encode([b"\x20\x80"]),
    rlp.encode([b"\x20\x80", b""]),
    rlp.encode([b"\x20\x80", [b"", b""]]),
    rlp.encode([b"\x20\x80", b"\x02"]),
    rlp.encode([b"\x20\x80", b"\x02\xc0"]),
    rlp.encode([b"\x20\x80", b"\x02" + DEEP]),
    rlp.encode([b"\x55", b"\x20\x80"]),
    rlp.encode([[], b""]),
    rlp.encode([b""] * 17),
    rlp.encode([[b"x"]] * 17),
    rlp.encode([b"x" * 32] * 17),
]


@pytest.mark.parametrize("node", NO_TRIES, ids=range(len(NO_TRIES)))
def test_lying_authority_cannot_crash_the_checker(draft: Draft, node: bytes) -> None:
    """It may sign a header over anything."""
    replace, world, nodes = msgspec.structs.replace, draft.world, (shown(node),)
    world.refused(replace(draft.proof(transaction_root=keccak(node)), transaction=nodes), "does not hold")
    world.refused(replace(draft.proof(receipt_root=keccak(node)), receipt=nodes), "does not hold")
    proof = draft.proof(state_root=keccak(node))
    change = proofs.Change(proof.way.block, nodes)
    world.refused(replace(proof, way=Way((change,), proof.way.block)), "does not hold")


@pytest.mark.parametrize(
    "slots",
    [
        {layout.AUTHORITIES_SLOT: 0},
        {layout.AUTHORITIES_SLOT: 32},
        {layout.AUTHORITIES_SLOT: 1 << 200},
        {layout.AUTHORITIES_SLOT: 1, layout.AUTHORITIES_SLOT + 1: 1 << 160},
    ],
)
def test_authorities_that_no_contract_stores(slots: dict[int, int]) -> None:
    with pytest.raises(BadInput, match="authorit"):
        layout.authorities(lambda slot: slots.get(slot, 0))


def test_registration_signed_by_another_than_its_admin(draft: Draft) -> None:
    """No honest block has that: the contract logs who sent the transaction."""
    theirs = raw_call(OPERATOR, 0, register())
    root, _ = make_trie_root_and_nodes((CancunTransactionBuilder.decode(theirs),))
    proof = msgspec.structs.replace(draft.proof(transaction_root=root), transaction=(leaf(theirs),))
    draft.world.refused(proof, "registered the model and")


def test_transaction_for_another_network(draft: Draft) -> None:
    theirs = raw_call(ADMIN, 0, register(), chain_id=1)
    root, _ = make_trie_root_and_nodes((CancunTransactionBuilder.decode(theirs),))
    proof = msgspec.structs.replace(draft.proof(transaction_root=root), transaction=(leaf(theirs),))
    draft.world.refused(proof, "chain id 1")


def test_by_hand_is_what_the_prover_makes(draft: Draft) -> None:
    """Last of all: the block becomes final."""
    draft.world.check(draft.proof())
    draft.network.grow(register())
    assert draft.world.prove(is_registration).transaction == (leaf(draft.transaction),)
    proof = msgspec.structs.replace(draft.world.prove(is_registration), standing=None)
    assert proof == draft.proof()
