"""Presets: what a run does beyond the initial mask, unless a setting says otherwise."""

from dataclasses import dataclass
from enum import StrEnum


class Refine(StrEnum):
    """How a chosen (and rebuilt) mask is refined: not at all, linear by linear, or by tuning whole layers."""

    NONE = "none"
    SWAPS = "swaps"
    TUNE = "tune"


class Reconstruct(StrEnum):
    """What becomes of the kept weights: nothing, least squares of each linear, or tuning of each layer.

    Tuning follows least squares where masks are not tuned themselves.
    """

    NONE = "none"
    LEAST_SQUARES = "least-squares"
    TUNE = "tune"


class Allocation(StrEnum):
    """How sparsity is spread: evenly, by the outliers of layers (OWL, arXiv 2310.05175), or by the loss.

    The last takes gradients of the model's own loss on the calibration text, for each linear (`masking/budget.py`).
    """

    UNIFORM = "uniform"
    OWL = "owl"
    LOSS = "loss"


class Preset(StrEnum):
    """`paper`: the published method. `mask`: the best with dense weights. `best`: the best quality, weights change."""

    PAPER = "paper"
    MASK = "mask"
    BEST = "best"


@dataclass(frozen=True)
class PresetSettings:
    """What a preset stands for; the allocation is not for N:M, which has one sparsity everywhere."""

    rebuild: bool
    refine: Refine
    reconstruct: Reconstruct
    allocation: Allocation


PRESETS = {
    Preset.PAPER: PresetSettings(True, Refine.NONE, Reconstruct.NONE, Allocation.UNIFORM),
    Preset.MASK: PresetSettings(False, Refine.TUNE, Reconstruct.NONE, Allocation.LOSS),
    Preset.BEST: PresetSettings(False, Refine.TUNE, Reconstruct.TUNE, Allocation.LOSS),
}
# Raised when how a preset finds masks or weights changes, so that what `compare` has kept of it is measured again.
REVISIONS = {Preset.PAPER: 1, Preset.MASK: 5, Preset.BEST: 7}
SWAPS, PATTERN_SWAPS = 100, 400  # a row, at most; with N:M there are more that gain
TARGET_MIX = 0.5
PATTERN_TARGET_MIX = 0.75  # where masks of N:M are tuned
SOLVED_TARGET_MIX = 0.25  # where all that is done is least squares
# Passes over the calibration text when layers are tuned: as many as these tokens take, within bounds. More text needs
# fewer passes, and wins more than they do.
TUNE_TOKENS, FEWEST_PASSES, MOST_PASSES = 2**16, 2, 8
# Shares of the windows that are held out. Of tuned layers they only tell whether they are better for it, and windows
# that are not learnt from cost more than that is worth; with swaps, how many of each row are kept.
GUARD, TUNING_GUARD = 1 / 8, 1 / 32
