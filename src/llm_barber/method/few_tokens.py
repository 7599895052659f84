"""Experts that the calibration text gives few tokens: their linears keep a mask that needs no inputs."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from llm_barber.method.pruned_linear import PrunedLinear
from llm_barber.model.block import DecoderLayer
from llm_barber.parallel.ranks import Ranks

FEW_TOKENS = 64  # the inputs of an expert with fewer tokens say too little


def total_token_counts(layer: DecoderLayer, ranks: Ranks) -> dict[str, Tensor]:
    """Tokens that each expert was given in all processes, int64 (experts,), by path of the experts.

    The layer keeps the counts of this process.
    """
    totals = {path: experts.tokens.clone() for path, experts in layer.experts.items()}
    for tokens in totals.values():
        ranks.add_tensor(tokens)
    return totals


def linears_with_few_tokens(layer: DecoderLayer, totals: Mapping[str, Tensor], calls: int = 1) -> list[str]:
    """Linears of the experts that were given fewer than `FEW_TOKENS` tokens a call.

    Args:
        layer: has the experts.
        totals: `total_token_counts`.
        calls: number of times that the layer was run for each sequence.
    """
    linears = []
    for path, tokens in totals.items():
        idle = {f"{path}.{number}" for number in (tokens < calls * FEW_TOKENS).nonzero().flatten().tolist()}
        linears += [name for name in layer.linears if name.rpartition(".")[0] in idle]
    return linears


def freeze_linears_with_few_tokens(
    linears: Mapping[str, PrunedLinear], layer: DecoderLayer, ranks: Ranks, calls: int = 1
) -> dict[str, PrunedLinear]:
    """Freeze the linears of experts that were given too few tokens.

    Linears whose tokens were counted before stay as they are.
    """
    idle = set(linears_with_few_tokens(layer, total_token_counts(layer, ranks), calls))
    result = dict(linears)
    for name, linear in linears.items():
        if linear.few_tokens is None:
            result[name] = linear.left_alone() if name in idle else replace(linear, few_tokens=False)
    return result
