"""Tiny models are faster on one thread, and two threads of every test would only wait for one another."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)
