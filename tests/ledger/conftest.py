"""Property tests here execute and encrypt: no single example is held to a deadline on a busy machine."""

from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.ledger import zygote as zygotes

settings.register_profile("unhurried", deadline=None, print_blob=True)
settings.load_profile("unhurried")


@pytest.fixture(scope="session")
def zygote() -> Iterator[zygotes.Zygote]:
    """Where jobs run that kill themselves or damage what they open."""
    with zygotes.zygote() as made:
        yield made
