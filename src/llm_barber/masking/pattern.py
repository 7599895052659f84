"""Patterns of sparsity: an unstructured fraction, or N kept of every M consecutive inputs of a row.

Imports no torch, so that the command line starts fast; `find_patterns.py` finds the patterns of tensors.
"""

from dataclasses import dataclass
from fractions import Fraction


def as_fraction(value: float) -> Fraction:
    """Fraction of the decimal that `value` prints as, with a denominator of at most 10⁹.

    An int64 count can be multiplied by its numerator without overflow.
    """
    return Fraction(repr(float(value))).limit_denominator(10**9)


def exact_floor(fraction: float, count: int) -> int:
    """floor(fraction · count), with `fraction` read as the decimal that the user wrote.

    Example: fraction=0.29, count=100 -> 29, since 0.29 means 29/100; in binary floating point 0.29 · 100 is 28.999….
    Likewise 1/3 of 576 is 192.
    """
    return int(Fraction(repr(float(fraction))).limit_denominator(10**11) * count)


@dataclass(frozen=True)
class Unstructured:
    """A fraction of the weights is pruned, wherever they lie.

    Example: `Unstructured(0.5)` prunes `floor(0.5 · members)` weights of each comparison group, as the published
    programs do: 7 of 15. `Unstructured(0.5, over_linear=True)` prunes half of the linear's weights, rounded to the
    nearest whole number: of 5 groups of 15, the first three lose 8 and the last two 7.

    Raises:
        ValueError: sparsity is not inside (0, 1).
    """

    sparsity: float
    over_linear: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise ValueError(f"sparsity {self.sparsity} is not between 0 and 1 (0.5 prunes half of the weights)")

    def pruned(self, members: int) -> int:
        """Number of weights to prune in a comparison group of `members`, rounded down; never all of them."""
        return min(exact_floor(self.sparsity, members), members - 1)

    def nearest(self, weights: int) -> int:
        """Nearest whole number to the fraction of `weights`."""
        return round(as_fraction(self.sparsity) * weights)

    def __str__(self) -> str:
        return "unstructured"


@dataclass(frozen=True)
class NofM:
    """N weights are **kept** of every M consecutive inputs of an output row.

    Example: `NofM(2, 4)` on a row of 8 inputs keeps 2 of inputs 0…3 and 2 of inputs 4…7. In a row of 10, the last two
    inputs stay dense: they are the tail, the inputs after the last whole group.

    Raises:
        ValueError: not 1 ≤ kept < of.
    """

    kept: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.kept < self.of:
            raise ValueError(f"pattern {self} must keep at least 1 and fewer than all of its group (2:4 keeps 2 of 4)")

    @property
    def sparsity(self) -> float:
        """The fraction removed."""
        return 1 - self.kept / self.of

    def covered(self, columns: int) -> int:
        """Number of the `columns` inputs of a row that lie in whole groups; the rest is its tail."""
        return columns // self.of * self.of

    def __str__(self) -> str:
        return f"{self.kept}:{self.of}"


Pattern = Unstructured | NofM


def parse_pattern(text: str) -> NofM:
    """Read "N:M": N kept of every M.

    Raises:
        ValueError: not two whole numbers with a colon between them, or not 1 ≤ N < M.
    """
    kept, separator, of = text.partition(":")
    if not (separator and kept.isdecimal() and of.isdecimal()):
        raise ValueError(f"pattern {text!r} is not N:M (for example 2:4, which keeps 2 of every 4)")
    return NofM(int(kept), int(of))


def group_pattern(pattern: Pattern | None) -> NofM | None:
    """N:M of a pattern; None: unstructured, or no pattern."""
    return pattern if isinstance(pattern, NofM) else None
