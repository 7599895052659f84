"""Fixtures of the tests of files."""

import pytest

from llm_barber import native


@pytest.fixture(params=["C", "NumPy"])
def with_and_without_c(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test twice, with the C extension and with NumPy."""
    if request.param == "NumPy":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("src/llm_barber/native/packed.c is not built here: pip install -e . with a C compiler and AVX2")
