"""The bounds of masks lie between what rounding changes, and what a fault changes: measured on a CPU, with noise."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llm_barber.tools.selftest.bench import CPU, Bench, Size, compare_masks
from llm_barber.tools.selftest.masks import MASK_CHECKS
from tests.helpers.noise import REORDERED, TF32, Noise

SIZE = Size(128, 352, 1, 4, 2, 128, windows=8, tokens=64)
SIZE_WITH_EXPERTS = replace(SIZE, windows=4)  # noise takes its time with many small products
MARGIN = 5  # a bound is at least so many times the share of bits that rounding changes
NOT_TOLD = {"magnitude", "alps"}  # nothing is multiplied; rounding changes nearly as much as TF32


def shares(folder: Path, name: str, dtype: str, *sizes: float) -> list[float]:
    """Share of the mask's bits that noise of each size changes."""
    settings = {**MASK_CHECKS[name].settings, "dtype": dtype}
    bench = Bench(CPU, torch.float32, folder, SIZE_WITH_EXPERTS if "family" in settings else SIZE)
    reference, _, _ = bench.prune(CPU, **settings)
    changed = []
    for size in sizes:
        with Noise(size):
            output, _, _ = bench.prune(CPU, **settings)
        different, total = compare_masks(reference, output)
        changed.append(different / total)
    return changed


@pytest.mark.parametrize("name", MASK_CHECKS)
def test_a_float32_bound_tells_rounding_from_tf32(tmp_path: Path, name: str) -> None:
    rounding, fault = shares(tmp_path, name, "float32", REORDERED, TF32)
    assert MARGIN * rounding <= MASK_CHECKS[name].float32
    assert (fault > MASK_CHECKS[name].float32) is (name not in NOT_TOLD)


@pytest.mark.parametrize("name", ["magnitude", "wanda", "paper", "mask", "experts"])
def test_a_half_precision_bound_allows_rounding(tmp_path: Path, name: str) -> None:
    (rounding,) = shares(tmp_path, name, "bfloat16", REORDERED)
    assert MARGIN * rounding <= MASK_CHECKS[name].half
    assert (rounding > 0) is (name in ("paper", "mask", "experts")), "the noise does not reach the products"
