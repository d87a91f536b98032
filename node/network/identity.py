"""A node's one Ed25519 key and the names derived from it: node_id, signature, TLS certificate.

The libp2p peer id of the key is the `node_id` on the ledger, and the certificate the data plane shows carries the same
key, so whoever knows a node_id from the ledger can prove that it talks to that node. Knows no sockets, no ledger and
no libp2p (importing libp2p takes seconds, naming a node must not).
"""

import contextlib
import os
import secrets
import ssl
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import NameOID

from contracts.errors import BadInput, BadPeer, Conflict, Corrupt, NotAllowed, NotFound
from contracts.types import NodeId

IDENTITY_FILE_BYTES_MAX: Final = 4096
CERTIFICATE_BYTES_MAX: Final = 4096
NODE_ID_CHARS_MAX: Final = 64

# identity multihash (0x00) of 36 bytes (0x24): the protobuf PublicKey{type: Ed25519, data: 32 bytes}.
_PEER_ID_PREFIX: Final = bytes.fromhex("002408011220")
_BASE58: Final = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"

# The certificate is a mere carrier of the key: nobody checks its dates, so they are fixed and the bytes deterministic.
_VALID_FROM: Final = datetime(2024, 1, 1, tzinfo=UTC)
_VALID_UNTIL: Final = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)


class NodeIdentity:
    """The private key of this node; `node_id` is the name others know it by."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_key: bytes = key.public_key().public_bytes_raw()
        self.node_id: NodeId = node_id_of_public_key(self.public_key)

    def __repr__(self) -> str:
        return f"NodeIdentity({self.node_id})"

    @classmethod
    def generate(cls) -> "NodeIdentity":
        """A new identity that lives in memory only."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def create(cls, path: Path) -> "NodeIdentity":
        """A new identity saved at `path`; a file that is there already is never overwritten."""
        identity = cls.generate()
        identity.save(path)
        return identity

    @classmethod
    def load(cls, path: Path) -> "NodeIdentity":
        """The identity saved at `path`."""
        try:
            with path.open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode & 0o777
                pem = file.read(IDENTITY_FILE_BYTES_MAX + 1)
        except FileNotFoundError:
            raise NotFound(f"No node identity at {path}; run `aigen init` first.") from None
        if os.name == "posix" and mode & 0o077:
            raise NotAllowed(f"{path} can be read by others (mode {mode:04o}); run `chmod 600 {path}`.")
        try:
            key = serialization.load_pem_private_key(pem, password=None)
        except (ValueError, TypeError):
            raise Corrupt(f"{path} is no PEM private key ({len(pem)} bytes); restore it from a backup.") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise Corrupt(f"{path} holds a key that is not Ed25519; restore the node's own key from a backup.")
        return cls(key)

    def save(self, path: Path) -> None:
        """Write the key as PEM, readable by the owner only, durable when this returns."""
        pem = self._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise Conflict(f"{path} exists already; a node identity is never overwritten.") from None
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        if os.name == "posix":
            directory = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)

    def sign(self, data: bytes) -> bytes:
        """The 64 byte Ed25519 signature; callers put a domain prefix into `data`."""
        return self._key.sign(data)

    def seed(self) -> bytes:
        """The 32 secret bytes; for the libp2p host, which needs the key itself."""
        return self._key.private_bytes_raw()

    def certificate(self) -> bytes:
        """The self-signed certificate (DER) that carries the key; the same bytes every time."""
        return self._build_certificate().public_bytes(serialization.Encoding.DER)

    def _build_certificate(self) -> x509.Certificate:
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.node_id)])
        builder = x509.CertificateBuilder(
            issuer_name=name,
            subject_name=name,
            public_key=self._key.public_key(),
            serial_number=1,
            not_valid_before=_VALID_FROM,
            not_valid_after=_VALID_UNTIL,
        )
        return builder.sign(self._key, algorithm=None)

    def server_context(self) -> ssl.SSLContext:
        """TLS 1.3 as a server that shows this identity's certificate.

        `ssl` takes keys from files only. The file is short-lived, in a directory of its own, and encrypted with a
        password that exists in memory only, so no clear key reaches the disk.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.num_tickets = 0  # connections are long and each proves its client anew: no resumption
        password = secrets.token_bytes(32).hex().encode()
        with tempfile.TemporaryDirectory(prefix="aigen-tls-") as directory:
            chain = Path(directory, "node.pem")
            pem = self._build_certificate().public_bytes(serialization.Encoding.PEM)
            pem += self._key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.BestAvailableEncryption(password),
            )
            chain.write_bytes(pem)
            context.load_cert_chain(chain, password=password)
        return context


def client_context() -> ssl.SSLContext:
    """TLS 1.3 as a client that pins keys itself.

    No authority signs nodes' certificates, so the chain is not checked here; the caller must compare
    `node_id_of_certificate(getpeercert(binary_form=True))` with the node it meant. The handshake proves, in any
    verify mode, that the server holds the certificate's private key.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def node_id_of_certificate(der: bytes) -> NodeId:
    """The node a certificate speaks for; BadPeer unless it carries an Ed25519 key."""
    if len(der) > CERTIFICATE_BYTES_MAX:
        raise BadPeer(f"The certificate has {len(der)} bytes, over the limit of {CERTIFICATE_BYTES_MAX}.")
    try:
        key = x509.load_der_x509_certificate(der).public_key()
    except ValueError as error:
        raise BadPeer(f"The peer's certificate cannot be read: {error}.") from None
    if not isinstance(key, Ed25519PublicKey):
        raise BadPeer(f"The peer's certificate carries a {type(key).__name__}, not an Ed25519 key.")
    return node_id_of_public_key(key.public_bytes_raw())


def node_id_of_public_key(public_key: bytes) -> NodeId:
    """The libp2p peer id of a raw Ed25519 public key, base58 (`12D3KooW...`)."""
    assert len(public_key) == 32
    number = int.from_bytes(_PEER_ID_PREFIX + public_key, "big")
    digits = []
    while number:
        number, digit = divmod(number, 58)
        digits.append(_BASE58[digit])
    return NodeId("1" + "".join(reversed(digits)))  # "1": the one leading zero byte of the prefix


def public_key_of_node_id(node_id: str) -> bytes:
    """The raw Ed25519 key inside a node_id; BadInput unless it is exactly the peer id of such a key."""
    number = -1
    if 0 < len(node_id) <= NODE_ID_CHARS_MAX:
        with contextlib.suppress(ValueError):
            number = 0
            for character in node_id:
                number = number * 58 + _BASE58.index(character)
    size = len(_PEER_ID_PREFIX) + 32
    if 0 <= number < 1 << 8 * size:
        data = number.to_bytes(size, "big")
        key = data[len(_PEER_ID_PREFIX) :]
        if data.startswith(_PEER_ID_PREFIX) and node_id_of_public_key(key) == node_id:
            return key
    raise BadInput(
        f"{node_id[:NODE_ID_CHARS_MAX]!r} is no node_id; expected the peer id of an Ed25519 key (12D3KooW...)."
    )


def verify_signature(node_id: NodeId, data: bytes, signature: bytes) -> bool:
    """Whether `signature` over `data` was made by the key of `node_id` (which must be well formed)."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key_of_node_id(node_id)).verify(signature, data)
    except InvalidSignature:
        return False
    return True
