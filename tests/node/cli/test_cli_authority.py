"""`aigen authority check`: a file of evidence names its liar; anything else is refused in one line."""

from pathlib import Path

import pytest

from ledger.keys import Key
from ledger.votes import NO_BLOCK, Evidence, Kind, Votes, sign
from tests.node.cluster import aigen

KEY = Key.from_secret(b"\x21" * 32)
EPOCH = b"\x22" * 32


def vote(kind: Kind, block_hash: bytes) -> Votes:
    return Votes(kind, 3, block_hash, (sign(KEY, EPOCH, kind, 3, block_hash),))


NO_LIE = Evidence(EPOCH, vote(Kind.DUMMY, NO_BLOCK), vote(Kind.NOTARISE, b"\x24" * 32))


def test_evidence_is_checked_offline(tmp_path: Path) -> None:
    evidence = Evidence(EPOCH, vote(Kind.DUMMY, NO_BLOCK), vote(Kind.FINALISE, b"\x23" * 32))
    path = tmp_path / "evidence"
    path.write_text(f"0x{evidence.encode().hex()}\n")
    assert aigen("authority", "check", path, "--json").json == {
        "account": f"0x{KEY.address.hex()}",
        "evidence_hash": f"0x{evidence.hash.hex()}",
        "epoch": f"0x{EPOCH.hex()}",
    }
    assert f"0x{KEY.address.hex()}" in aigen("authority", "check", path).out


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no evidence"),
        ("0x00", "no evidence"),
        ("nonsense", "hexadecimal"),
        ("\N{SNOWMAN}", "hexadecimal"),
        ("0x" + "00" * 8000, "at most"),
        (f"0x{NO_LIE.encode().hex()}", "may say both"),
    ],
)
def test_what_is_no_evidence_is_refused(text: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "evidence"
    path.write_text(text)
    aigen("authority", "check", path).refused(why)
