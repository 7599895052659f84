"""Bit masks and kept values in C, within their arrays whatever the mask says; which instructions are used."""

import logging

import numpy as np
import pytest
import torch

from llm_barber import native
from llm_barber.errors import SettingsError
from llm_barber.native import Instructions
from tests.helpers.guarded import guarded

needs_c = pytest.mark.skipif(native.library() is None, reason="src/llm_barber/native is not built here")


@needs_c
@pytest.mark.parametrize("level", [Instructions.AVX2, Instructions.AVX512])
@pytest.mark.parametrize("kind", [np.uint16, np.uint32])
@pytest.mark.parametrize("count", [8, 16, 40, 56, 64, 160])
def test_weights_are_taken_out_and_put_back(
    level: Instructions, kind: type[np.unsignedinteger], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An access beyond an array ends the process: every array ends where a page does."""
    if level > native.processor_instructions():
        pytest.skip(f"needs {level.name}")
    monkeypatch.setattr(native, "instructions", lambda: level)
    generator = np.random.default_rng(count)

    def place(array: np.ndarray) -> np.ndarray:
        return guarded(torch.from_numpy(array.view(np.uint8))).numpy().view(array.dtype)

    for density in (0.0, 0.3, 0.5, 1.0):
        kept = generator.random(count) < density
        flat = place(generator.integers(1, 2**16, count).astype(kind) * kept.astype(kind))
        bits, values, again = place(np.zeros(count // 8, np.uint8)), place(np.zeros(kept.sum(), kind)), place(flat * 0)
        native.find(flat, bits)
        assert np.array_equal(bits, np.packbits(kept, bitorder="little"))
        native.take(flat, bits, values)
        assert np.array_equal(values, flat[kept])
        native.put(values, bits, again)
        assert np.array_equal(again, flat)


@needs_c
def test_a_mask_with_too_many_bits_reads_nothing_beyond() -> None:
    """Values that are not there are zeros: the C functions know the sizes, and do not trust the mask."""
    into = np.full(16, 9, dtype=np.int16)
    native.put(np.ones(3, np.int16), np.array([255, 255], np.uint8), into)
    assert into.tolist() == [1] * 3 + [0] * 13
    values = np.full(4, 9, dtype=np.int16)
    native.take(np.arange(1, 17, dtype=np.int16), np.array([255, 255], np.uint8), values[:2])
    assert values.tolist() == [1, 2, 9, 9]


@needs_c
def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="values of float16 for weights of float32"):
        native.put(np.zeros(3, np.float16), np.zeros(2, np.uint8), np.zeros(16, np.float32))
    with pytest.raises(ValueError, match="1 bytes of bits for 16 weights"):
        native.find(np.zeros(16, np.int16), np.zeros(1, np.uint8))
    for layout, groups in (((3, 4, 6), 2), ((3, 4, 5), 1)):
        with pytest.raises(ValueError, match="do not fit together"):
            native.join(np.zeros(4, np.uint8), np.zeros(256, np.uint8), layout, np.zeros(3 * groups, np.uint8))


@pytest.mark.parametrize(
    ("built", "most", "forced", "used", "text"),
    [
        (False, Instructions.AVX2, "", "AVX2", "unpacked by NumPy, since the C extension is missing"),
        (True, Instructions.AVX2, "amx", "AVX2", "AVX2; the processor has AVX2"),
        (True, Instructions.AMX, "avx512", "AVX512", "AVX512; the processor has AMX"),
        (True, Instructions.AMX, "", "AMX", "AMX; the processor has AMX"),
    ],
)
def test_instructions_can_be_limited_and_the_log_says_what_is_used(
    built: bool, most: Instructions, forced: str, used: str, text: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setenv(native.ISA, forced)
    monkeypatch.setattr(native, "library", lambda: object() if built else None)
    monkeypatch.setattr(native, "processor_instructions", lambda: most)
    with caplog.at_level(logging.INFO, logger="llm_barber"):
        assert native.instructions.__wrapped__().name == used
    assert text in caplog.text


def test_other_names_of_instructions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.ISA, "sse2")
    with pytest.raises(SettingsError, match="LLM_BARBER_ISA=sse2"):
        native.usable_instructions()
