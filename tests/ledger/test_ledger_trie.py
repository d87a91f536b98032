"""Tries read and changed as py-evm's are: the same values, the same roots, every node there and no other."""

from __future__ import annotations

import pytest
from eth.constants import BLANK_ROOT_HASH
from eth.db.trie import _make_trie_root_and_nodes
from eth_hash.auto import keccak
from hypothesis import example, given
from hypothesis import strategies as st
from trie import HexaryTrie
from trie.exceptions import MissingTrieNode

from ledger.trie import Trie, list_root

# Of few different nibbles, so that keys share much of their paths; some share all but the last one.
keys = st.lists(st.sampled_from([0x00, 0x01, 0x10, 0x11, 0xFF]), min_size=3, max_size=3).map(bytes)
values = st.one_of(st.just(b""), st.binary(min_size=1, max_size=2), st.binary(min_size=30, max_size=40))
changes = st.dictionaries(keys, values, max_size=12)


def reached(nodes: dict[bytes, bytes], root: bytes) -> set[bytes]:
    """The hashes of the nodes of a trie."""
    asked: set[bytes] = set()

    class Seen(dict[bytes, bytes]):
        def __getitem__(self, key: bytes) -> bytes:
            asked.add(key)
            return super().__getitem__(key)

    def walk(trie: HexaryTrie, path: tuple[int, ...]) -> None:
        for segment in trie.traverse(path).sub_segments:
            walk(trie, path + tuple(segment))

    walk(HexaryTrie(Seen(nodes), root), ())
    return asked - {BLANK_ROOT_HASH}


@given(rounds=st.lists(changes, max_size=6))
@example(rounds=[{b"\0\0\0": b"1", b"\0\0\1": b"2", b"\x11\0\0": b"3"}, {b"\x11\0\0": b""}, {b"\0\0\0": b""}])
@example(rounds=[{b"\0\0\0": b"v" * 40, b"\0\0\1": b"v" * 40}, {b"\0\x10\0": b"", b"\0\0\0": b""}])
def test_any_changes_give_the_root_they_give_py_evms(rounds: list[dict[bytes, bytes]]) -> None:
    theirs = HexaryTrie({})
    nodes: dict[bytes, bytes] = {}
    root, all_keys = bytes(BLANK_ROOT_HASH), {b"\0\0\0", b"\x22\0\0"}
    for changed in rounds:
        for key, value in changed.items():
            theirs[key] = value
        before = reached(nodes, root)
        root, made = Trie(nodes.get, root).changed(changed)
        assert root == theirs.root_hash
        assert all(keccak(node) == name for name, node in made.items())
        nodes |= made
        assert reached(nodes, root) - before <= made.keys() <= reached(nodes, root)
        all_keys |= changed.keys()
        for key in all_keys:
            assert Trie(nodes.get, root).get(key) == theirs[key]


def test_many_keys_as_a_state_has_them() -> None:
    theirs, nodes, root = HexaryTrie({}), dict[bytes, bytes](), bytes(BLANK_ROOT_HASH)
    keys = [keccak(bytes([i // 256, i % 256])) for i in range(600)]
    for start in range(0, 600, 100):
        changed = {key: bytes([1 + i % 250]) * (1 + i % 50) for i, key in enumerate(keys[start : start + 100])}
        changed |= dict.fromkeys(keys[start - 50 : start - 20], b"")
        for key, value in changed.items():
            theirs[key] = value
        root, made = Trie(nodes.get, root).changed(changed)
        nodes |= made
        assert root == theirs.root_hash
    assert [Trie(nodes.get, root).get(key) for key in keys] == [theirs[key] for key in keys]


def test_a_node_that_is_not_there_is_told() -> None:
    root, nodes = Trie({}.get, bytes(BLANK_ROOT_HASH)).changed({keccak(bytes([i])): b"v" * 40 for i in range(50)})
    del nodes[root]
    with pytest.raises(MissingTrieNode, match=root.hex()):
        Trie(nodes.get, root).get(keccak(b"\0"))
    with pytest.raises(MissingTrieNode, match=root.hex()):
        Trie(nodes.get, root).changed({keccak(b"\0"): b""})


def test_nothing_is_changed_in_place() -> None:
    """Decoded nodes are remembered: a change of one trie must not be seen in another."""
    before = {bytes([i, 0, 0]): bytes([i + 1]) * (i + 1) for i in range(40)}
    root, nodes = Trie({}.get, bytes(BLANK_ROOT_HASH)).changed(before)
    first = Trie(nodes.get, root).changed({b"\0\0\0": b"other", b"\1\0\0": b"", b"\7\0\0": b"new"})
    assert [Trie(nodes.get, root).get(key) for key in before] == list(before.values())
    assert Trie(nodes.get, root).changed({b"\0\0\0": b"other", b"\1\0\0": b"", b"\7\0\0": b"new"}) == first


# Lists


@given(st.lists(st.binary(min_size=1, max_size=60), max_size=40))
def test_any_list_has_the_root_py_evm_gives_it(items: list[bytes]) -> None:
    """Short items too, whose nodes stand in the node above."""
    assert list_root(items) == _make_trie_root_and_nodes(tuple(items))[0]


@pytest.mark.parametrize("count", [0, 1, 2, 15, 16, 17, 127, 128, 129, 255, 256, 257])
def test_every_length_of_the_index(count: int) -> None:
    items = [b"item %d " % index * 9 for index in range(count)]
    assert list_root(items) == _make_trie_root_and_nodes(tuple(items))[0]
    assert count < 2 or list_root(items[::-1]) != list_root(items)
