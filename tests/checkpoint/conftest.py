"""Fixtures of the tests of files."""

import pytest

from llm_barber import native


@pytest.fixture(params=["AVX-512", "AVX2", "NumPy"])
def with_and_without_c(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test by AVX-512, by AVX2 and by NumPy."""
    if request.param == "NumPy":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("src/llm_barber/native/packed.c is not built here: pip install -e . with a C compiler and AVX2")
    elif request.param == "AVX2":
        monkeypatch.setattr(native, "instructions", lambda: native.Instructions.AVX2)
    elif native.instructions() == native.Instructions.AVX2:
        pytest.skip("needs a processor with AVX-512 and VBMI2")
