"""Granularity: the comparison group within which weights compete.

Imports no torch, so that the command line starts fast.

A block with linears of 4 × 6 and 2 × 6 has these groups:

granularity   a group is                             groups
output        an output row                          4 of 6 weights, 2 of 6
input         an input column                        6 of 4 weights, 6 of 2
linear        a linear                               1 of 24 weights, 1 of 12
block         all linears of the block together      1 of 36 weights
"""

from enum import StrEnum


class Granularity(StrEnum):
    """The set within which weights compete (arXiv 2408.10631)."""

    OUTPUT = "output"
    INPUT = "input"
    LINEAR = "linear"
    BLOCK = "block"
