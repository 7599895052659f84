"""Presets: the steps of a run after the initial mask, and their defaults. Each can be set separately."""

from dataclasses import dataclass
from enum import StrEnum


class Refine(StrEnum):
    """Refinement of the initial or rebuilt mask: none, swaps in each linear, or tuning of whole layers."""

    NONE = "none"
    SWAPS = "swaps"
    TUNE = "tune"


class Reconstruct(StrEnum):
    """Reconstruction of the kept weights: none, least squares in each linear, or tuning of whole layers.

    Tuning starts from least squares unless masks are tuned, too.
    """

    NONE = "none"
    LEAST_SQUARES = "least-squares"
    TUNE = "tune"


class Allocation(StrEnum):
    """Spread of the sparsity: uniform, by the outliers of layers (OWL, arXiv 2310.05175), or by the loss.

    `loss` takes the gradients of the model's loss on the calibration text, for each linear (`masking/budget.py`).
    """

    UNIFORM = "uniform"
    OWL = "owl"
    LOSS = "loss"


class Preset(StrEnum):
    """`paper`: the published method. `mask`: tunes masks, keeps dense weights. `best`: tunes both."""

    PAPER = "paper"
    MASK = "mask"
    BEST = "best"


@dataclass(frozen=True)
class PresetSettings:
    """Settings of a preset.

    The allocation is not for N:M, whose sparsity is the same everywhere; `reorder` is for N:M alone.
    """

    rebuild: bool
    refine: Refine
    reconstruct: Reconstruct
    allocation: Allocation
    reorder: bool


PRESETS = {
    Preset.PAPER: PresetSettings(True, Refine.NONE, Reconstruct.NONE, Allocation.UNIFORM, False),
    Preset.MASK: PresetSettings(False, Refine.TUNE, Reconstruct.NONE, Allocation.LOSS, True),
    Preset.BEST: PresetSettings(False, Refine.TUNE, Reconstruct.TUNE, Allocation.LOSS, True),
}
# Raise a preset's revision whenever its masks or weights change: `compare` then measures its finished cells again.
REVISIONS = {Preset.PAPER: 1, Preset.MASK: 6, Preset.BEST: 8}
# Raise it, too, whenever the presets' allocation changes: `compare` then measures other methods with it again.
ALLOCATION_REVISION = 5
SWAPS, PATTERN_SWAPS = 100, 400  # at most, in a row; with N:M more swaps lower the error
TARGET_MIX = 0.5
PATTERN_TARGET_MIX = 0.75  # for tuning of N:M masks
SOLVED_TARGET_MIX = 0.25  # for least squares alone
# A step of tuning has `SEQUENCES_A_STEP` windows, and layers are tuned in as many passes over the text as read about
# `TUNE_TOKENS` tokens: more text gains more than additional passes do. With less text than `LITTLE_TEXT` a step has one
# window: it gets nearly as many steps as more text, in less time than more passes would take.
TUNE_TOKENS, FEWEST_PASSES, SEQUENCES_A_STEP = 2**16, 2, 4
LITTLE_TEXT, PASSES_OF_LITTLE_TEXT = 2**14, 3
# Shares of the windows that are held out, with swaps and with tuning. With swaps, held-out windows decide the number of
# swaps in each row. With tuning they only choose the pass that is kept; tuning learns from all other windows, so that
# more held-out windows would cost more than this choice is worth.
GUARD, TUNING_GUARD = 1 / 8, 1 / 32
