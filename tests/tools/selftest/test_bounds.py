"""The bounds of masks lie between what rounding changes, and what a fault changes. Measured on a CPU, with noise."""

from pathlib import Path

import torch

from llm_barber.tools.selftest.bench import CPU, Bench, Size, compare_masks
from llm_barber.tools.selftest.masks import METHODS
from tests.helpers.noise import Noise

SIZE = Size(128, 352, 1, 4, 2, 128, windows=8, tokens=64)


def share(folder: Path, name: str, dtype: str, size: float) -> float:
    """Share of the mask's bits that noise changes."""
    bench = Bench(CPU, torch.float32, folder, SIZE)
    settings = {**METHODS[name].settings, "dtype": dtype}
    reference, _, _ = bench.prune(CPU, **settings)
    with Noise(size):
        output, _, _ = bench.prune(CPU, **settings)
    different, total = compare_masks(reference, output)
    return different / total
