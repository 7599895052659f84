"""Methods of the initial mask, and presets: the steps that follow it, with the defaults of each."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from llm_barber.masking.granularity import Granularity
from llm_barber.masking.pattern import NofM, Pattern


class Initial(StrEnum):
    """The method of the initial mask."""

    WANDA = "wanda"
    MAGNITUDE = "magnitude"
    SPARSEGPT = "sparsegpt"
    RIA = "ria"
    DSNOT = "dsnot"
    ALPS = "alps"

    @property
    def has_updates(self) -> bool:
        """True of methods that compute new values for kept weights."""
        return METHOD_FACTS[self].has_updates

    @property
    def reads_inputs(self) -> bool:
        """True of methods that need a statistic of the linears' inputs, so that layers are run for them."""
        return METHOD_FACTS[self].reads_inputs

    @property
    def compares_in_linear(self) -> bool:
        """True of methods whose released program compares the weights of a whole linear, not those of each row."""
        return METHOD_FACTS[self].compares_in_linear

    @property
    def fixes_groups(self) -> bool:
        """True of methods with comparison groups of their own; `initial_granularity` is refused then."""
        return METHOD_FACTS[self].fixes_groups

    @property
    def revision(self) -> int:
        """Number of the method's version: it is raised whenever masks or updated weights change."""
        return METHOD_FACTS[self].revision


@dataclass(frozen=True)
class MethodFacts:
    """Facts of a method that settings and plans need; `method/initial_methods.py` has what it does.

    `granularity`, `ratio`: of the rebuild in the released experiments. The other fields: as `Initial`'s properties.
    """

    granularity: Granularity
    ratio: float
    reads_inputs: bool = True
    compares_in_linear: bool = False
    fixes_groups: bool = False
    has_updates: bool = False
    revision: int = 1


# RIA, DSnoT and ALPS have no released experiments with a rebuild: each has the numbers of the method that it resembles.
METHOD_FACTS: dict[Initial, MethodFacts] = {
    Initial.MAGNITUDE: MethodFacts(Granularity.BLOCK, 0.1, reads_inputs=False, compares_in_linear=True),
    Initial.WANDA: MethodFacts(Granularity.OUTPUT, 0.01),
    Initial.SPARSEGPT: MethodFacts(Granularity.LINEAR, 0.1, fixes_groups=True, has_updates=True),
    Initial.RIA: MethodFacts(Granularity.OUTPUT, 0.01, compares_in_linear=True),
    Initial.DSNOT: MethodFacts(Granularity.OUTPUT, 0.01),
    Initial.ALPS: MethodFacts(Granularity.LINEAR, 0.1, compares_in_linear=True, has_updates=True),
}
if lacking := set(Initial) - set(METHOD_FACTS):
    raise LookupError(f"METHOD_FACTS lacks {', '.join(lacking)}")


def rebuild_defaults(
    initial: Initial, granularity: Granularity | None, ratio: float | None, pattern: Pattern | None
) -> tuple[Granularity, float]:
    """Granularity and rebuild ratio of a run: those of its settings, else those of the released experiments.

    With N:M the default granularity is `output` for every method: the released program chooses N:M's growing weights
    per output row.
    """
    method = METHOD_FACTS[initial]
    default = Granularity.OUTPUT if isinstance(pattern, NofM) else method.granularity
    return granularity or default, method.ratio if ratio is None else ratio


def _released(values: Mapping[Initial, object]) -> str:
    """Values of all methods in words: those unlike Wanda's, then Wanda's."""
    usual = values[Initial.WANDA]
    different = [f"{method} {value}" for method, value in values.items() if value != usual]
    return ", ".join([*different, f"else {usual}"])


def methods_with(fact: str, last: str = "and") -> str:
    """Names of the methods for which a property is true, in words. Example: ("has_updates", "or")."""
    *names, end = (method.value for method in Initial if getattr(method, fact))
    return f"{', '.join(names)} {last} {end}"


RELEASED_GRANULARITIES = _released({method: facts.granularity for method, facts in METHOD_FACTS.items()})
# For example "magnitude 0.1, …, else 0.01".
RELEASED_RATIOS = _released({method: facts.ratio for method, facts in METHOD_FACTS.items()})


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
