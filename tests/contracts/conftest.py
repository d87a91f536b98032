"""The fixture every contract test uses."""

import pytest

from tests.contracts.chain import Chain


@pytest.fixture
def chain() -> Chain:
    """The dev network just after its genesis."""
    return Chain()
