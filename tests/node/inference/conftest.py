"""Tiny models are faster on one thread, and two threads of every test would only wait for one another."""

import pytest
import torch

from node.inference import products


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=[True, False], ids=["bf16-cpu", "other-cpu"])
def multiplies_bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """As on a CPU that has instructions for products of bf16, and int8 if this one has, and as on one that has not."""
    has: bool = request.param
    monkeypatch.setattr("node.inference.products.multiplies_bf16", lambda: has)
    multiplies_int8 = has and products.multiplies_int8()  # cannot be had where it is not
    monkeypatch.setattr("node.inference.matrices.multiplies_int8", lambda: multiplies_int8)
    return has
