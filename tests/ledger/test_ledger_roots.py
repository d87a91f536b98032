"""The root of a list against the trie's that py-evm fills item by item."""

from __future__ import annotations

import pytest
from eth.db.trie import _make_trie_root_and_nodes
from hypothesis import given
from hypothesis import strategies as st

from ledger.roots import list_root


@given(st.lists(st.binary(min_size=1, max_size=60), max_size=40))
def test_any_list_has_the_root_py_evm_gives_it(items: list[bytes]) -> None:
    """Short items too, whose nodes stand in the node above."""
    assert list_root(items) == _make_trie_root_and_nodes(tuple(items))[0]


@pytest.mark.parametrize("count", [0, 1, 2, 15, 16, 17, 127, 128, 129, 255, 256, 257])
def test_every_length_of_the_index(count: int) -> None:
    items = [b"item %d " % index * 9 for index in range(count)]
    assert list_root(items) == _make_trie_root_and_nodes(tuple(items))[0]
    assert count < 2 or list_root(items[::-1]) != list_root(items)
