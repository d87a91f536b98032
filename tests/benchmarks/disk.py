"""What a ledger takes on disk and what that is made of, by the key prefixes that ledger.store documents."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from ledger.store import Store

PARTS = {
    b"b": "sealed blocks",
    b"e": "event records",
    b"r": "receipts",
    b"s": "state nodes and code",
    b"t": "index of transactions",
    b"h": "index of block hashes",
}


@dataclass(frozen=True)
class Part:
    """The keys of one prefix: how many, and the bytes of keys and values before LevelDB compresses them."""

    keys: int
    raw_bytes: int
    file_bytes: int
    """LevelDB's estimate of their share of the files, to about its block of 4 kB."""


@dataclass(frozen=True)
class Disk:
    """All files of a compacted LevelDB, and its parts by prefix."""

    file_bytes: int
    parts: dict[bytes, Part]

    @staticmethod
    def of(store: Store) -> Disk:
        """Compact a store, then measure it."""
        database = store._db
        database.compact_range()
        parts = {}
        for prefix in PARTS:
            sizes = [len(key) + len(value) for key, value in database.iterator(prefix=prefix)]
            share = database.approximate_size(prefix, bytes([prefix[0] + 1]))
            parts[prefix] = Part(len(sizes), sum(sizes), share)
        files = (file.stat().st_size for file in store.path.iterdir() if file.suffix in {".ldb", ".log"})
        return Disk(sum(files), parts)

    def beyond(self, before: Disk) -> Disk:
        """What came on top of `before`."""
        parts = {
            prefix: Part(part.keys - was.keys, part.raw_bytes - was.raw_bytes, part.file_bytes - was.file_bytes)
            for prefix, part in self.parts.items()
            for was in [before.parts[prefix]]
        }
        return Disk(self.file_bytes - before.file_bytes, parts)

    def show(self, title: str, count: int) -> None:
        """Print the parts, divided by `count`."""
        table = Table(title=title)
        table.add_column("what")
        for column in ("keys", "before compression", "in the files"):
            table.add_column(column, justify="right")
        for prefix, part in self.parts.items():
            sizes = (f"{size / count:.0f}" for size in (part.raw_bytes, part.file_bytes))
            table.add_row(f"{prefix.decode()}  {PARTS[prefix]}", f"{part.keys / count:.2f}", *sizes)
        raw = sum(part.raw_bytes for part in self.parts.values())
        table.add_row("all", "", f"{raw / count:.0f}", f"{self.file_bytes / count:.0f}")
        Console(width=max(120, Console().width)).print(table)
