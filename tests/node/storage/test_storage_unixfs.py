"""A shard's root CID: kubo's own test vectors of the profile, and what the tree above the pieces looks like."""

from hashlib import sha256

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from storage_helpers import manifest_of, noise

from contracts.types import PIECE_SIZE, ShardHash
from node.storage.manifest import ManifestShard
from node.storage.unixfs import LINKS_MAX, Node, cid_text, raw_cid, root_cid, shard_tree, tree

KUBO = [
    (PIECE_SIZE, "chunk-v1-seed", "bafkreiacndfy443ter6qr2tmbbdhadvxxheowwf75s6zehscklu6ezxmta"),
    (PIECE_SIZE + 1, "chunk-v1-seed", "bafybeigmix7t42i6jacydtquhet7srwvgpizfg7gjbq7627d35mjomtu64"),
    (1024 * PIECE_SIZE, "v1-2025-seed", "bafybeihmf37wcuvtx4hpu7he5zl5qaf2ineo2lqlfrapokkm5zzw7zyhvm"),
    (1024 * PIECE_SIZE + 1, "v1-2025-seed", "bafybeibdsi225ugbkmpbdohnxioyab6jsqrmkts3twhpvfnzp77xtzpyhe"),
    (1025 * PIECE_SIZE, "v1-2025-seed", "bafybeihmzokxxjqwxjcryerhp5ezpcog2wcawfryb2xm64xiakgm4a5jue"),
]
"""Size, seed and CID in the tests of kubo (test/cli/cid_profiles_test.go, add_test.go) and of js-ipfs-unixfs
(ipip-499-profiles.spec.ts). The bytes are ChaCha20's stream under the SHA-256 of the seed."""


@pytest.fixture(scope="module")
def kubo_shards() -> dict[tuple[int, str], ManifestShard]:
    """A gigabyte is hashed once."""
    found = {}
    for seed in {seed for _, seed, _ in KUBO}:
        stream = Cipher(algorithms.ChaCha20(sha256(seed.encode()).digest(), bytes(16)), None).encryptor()
        hashes = b""
        position = 0
        zeros, piece = bytes(PIECE_SIZE), bytearray(PIECE_SIZE)
        for size in [size for size, other, _ in KUBO if other == seed]:
            while position + PIECE_SIZE <= size:
                stream.update_into(zeros, piece)
                hashes += sha256(piece).digest()
                position += PIECE_SIZE
            last = b""
            if size > position:
                rest = Cipher(algorithms.ChaCha20(sha256(seed.encode()).digest(), counter(position)), None).encryptor()
                last = sha256(rest.update(bytes(size - position))).digest()
            found[size, seed] = ManifestShard(ShardHash(bytes(32)), size, hashes + last)
    return found


def counter(position: int) -> bytes:
    """ChaCha20's counter and nonce for the block of 64 bytes at `position`."""
    return (position // 64).to_bytes(4, "little") + bytes(12)


@pytest.mark.parametrize(("size", "seed", "cid"), KUBO)
def test_kubos_own_vectors(size: int, seed: str, cid: str, kubo_shards: dict[tuple[int, str], ManifestShard]) -> None:
    assert root_cid(kubo_shards[size, seed]) == cid


def test_a_pieces_hash_is_its_cid() -> None:
    # The example of https://docs.ipfs.tech: the raw block "hello world".
    data = b"hello world"
    expected = "bafkreifzjut3te2nhyekklss27nh3k72ysco7y32koao5eei66wof36n5e"
    assert cid_text(raw_cid(sha256(data).digest())) == expected
    manifest, _ = manifest_of([data], PIECE_SIZE)
    assert root_cid(manifest.shards[0]) == expected


def leaves(count: int) -> list[Node]:
    return [Node(raw_cid(sha256(bytes([index])).digest()), 1, 1) for index in range(count)]


def test_all_leaves_are_at_one_depth() -> None:
    *lower, root = tree(leaves(10), links_max=3)
    # 10 leaves under 4 nodes under 2: the last node of the lowest level has one leaf.
    assert [node.content_size for node in (*lower, root)] == [3, 3, 3, 1, 9, 1, 10]
    assert root.tree_size == 10 + sum(len(node.block) for node in (*lower, root))
    for child in lower[4:]:
        assert child.cid in root.block
    assert all(node.cid == bytes.fromhex("01701220") + sha256(node.block).digest() for node in (*lower, root))


def test_a_full_node_is_not_split() -> None:
    assert len(tree(leaves(3), links_max=3)) == 1
    assert len(tree(leaves(4), links_max=3)) == 3
    assert LINKS_MAX == 1024


def test_a_tree_covers_its_shard() -> None:
    size = 3 * PIECE_SIZE + 5
    manifest, _ = manifest_of([noise(size, 1)], 4 * PIECE_SIZE)
    (root,) = shard_tree(manifest.shards[0])
    assert (root.content_size, root.tree_size) == (size, size + len(root.block))
