"""One topic of libp2p gossipsub v1.1: what this node tells reaches a few peers, who tell a few of theirs.

Whatever a peer tells is shown to the caller first, and goes on to others only if the caller found it new and right.
Delivery is not promised to anybody. Knows peers and bytes, not what the bytes mean; owns everything that is particular
to py-libp2p's pubsub, of whose version 0.8.1 the following was seen and is kept out here:

- its caches agree on a message's identity only by sender and sequence number: the sender stays empty and the number is
  the hash of the content, so that several nodes can tell the same and it goes round once;
- a peer's queue holds 32 messages and drops the rest silently: `tell` waits for room;
- its spam protection loses half of 20 messages a second: it is off, and each peer is read at a bounded rate instead;
- one packet may hold any number of messages, each a task of its own, and any number of identities to be sent again;
- PRUNE may name addresses, which it then dials; signed records fill the peer store; topics and peers that are gone
  stay in its tables;
- a newcomer is sent recent messages by a second task on one stream, and the two mix their bytes.

gossipsub: https://github.com/libp2p/specs/blob/master/pubsub/gossipsub/gossipsub-v1.1.md
"""

import logging
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Iterable
from hashlib import sha256
from typing import Any, Final

import trio
from google.protobuf.message import DecodeError
from libp2p.exceptions import ParseError, ValidationError
from libp2p.io.exceptions import MessageTooLarge
from libp2p.network.stream.exceptions import StreamEOF
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.pubsub.rpc_queue import DefaultMaxMessageSize, OutBoundQueueSize
from libp2p.tools.anyio_service import background_trio_service
from libp2p.utils.varint import read_varint_prefixed_bytes_limited

from contracts.errors import BadPeer
from contracts.types import NodeId
from ledger.rate import Rate
from node.network.statistics import GossipStatistics

log = logging.getLogger(__name__)

MESSAGE_BYTES_MAX: Final = 256 << 10
DEGREE: Final = 6
DEGREE_LOW: Final = 4
DEGREE_HIGH: Final = 12
"""Peers that are told at once: as many as the specification recommends."""
HEARTBEAT_S: Final = 1
PACKET_MESSAGES_MAX: Final = 64
PACKET_IDS_MAX: Final = 512
"""Of what a peer says it has, in one packet; of what it asks for, as many as PACKET_MESSAGES_MAX."""
PACKETS_PER_S: Final = 500.0
PACKETS_BURST: Final = 1_000.0
ROOM_LOOK_S: Final = 0.01
ROOM_LOOKS_MAX: Final = 50
"""Before it is told all the same: one peer that does not read holds up the others no longer."""

Take = Callable[[NodeId, bytes], Awaitable[bool]]
"""Whether a peer's message is new and right, and so goes on. Raises BadPeer for one that no honest peer sends."""


class Mesh:
    """Build it before the host has connections, then `nursery.start_soon(mesh.run)`."""

    def __init__(self, host: Any, topic: str, take: Take, on_offence: Callable[[NodeId, str], None]) -> None:
        """`host`: py-libp2p's. `on_offence` is called with the reason when a peer's packet broke the protocol."""
        self._topic = topic
        self._router = _Router()
        self._pubsub = _Pubsub(host, self._router, topic, take, on_offence)
        self._told = 0
        self._runs = False

    def statistics(self) -> GossipStatistics:
        peers = len(self._router.mesh.get(self._topic, ()))
        return GossipStatistics(peers, self._told, self._pubsub.taken, self._pubsub.passed_over)

    def reaches(self, node_id: NodeId) -> bool:
        """Whether a peer hears what this node tells, from it or from others."""
        return self._runs and ID.from_base58(node_id) in self._pubsub.peer_topics.get(self._topic, ())

    async def run(self) -> None:
        """Tell and listen until cancelled. Ends when py-libp2p fails; nothing depends on it."""
        try:
            async with background_trio_service(self._router), background_trio_service(self._pubsub):
                await self._pubsub.wait_until_ready()
                await self._pubsub.subscribe(self._topic)
                self._runs = True
                await trio.sleep_forever()
        except Exception:
            log.exception("gossip has ended; blocks and transactions go on from peer to peer")
        finally:
            self._runs = False

    async def tell(self, data: bytes) -> None:
        """Have everybody told, unless that is under way. Returns once it is in the queues."""
        assert len(data) <= MESSAGE_BYTES_MAX, f"{len(data)} bytes"
        if self._runs and not self._pubsub.seen_messages.has(_identity(data)):
            for _ in range(ROOM_LOOKS_MAX):
                if self._longest_queue() <= OutBoundQueueSize // 2:
                    break
                await trio.sleep(ROOM_LOOK_S)
            self._told += 1
            await self._pubsub.push_msg(self._pubsub.my_id, _message(data, self._topic))

    def _longest_queue(self) -> int:
        queues = self._pubsub.peer_queues
        return max((len(queues[peer]) for peer in self._router.mesh.get(self._topic, ()) if peer in queues), default=0)


class _Router(GossipSub):
    """Without what sends outside of the queues."""

    def __init__(self) -> None:
        super().__init__(
            [PROTOCOL_ID_V11],
            DEGREE,
            DEGREE_LOW,
            DEGREE_HIGH,
            heartbeat_interval=HEARTBEAT_S,
            adaptive_gossip_enabled=False,
            spam_protection_enabled=False,
            eclipse_protection_enabled=False,
            max_pending_messages_per_peer=1,
        )
        self.scorer = None
        # It notes the time of every message here for measures that are off, and never takes one out.
        self.recent_message_deliveries: Any = defaultdict(lambda: deque(maxlen=0))

    def remove_peer(self, peer_id: ID) -> None:
        super().remove_peer(peer_id)
        for since in self.back_off.values():
            since.pop(peer_id, None)

    def _check_equivocation(self, msg: rpc_pb2.Message) -> bool:
        """Named by their content, no two messages have one name. It would keep the last 1,000 for this."""
        return True

    async def flush_pending_messages(self, peer_id: ID) -> None:
        self._pending_messages.pop(peer_id, None)

    async def send_recent_messages(self, peer_id: ID, topic: str) -> None:
        """A newcomer pulls what it lacks."""


class _Pubsub(Pubsub):
    """Lets in only what `_admitted` finds in bounds, one packet of a peer after the other."""

    def __init__(
        self, host: Any, router: _Router, topic: str, take: Take, on_offence: Callable[[NodeId, str], None]
    ) -> None:
        super().__init__(host, router, strict_signing=False, allowed_topics={topic})
        self.taken = self.passed_over = 0
        self._topic = topic
        self._take = take
        self._on_offence = on_offence
        self._at_hand: set[bytes] = set()
        """What one peer told and the caller is looking at; others tell the same meanwhile."""

    async def continuously_read_stream(self, stream: Any) -> None:
        peer, rate = stream.muxed_conn.peer_id, Rate(PACKETS_PER_S, PACKETS_BURST)
        try:
            while True:
                if not rate.take(trio.current_time()):
                    await trio.sleep(1 / PACKETS_PER_S)
                data = await read_varint_prefixed_bytes_limited(stream, DefaultMaxMessageSize)
                await self._take_packet(peer, _admitted(rpc_pb2.RPC.FromString(data), self._topic))
        except StreamEOF:
            log.debug("%s tells no more", peer)
        except (BadPeer, DecodeError, MessageTooLarge, ParseError) as error:
            self._on_offence(NodeId(str(peer)), f"gossip: {error}")

    async def _take_packet(self, peer: ID, packet: rpc_pb2.RPC) -> None:
        for subscription in packet.subscriptions:
            self.handle_subscription(peer, subscription)
        for message in packet.publish:
            await self.push_msg(peer, message)
        if packet.HasField("control"):
            await self.router.handle_rpc(packet, peer)

    async def validate_msg(self, msg_forwarder: ID, msg: rpc_pb2.Message) -> None:
        """Called for each message that was not seen before; what raises ValidationError is neither kept nor told."""
        if msg_forwarder == self.my_id:
            return
        if msg.seqno in self._at_hand or not await self._look_at(NodeId(str(msg_forwarder)), msg):
            self.passed_over += 1
            raise ValidationError
        self.taken += 1

    async def _look_at(self, node_id: NodeId, msg: rpc_pb2.Message) -> bool:
        self._at_hand.add(msg.seqno)
        try:
            return await self._take(node_id, msg.data)
        finally:
            self._at_hand.discard(msg.seqno)


def _identity(data: bytes) -> bytes:
    return sha256(data).digest()


def _admitted(packet: rpc_pb2.RPC, topic: str) -> rpc_pb2.RPC:
    """What of a packet is let in, made anew. BadPeer for what no honest peer sends; what is merely much is cut."""
    if len(packet.publish) > PACKET_MESSAGES_MAX:
        raise BadPeer(f"{len(packet.publish)} messages in one packet, {PACKET_MESSAGES_MAX} are taken")
    admitted = rpc_pb2.RPC(publish=[_message(message.data, topic) for message in packet.publish])
    for told, made in zip(packet.publish, admitted.publish, strict=True):
        if len(made.data) > MESSAGE_BYTES_MAX:
            raise BadPeer(f"a message of {len(made.data):,} bytes, {MESSAGE_BYTES_MAX:,} are taken")
        if told != made:
            raise BadPeer("a message that is not named by its content, or is of another topic")
    # Who says and unsays it over and over is not worth the work: a node of ours says it once.
    if any(said.subscribe and said.topicid == topic for said in packet.subscriptions):
        admitted.subscriptions.add(subscribe=True, topicid=topic)
    control = packet.control
    if have := _identities(control.ihave, PACKET_IDS_MAX):
        admitted.control.ihave.add(topicID=topic, messageIDs=have)
    if want := _identities(control.iwant, PACKET_MESSAGES_MAX):
        admitted.control.iwant.add(messageIDs=want)
    if any(graft.topicID == topic for graft in control.graft):
        admitted.control.graft.add(topicID=topic)
    for prune in [prune for prune in control.prune if prune.topicID == topic][:1]:
        admitted.control.prune.add(topicID=topic, backoff=prune.backoff)
    return admitted


def _message(data: bytes, topic: str) -> rpc_pb2.Message:
    return rpc_pb2.Message(data=data, seqno=_identity(data), topicIDs=[topic])


def _identities(said: Iterable[Any], count_max: int) -> list[bytes]:
    return list(dict.fromkeys(identity for one in said for identity in one.messageIDs))[:count_max]
