"""How a connection of the data plane begins: over TLS or in clear, and each side proves its key to the other.

Over TLS the server's key is in its certificate. In clear, for networks whose packets nobody else can read or alter, the
server signs the client's nonce, and with it the one that it asks the client to sign. Who speaks the other way is told
so at once. Knows no members and no store.
"""

import secrets
from typing import Final

from contracts.errors import BadInput, BadPeer, NotAllowed
from contracts.types import NodeId
from node.network.identity import NodeIdentity, node_id_of_certificate, verify_signature
from node.network.wire import (
    NONCE_BYTES,
    Challenge,
    Channel,
    Greeting,
    Proof,
    proof_bytes,
    server_proof_bytes,
)

_TLS_BEGINS: Final = 0x16
"""The first byte of a TLS connection. A frame begins with 0: none is so long."""
_TLS_RECORD_HEAD_BYTES: Final = 5
_TLS_ALERT: Final = bytes.fromhex("15 0303 0002 02 46")
"""Fatal: protocol_version (RFC 8446, section 6). All that a TLS client understands before TLS has begun."""

# The server's side


def challenge(channel: Channel, identity: NodeIdentity, *, plain: bool, packs: bool) -> bytes:
    """Begin, prove this node's key, and ask for the client's; the nonce that it has to sign."""
    nonce = secrets.token_bytes(NONCE_BYTES)
    begins_tls = channel.first_byte() == _TLS_BEGINS
    if plain:
        if begins_tls:
            _refuse_tls(channel)
            raise BadPeer("it speaks TLS, and plain TCP is spoken here")
        greeting = channel.receive_frame(Greeting)
        signature = identity.sign(server_proof_bytes(identity.node_id, greeting.nonce, nonce))
        channel.send_part()
        channel.send_frame(Challenge(nonce, packs, signature))
        return nonce
    if not begins_tls:
        channel.refuse_in_clear("TLS is spoken here, not plain TCP")
        raise BadPeer("it speaks no TLS, which is spoken here")
    channel.handshake()
    channel.send_frame(Challenge(nonce, packs))
    return nonce


def check_proof(identity: NodeIdentity, proof: Proof, nonce: bytes) -> NodeId:
    """Who the client is. Raises NotAllowed when it is not who it says."""
    node_id = NodeId(proof.node_id)
    if not _is_signed(node_id, proof_bytes(identity.node_id, node_id, nonce), proof.signature):
        raise NotAllowed(f"the proof is not signed by {node_id}")
    return node_id


def _refuse_tls(channel: Channel) -> None:
    """Answer a TLS client. Its first record is taken before, as in `Channel.refuse_in_clear`."""
    head = bytearray(_TLS_RECORD_HEAD_BYTES)
    channel.receive_into(memoryview(head))
    channel.receive_into(memoryview(bytearray(int.from_bytes(head[-2:], "big"))))
    channel.send(_TLS_ALERT)


# The client's side


def prove(channel: Channel, identity: NodeIdentity, server: NodeId, *, plain: bool) -> Challenge:
    """Begin, check who answers, and prove who asks; what the server said. Whether it admits comes next."""
    found = _greet(channel, server) if plain else _shake_hands(channel, server)
    channel.send_frame(Proof(identity.node_id, identity.sign(proof_bytes(server, identity.node_id, found.nonce))))
    return found


def _shake_hands(channel: Channel, server: NodeId) -> Challenge:
    certificate = channel.handshake()
    answering = node_id_of_certificate(certificate) if certificate else None
    if answering != server:
        raise BadPeer(f"another node answers there: {answering}")
    return channel.receive_frame(Challenge)


def _greet(channel: Channel, server: NodeId) -> Challenge:
    greeting = Greeting(secrets.token_bytes(NONCE_BYTES))
    channel.send_frame(greeting)
    if channel.receive_part():
        raise BadPeer("sent data where it only answers a greeting")
    found = channel.receive_frame(Challenge)
    if not _is_signed(server, server_proof_bytes(server, greeting.nonce, found.nonce), found.signature):
        raise BadPeer(f"another node answers there: what it signed is not signed by {server}")
    return found


def _is_signed(node_id: NodeId, data: bytes, signature: bytes) -> bool:
    try:
        return verify_signature(node_id, data, signature)
    except BadInput as error:
        raise BadPeer(str(error)) from None
