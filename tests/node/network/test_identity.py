"""One key, three names: node_id, signature, certificate."""

import datetime
import os
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st
from libp2p.crypto.ed25519 import Ed25519PrivateKey
from libp2p.peer.id import ID

from contracts.errors import BadInput, BadPeer, Conflict, Corrupt, NotAllowed, NotFound
from contracts.types import NodeId
from node.network.identity import (
    NodeIdentity,
    node_id_of_certificate,
    node_id_of_public_key,
    public_key_of_node_id,
    verify_signature,
)


@given(st.binary(min_size=32, max_size=32))
def test_the_node_id_is_libp2ps_peer_id_and_back(seed: bytes) -> None:
    public_key = Ed25519PrivateKey.new(seed).get_public_key() if any(seed) else None
    if public_key is not None:
        node_id = node_id_of_public_key(public_key.to_bytes())
        assert node_id == str(ID.from_pubkey(public_key))
        assert public_key_of_node_id(node_id) == public_key.to_bytes()


@given(st.one_of(st.text(max_size=80), st.text(alphabet="123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz")))
def test_what_is_no_node_id_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="is no node_id"):
        public_key_of_node_id(text)


def test_a_node_id_has_one_spelling() -> None:
    node_id = NodeIdentity.generate().node_id
    for other in ("1" + node_id, node_id + "1", node_id[1:], node_id[:-1], " " + node_id, node_id.lower()):
        with pytest.raises(BadInput):
            public_key_of_node_id(other)


def test_it_is_kept_for_its_owner_only_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    created = NodeIdentity.create(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert NodeIdentity.load(path).node_id == created.node_id
    before = path.read_bytes()
    with pytest.raises(Conflict, match="never overwritten"):
        NodeIdentity.create(path)
    assert path.read_bytes() == before


def test_a_file_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    NodeIdentity.create(path)
    path.chmod(0o644)
    with pytest.raises(NotAllowed, match="chmod 600"):
        NodeIdentity.load(path)


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="aigen init"):
        NodeIdentity.load(tmp_path / "none")


@pytest.mark.parametrize("content", [b"", b"rubbish", os.urandom(9000)], ids=["empty", "text", "long"])
def test_a_file_that_is_no_key_is_corrupt(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "node.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(Corrupt, match="no PEM private key"):
        NodeIdentity.load(path)


def test_a_key_of_another_kind_is_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    path.write_bytes(
        ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    path.chmod(0o600)
    with pytest.raises(Corrupt, match="not Ed25519"):
        NodeIdentity.load(path)


def test_signatures_count_for_their_key_and_their_bytes_only() -> None:
    identity, other = NodeIdentity.generate(), NodeIdentity.generate()
    signature = identity.sign(b"data")
    assert verify_signature(identity.node_id, b"data", signature)
    assert not verify_signature(identity.node_id, b"date", signature)
    assert not verify_signature(other.node_id, b"data", signature)
    assert not verify_signature(identity.node_id, b"data", bytes(64))
    with pytest.raises(BadInput):
        verify_signature(NodeId("nobody"), b"data", signature)


def test_the_certificate_carries_the_key_and_is_always_the_same() -> None:
    identity = NodeIdentity.generate()
    assert node_id_of_certificate(identity.certificate()) == identity.node_id
    assert identity.certificate() == identity.certificate()
    assert repr(identity) == f"NodeIdentity({identity.node_id})"


@pytest.mark.parametrize("der", [b"", b"rubbish", bytes(5000)], ids=["empty", "text", "long"])
def test_a_certificate_that_is_none_is_a_bad_peer(der: bytes) -> None:
    with pytest.raises(BadPeer):
        node_id_of_certificate(der)


def test_a_certificate_of_another_kind_of_key_is_a_bad_peer() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    start = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)
    certificate = x509.CertificateBuilder(name, name, key.public_key(), 1, start, start.replace(year=2034))
    with pytest.raises(BadPeer, match="not an Ed25519 key"):
        node_id_of_certificate(certificate.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER))


def test_no_clear_key_is_left_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    identity = NodeIdentity.generate()
    written: list[bytes] = []
    original = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda path, data: (written.append(data), original(path, data))[1])
    identity.server_context()
    assert len(written) == 1
    assert b"BEGIN ENCRYPTED PRIVATE KEY" in written[0]
    assert b"BEGIN PRIVATE KEY" not in written[0]
    assert list(tmp_path.iterdir()) == []
