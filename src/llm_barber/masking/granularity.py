"""The comparison group: the set within which weights compete. Imports no torch, so that the command line starts fast.

granularity   groups of a block with linears of 4 × 6 and 2 × 6
output        4 groups of 6, 2 groups of 6     one output row
input         6 groups of 4, 6 groups of 2     one input column
linear        1 group of 24, 1 group of 12     one linear
block         1 group of 36                    all linears of the block together
"""

from enum import StrEnum


class Granularity(StrEnum):
    """The set within which weights compete (arXiv 2408.10631)."""

    OUTPUT = "output"
    INPUT = "input"
    LINEAR = "linear"
    BLOCK = "block"
