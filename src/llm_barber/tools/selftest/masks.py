"""Masks on the GPU against masks on the CPU.

The two add up products in another order, so that scores differ by rounding, and two weights with nearly equal scores
may change places in the ranking. A bound of the share of mask bits that differ separates rounding from faults: it is
at least five times the share that rounding alone changes, and in float32 less than what products in TF32 would change.
docs/notebook/machines.md has both shares, measured on a CPU. ALPS multiplies rounding: its bound finds gross faults.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llm_barber.tools.selftest.bench import CPU, Bench, compare_masks
from llm_barber.tools.selftest.result import Finding, NotRunError


@dataclass(frozen=True)
class MaskCheck:
    """A way to prune, and the bounds of the share of mask bits that may differ between two devices, by dtype."""

    settings: Mapping[str, Any]
    float32: float
    half: float

    def bound(self, dtype: torch.dtype) -> float:
        """Bound for a compute dtype."""
        return self.float32 if dtype == torch.float32 else self.half


def _initial(name: str, float32: float, half: float) -> MaskCheck:
    return MaskCheck({"initial": name, "rebuild": False}, float32, half)


# Few steps, since Adam multiplies rounding in each. `guard` 0: held-out windows would decide for or against a whole
# block by a hair's breadth.
TUNED = {"tune_passes": 2, "tune_windows": 4, "guard": 0}
MASK_CHECKS: dict[str, MaskCheck] = {
    # Ranks the stored weights, without any product: sorting, ties included, gives the same everywhere.
    "magnitude": _initial("magnitude", 0.0, 0.0),
    "wanda": _initial("wanda", 5e-5, 2e-3),
    "ria": _initial("ria", 5e-5, 2e-3),
    "dsnot": _initial("dsnot", 5e-5, 2e-3),
    "sparsegpt": _initial("sparsegpt", 5e-5, 2e-2),
    "alps": _initial("alps", 3e-2, 5e-2),
    # With the published ratio rows this short would swap no pair.
    "paper": MaskCheck({"preset": "paper", "rebuild_ratio": 0.5}, 1e-4, 2e-2),
    "swaps": MaskCheck({"refine": "swaps", "allocation": "uniform", "guard": 0}, 2e-3, 5e-2),
    "mask": MaskCheck({"preset": "mask", **TUNED}, 2e-3, 5e-2),
    "best": MaskCheck({"preset": "best", **TUNED}, 2e-3, 5e-2),
    "experts": MaskCheck({"family": "mixtral", "preset": "mask", **TUNED}, 2e-3, 5e-2),
}


def check_masks(bench: Bench) -> Iterator[Finding]:
    """Compare the masks of each method on the device with those of the CPU.

    Raises:
        NotRunError: the device is the CPU.
    """
    if bench.device.type == "cpu":
        raise NotRunError("the device is the CPU itself")
    for dtype in bench.dtypes:
        for name, method in MASK_CHECKS.items():
            settings = {**method.settings, "dtype": str(dtype).removeprefix("torch.")}
            reference, _, _ = bench.prune(CPU, **settings)
            output, _, _ = bench.prune(bench.device, **settings)
            yield judge_masks(f"{name}, {settings['dtype']}", reference, output, method.bound(dtype))


def judge_masks(title: str, reference: Path, output: Path, bound: float) -> Finding:
    """Compare two checkpoints' masks, and the share of bits that differ with its bound."""
    different, total = compare_masks(reference, output)
    words = f"{different:,} of {total:,} mask bits differ ({different / total:.2g}; bound {bound:.2g})"
    return Finding(text=f"{title}: {words}", passed=different <= bound * total)
