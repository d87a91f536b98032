"""`GET /metrics`: what Prometheus' own parser reads out of it, and who may ask."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ledger.keys import Key
from node.rpc import token
from node.rpc.metrics import exposition

from .fake import CHAIN_ID, NOW, OPERATOR, STRANGER, FakeNode
from .wire import request, send, serving


def read(text: str) -> dict[str, float]:
    """Samples by name, those with labels by name and label."""
    families = list(text_string_to_metric_families(text))
    assert all(family.documentation for family in families)
    return {
        sample.name + "".join(f" {value}" for value in sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def test_what_the_node_says_is_what_is_read() -> None:
    node = FakeNode()
    found = read(exposition(node).decode())
    info, chain = node.node_info(), node.chain()
    assert found["aigen_head_number"] == chain.head_number
    assert found["aigen_peers"] == len(info.peers)
    assert [found[f"aigen_gossip_{name}"] for name in ("peers", "told_total", "taken_total", "passed_over_total")] == [
        2,
        3,
        4,
        5,
    ]
    assert found["aigen_state_alarms"] == len(info.state_alarms) > 0
    assert found["aigen_consensus_iteration"] == info.consensus.iteration
    assert found["aigen_consensus_timeouts_total"] == info.consensus.iterations_timed_out > 0
    assert found["aigen_consensus_finality_seconds_count"] == info.consensus.own_blocks.count > 0
    assert found["aigen_consensus_finality_seconds_sum"] == info.consensus.own_blocks.seconds
    assert found["aigen_disk_used_bytes"] == info.disk_used
    assert found["aigen_fetched_bytes_total"] == info.bytes_fetched
    assert found["aigen_fetch_saved_bytes_total"] == info.fetching.bytes_saved
    assert found["aigen_sources_dropped"] == 1
    assert (found["aigen_answers_active"], found["aigen_answers_waiting"]) == (info.quota.answers, info.answers_waiting)
    assert {limit: found[f"aigen_answers_refused_total {limit}"] for limit in info.quota.refused} == info.quota.refused
    assert found[f"aigen_authority_evidence 0x{OPERATOR.address.hex()}"] == 1


@pytest.mark.parametrize(("key", "status"), [(None, 200), (OPERATOR, 200), (STRANGER, 403)])
async def test_only_who_is_known_may_ask(key: Key | None, status: int) -> None:
    """Without a token it is the operator, on loopback."""
    headers = {"content-type": ""}
    if key is not None:
        headers["authorization"] = f"Bearer {token.mint(key, CHAIN_ID, int(NOW) + 60)}"
    async with serving() as served:
        reply = await send(served, request(b"", headers, "GET", "/metrics"))
    assert reply.status == status
    if status == 200:
        assert reply.headers["content-type"].startswith("text/plain")
        assert "aigen_ready" in read(reply.body.decode())
