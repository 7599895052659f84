"""Methods of the initial mask, and the rebuild that the released experiments give each of them."""

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
        return self in (Initial.SPARSEGPT, Initial.ALPS)

    @property
    def compares_in_linear(self) -> bool:
        """True of methods whose released program compares the weights of a whole linear, not those of each row."""
        return self in (Initial.MAGNITUDE, Initial.RIA, Initial.ALPS)


# Granularity and rebuild ratio of the released experiments. RIA, DSnoT and ALPS have none there: each takes those of
# the method that it resembles.
RELEASED_REBUILD: dict[Initial, tuple[Granularity, float]] = {
    Initial.MAGNITUDE: (Granularity.BLOCK, 0.1),
    Initial.WANDA: (Granularity.OUTPUT, 0.01),
    Initial.SPARSEGPT: (Granularity.LINEAR, 0.1),
    Initial.RIA: (Granularity.OUTPUT, 0.01),
    Initial.DSNOT: (Granularity.OUTPUT, 0.01),
    Initial.ALPS: (Granularity.LINEAR, 0.1),
}


def rebuild_defaults(
    initial: Initial, granularity: Granularity | None, ratio: float | None, pattern: Pattern | None
) -> tuple[Granularity, float]:
    """Granularity and rebuild ratio of a run: those of its settings, else those of the released experiments.

    With N:M the default granularity is `output` for every method: the released program chooses N:M's growing weights
    per output row.
    """
    default_granularity, default_ratio = RELEASED_REBUILD[initial]
    if isinstance(pattern, NofM):
        default_granularity = Granularity.OUTPUT
    return granularity or default_granularity, default_ratio if ratio is None else ratio


def _released(part: int) -> str:
    """Granularities (0) or ratios (1) of `RELEASED_REBUILD` in words: those unlike Wanda's, then Wanda's."""
    usual = RELEASED_REBUILD[Initial.WANDA][part]
    different = [f"{method} {pair[part]}" for method, pair in RELEASED_REBUILD.items() if pair[part] != usual]
    return ", ".join([*different, f"else {usual}"])


RELEASED_GRANULARITIES, RELEASED_RATIOS = _released(0), _released(1)  # "magnitude 0.1, sparsegpt 0.1, …, else 0.01"
