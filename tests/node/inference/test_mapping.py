"""The address range over the shards."""

import mmap
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from contracts.errors import BadInput, Corrupt
from node.inference.mapping import HUGE_PAGE, ShardMapping


def shards_of(directory: Path, stream: bytes, shard_size: int) -> list[Path]:
    paths = []
    for index, offset in enumerate(range(0, len(stream), shard_size)):
        path = directory / str(index)
        path.write_bytes(stream[offset : offset + shard_size])
        paths.append(path)
    return paths


def stream_of(size: int) -> bytes:
    return (
        torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
        .numpy()
        .tobytes()
    )


def mapped_regions(directory: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(directory))


def test_a_tensor_crosses_the_boundary_between_shards(tmp_path: Path) -> None:
    stream = stream_of(5 * mmap.PAGESIZE + 100)
    mapping = ShardMapping(shards_of(tmp_path, stream, 2 * mmap.PAGESIZE), 2 * mmap.PAGESIZE, len(stream))
    assert mapping.private_bytes == 0
    assert mapped_regions(tmp_path) == 3
    offset = 2 * mmap.PAGESIZE - 10
    tensor = mapping.tensor(torch.bfloat16, (2, 3000), offset)
    expected = torch.frombuffer(bytearray(stream), dtype=torch.bfloat16, count=6000, offset=offset)
    assert torch.equal(tensor.view(torch.uint8).flatten(), expected.view(torch.uint8))
    assert mapping.read(len(stream) - 3, 3) == stream[-3:]
    del tensor
    assert mapping.close() == 0
    assert mapped_regions(tmp_path) == 0


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.integers(1, 5 * mmap.PAGESIZE), shard_size=st.sampled_from([1000, mmap.PAGESIZE, 2 * mmap.PAGESIZE]))
def test_the_stream_is_the_same_however_it_is_cut(tmp_path: Path, size: int, shard_size: int) -> None:
    stream = stream_of(size)
    mapping = ShardMapping(shards_of(tmp_path, stream, shard_size), shard_size, size)
    assert mapping.read(0, size) == stream
    assert mapping.close() == 0


@pytest.mark.parametrize("size", [1, 5 * mmap.PAGESIZE + 100, HUGE_PAGE, HUGE_PAGE + 1, 3 * HUGE_PAGE - 1])
def test_models_begin_where_a_huge_page_may_and_leave_no_addresses_behind(tmp_path: Path, size: int) -> None:
    def addresses() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE

    path = tmp_path / "shard"
    path.touch()
    os.truncate(path, size)
    before = addresses()
    mappings = [ShardMapping([path], size, size) for _ in range(20)]
    assert [mapping.tensor(torch.uint8, (1,), 0).data_ptr() % HUGE_PAGE for mapping in mappings] == [0] * 20
    assert addresses() - before < 20 * (size + HUGE_PAGE)
    for mapping in mappings:
        assert mapping.close() == 0
    assert addresses() - before < HUGE_PAGE


def test_nothing_outside_can_be_read(tmp_path: Path) -> None:
    mapping = ShardMapping(shards_of(tmp_path, bytes(100), 4096), 4096, 100)
    for offset, size in ((-1, 1), (0, 101), (100, 1), (1 << 62, 1)):
        with pytest.raises(BadInput, match="outside the artifact"):
            mapping.read(offset, size)
    with pytest.raises(BadInput, match="outside the artifact"):
        mapping.tensor(torch.float32, (1 << 40,), 0)
    assert mapping.close() == 0


def test_a_live_tensor_keeps_the_range_and_is_counted(tmp_path: Path) -> None:
    mapping = ShardMapping(shards_of(tmp_path, bytes(8192), 4096), 4096, 8192)
    view = mapping.tensor(torch.uint8, (4096,), 2048)[5:6]
    assert mapping.close() == 1
    assert int(view[0]) == 0
    del view
    assert mapping.close() == 0
    assert mapping.close() == 0


def test_back_to_back_matrices_become_one(tmp_path: Path) -> None:
    mapping = ShardMapping(shards_of(tmp_path, stream_of(8192), 4096), 4096, 8192)
    first = mapping.tensor(torch.uint8, (10, 64), 4000)
    second = mapping.tensor(torch.uint8, (3, 64), 4640)
    joined = mapping.join(first, second)
    assert joined is not None
    assert torch.equal(joined, torch.cat((first, second)))
    assert mapping.join(second, first) is None
    assert mapping.join(first, mapping.tensor(torch.uint8, (3, 32), 4640)) is None
    assert mapping.join(torch.zeros(1, 64), torch.zeros(1, 64)) is None


@pytest.mark.parametrize("fault", ["missing", "short", "long", "directory", "fifo"])
def test_a_bad_shard_is_named_and_nothing_stays_mapped(tmp_path: Path, fault: str) -> None:
    paths = shards_of(tmp_path, bytes(3 * 4096), 4096)
    bad = paths[1]
    bad.unlink()
    match fault:
        case "short":
            bad.write_bytes(bytes(4095))
        case "long":
            bad.write_bytes(bytes(4097))
        case "directory":
            bad.mkdir()
        case "fifo":
            os.mkfifo(bad)
    with pytest.raises(Corrupt, match=str(bad)):
        ShardMapping(paths, 4096, 3 * 4096)
    assert mapped_regions(tmp_path) == 0
