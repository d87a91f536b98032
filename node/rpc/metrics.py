"""`GET /metrics`: the node's state in the text format of Prometheus. Knows the node through its port, and no HTTP.

Made anew for each scrape from what the node says of itself; nothing is counted here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from node.rpc.port import NodePort


class _Scrape(Collector):
    """One reading of a node."""

    def __init__(self, node: NodePort) -> None:
        self._node = node

    def collect(self) -> Iterable[Metric]:
        yield from self._ledger()
        yield from self._consensus()
        yield from self._machine()

    def _ledger(self) -> Iterator[Metric]:
        chain, info = self._node.chain(), self._node.node_info()
        authorities = self._node.authorities()
        yield _gauge("ready", "1 when the node is ready for inference", info.status == "ready")
        yield _gauge("head_number", "Number of the newest final block", chain.head_number)
        yield _gauge("sync_number", "The newest block taken in; above the head in a fast sync", info.sync.number)
        yield _gauge("sync_target", "The highest block that a peer has", info.sync.target)
        yield _gauge("sync_state_nodes", "State nodes that a fast sync has so far", info.sync.nodes)
        yield _gauge("head_timestamp_seconds", "Time of the newest final block, Unix seconds", chain.head_timestamp)
        yield _gauge("pending_transactions", "Transactions that wait for a block", chain.pending_transactions)
        yield _gauge("peers", "Connected nodes of this network", len(info.peers))
        yield _gauge("lagging_peers", "Connected nodes that stay behind what others have", len(info.lagging_peers))
        yield _gauge("gossip_peers", "Nodes that are told at once", info.gossip.peers)
        yield _counter("gossip_told", "Messages that this node told first", info.gossip.told)
        yield _counter("gossip_taken", "Messages of peers, new and right", info.gossip.taken)
        yield _counter("gossip_passed_over", "Messages of peers, known or not right", info.gossip.passed_over)
        yield _gauge("state_alarms", "Peers whose state is not this node's", len(info.state_alarms))
        yield _gauge("authorities", "Accounts that make the blocks", sum(a.in_force for a in authorities))
        liars = GaugeMetricFamily(
            "aigen_authority_evidence", "1 for an account proved to have contradicted itself", labels=["account"]
        )
        for authority in authorities:
            if authority.evidence_hash is not None:
                liars.add_metric([f"0x{authority.account.hex()}"], 1)
        yield liars

    def _consensus(self) -> Iterator[Metric]:
        now = self._node.node_info().consensus
        yield _gauge("consensus_voting", "1 when this node's operator is an authority", now.is_voting)
        yield _gauge("consensus_iteration", "The iteration of consensus it is in", now.iteration)
        yield _gauge("consensus_undecided_blocks", "Executed blocks that are not final", now.undecided_blocks)
        yield _gauge("consensus_timeout_seconds", "How long an iteration may take", now.timeout_s)
        yield _counter("consensus_timeouts", "Iterations it voted to end without a block", now.iterations_timed_out)
        yield _counter("consensus_messages", "Messages of consensus received", now.messages_received)
        yield _counter("consensus_messages_dropped", "Messages of consensus dropped", now.messages_dropped)
        yield SummaryMetricFamily(
            "aigen_consensus_finality_seconds",
            "From when this node began to make a block until it was final here",
            count_value=now.own_blocks.count,
            sum_value=now.own_blocks.seconds,
        )

    def _machine(self) -> Iterator[Metric]:
        info = self._node.node_info()
        yield _gauge("shards_short", "Shards of the network with too few copies", info.shards_short)
        yield _gauge("disk_used_bytes", "Bytes of shards and quantised weights on the disk", info.disk_used)
        yield _gauge("disk_budget_bytes", "Bytes of shards kept at most", info.disk_budget)
        yield _gauge("cache_used_bytes", "Bytes of loaded models", info.cache_used)
        yield _gauge("cache_budget_bytes", "Bytes of loaded models at most", info.cache_budget)
        yield _gauge("answers_active", "Answers that are under way or wait", info.quota.answers)
        yield _gauge("answers_waiting", "Answers that wait for their turn", info.answers_waiting)
        refused = CounterMetricFamily("aigen_answers_refused", "Answers refused by a limit", labels=["limit"])
        for limit, count in info.quota.refused.items():
            refused.add_metric([limit], count)
        yield refused
        yield _counter("pieces_fetched", "Pieces fetched from other nodes and mirrors", info.pieces_fetched)
        yield _counter("fetched_bytes", "Bytes fetched from other nodes and mirrors", info.bytes_fetched)
        yield _counter("fetch_saved_bytes", "Bytes of them that compression saved", info.fetching.bytes_saved)
        yield _gauge("fetch_rate_bytes", "Bytes fetched a second, of late", info.fetching.rate)
        sources = Counter(one.state for one in info.fetching.sources)
        for state in ("active", "failed", "dropped"):
            yield _gauge(f"sources_{state}", f"Sources of shards that are {state}", sources[state])
        done = GaugeMetricFamily("aigen_load_done_bytes", "Bytes of a model that are here", labels=["model"])
        total = GaugeMetricFamily("aigen_load_total_bytes", "Bytes of a model that is not absent", labels=["model"])
        for load in info.models:
            done.add_metric([f"{load.model_id}@{load.version}"], load.bytes_done)
            total.add_metric([f"{load.model_id}@{load.version}"], load.bytes_total)
        yield done
        yield total


def _gauge(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(f"aigen_{name}", what, value=value)


def _counter(name: str, what: str, value: float) -> Metric:
    return CounterMetricFamily(f"aigen_{name}", what, value=value)


def exposition(node: NodePort) -> bytes:
    """All metrics of a node, in the text format."""
    registry = CollectorRegistry()
    registry.register(_Scrape(node))
    return generate_latest(registry)
