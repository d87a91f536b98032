"""`aigen status` in words: the hash of the state, and an alarm that nobody can miss."""

from typing import Any

import msgspec
import pytest

from node.agreement import Difference
from node.cli.run import _show_status
from node.network.sync import SyncStatistics
from node.rpc import answers
from tests.node.rpc.fake import DROPPED, FakeNode


async def shown(
    capsys: pytest.CaptureFixture[str], alarms: tuple[str, ...], sync: SyncStatistics | None = None
) -> list[str]:
    node = FakeNode()
    node.sync = sync or node.sync
    info: dict[str, Any] = answers.answer(msgspec.structs.replace(node.node_info(), state_alarms=alarms))
    _show_status(info, answers.chain(node.chain(), await node.state_hashes()), answers.answer(node.authorities()))
    return capsys.readouterr().out.splitlines()


async def test_state_is_named_by_its_hash_and_block(capsys: pytest.CaptureFixture[str]) -> None:
    node = FakeNode()
    newest = (await node.state_hashes())[-1]
    lines = await shown(capsys, ())
    assert any(line.split() == ["state", f"0x{newest.hash.hex()}", "after", "block", "0"] for line in lines)
    assert not any("ALARM" in line for line in lines)


async def test_a_liar_is_shown_with_the_evidence(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = [line for line in await shown(capsys, ()) if line.startswith("LIAR")]
    (liar,) = FakeNode().authorities()
    assert liar.evidence_hash is not None
    assert f"0x{liar.account.hex()}: evidence 0x{liar.evidence_hash.hex()}" in line


async def test_a_source_that_gave_trouble_is_named_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = [line for line in await shown(capsys, ()) if line.startswith(DROPPED.source)]
    assert DROPPED.state in line
    assert line.endswith(DROPPED.trouble)


async def test_while_blocks_come_in_it_says_how_far_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = [x for x in await shown(capsys, (), SyncStatistics("fetching the state", 0, 8, 16, 9)) if "sync" in x]
    assert line.split(maxsplit=1) == ["sync", "block 8 of 16 (50 %), fetching the state, 9 nodes so far"]
    assert not any("sync" in line for line in await shown(capsys, ()))


async def test_alarms_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    alarm = str(Difference("12D3KooWx", 16, b"\1" * 32, b"\2" * 32))  # type: ignore[arg-type]
    (line,) = [line for line in await shown(capsys, (alarm,)) if line.startswith("ALARM")]
    assert alarm in line
