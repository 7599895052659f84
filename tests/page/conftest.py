"""Pages are drawn here."""

import pytest


@pytest.fixture(autouse=True)
def _pages_are_not_drawn() -> None:
    """Draw them: these tests look at them."""
