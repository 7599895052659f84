"""Methods of the initial mask: `MASK_METHODS` has a line for each, with the function that prunes one linear.

`settings/presets.py` has the facts that settings, tables and plans need.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm_barber.errors import overflowed
from llm_barber.masking import saliency
from llm_barber.masking.admm import ScaledGram, admm, scaled_gram
from llm_barber.masking.dsnot import dsnot
from llm_barber.masking.gram import GramMatrix
from llm_barber.masking.granularity import Granularity
from llm_barber.masking.initial import initial_mask
from llm_barber.masking.pattern import Pattern, group_pattern
from llm_barber.masking.sparsegpt import inverse_factor, sparsegpt
from llm_barber.masking.statistics import InputMoments, InputSquares
from llm_barber.settings.presets import Initial


@dataclass(frozen=True)
class PrunableLinear:
    """A linear as a method sees it.

    `name`: for messages. `weight`: (out, in), dense. `target`: sparsity or N:M. `granularity`: comparison group.
    `in_mlp`: the linear belongs to an MLP.
    """

    name: str
    weight: Tensor
    target: Pattern
    granularity: Granularity
    in_mlp: bool = False

    def best(self, scores: Tensor) -> Tensor:
        """Keep mask, bool (out, in), that keeps the highest scores, float32 (out, in), of each comparison group.

        Raises:
            TypeError: the scores have another shape or dtype.
            NotFiniteError: a score is NaN; a GPU is not waited for to find out.
        """
        if scores.shape != self.weight.shape or scores.dtype != torch.float32:
            raise TypeError(f"scores of {self.name} are {_described(scores)}, not float32 {tuple(self.weight.shape)}")
        if scores.device.type == "cpu" and scores.isnan().any():
            raise overflowed(f"a score of {self.name}")
        return initial_mask(scores, self.target, self.granularity)


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


Pruned = tuple[Tensor, Tensor | None]  # keep mask, bool (out, in), and weights, (out, in); None: the dense ones


@dataclass(frozen=True)
class MaskMethod:
    """The functions of a method.

    `prune`: from the linear, and what `prepare` made. `statistic`: class of the running statistic of the inputs; None:
    the method looks at weights alone. `prepare`: from the statistic and the linear's name, what linears with the same
    inputs share (q, k and v; gate and up), computed once for them.
    """

    prune: Callable[[PrunableLinear, Any], Pruned]
    statistic: Callable[[int, torch.device], Any] | None = None
    prepare: Callable[[Any, str], Any] = lambda statistic, name: statistic


def _by_magnitude(linear: PrunableLinear, _: None) -> Pruned:
    return linear.best(saliency.magnitude(linear.weight)), None


def _by_wanda(linear: PrunableLinear, squares: InputSquares) -> Pruned:
    return linear.best(saliency.wanda(linear.weight, squares.mean)), None


def _by_ria(linear: PrunableLinear, squares: InputSquares) -> Pruned:
    return linear.best(saliency.relative_importance(linear.weight, squares.mean)), None


def _by_dsnot(linear: PrunableLinear, moments: InputMoments) -> Pruned:
    """Wanda's mask, fine-tuned by DSnoT; the released program leaves MLPs' masks alone by default."""
    scores = saliency.wanda(linear.weight, moments.squares.mean)
    mask = linear.best(scores)
    if linear.in_mlp:
        return mask, None
    return dsnot(mask, linear.weight, scores, moments.mean, moments.variance, group_pattern(linear.target)), None


def _by_sparsegpt(linear: PrunableLinear, prepared: tuple[Tensor, Tensor]) -> Pruned:
    gram, factor = prepared
    return sparsegpt(linear.weight, gram, linear.target, factor=factor)


def _by_alps(linear: PrunableLinear, prepared: tuple[Tensor, ScaledGram]) -> Pruned:
    gram, scaled = prepared
    return admm(linear.weight, gram, linear.target, linear.granularity, scaled=scaled)


def _with_factor(statistic: GramMatrix, name: str) -> tuple[Tensor, Tensor]:
    gram = _finite_gram(statistic, name)
    return gram, inverse_factor(gram)


def _with_scaled_gram(statistic: GramMatrix, name: str) -> tuple[Tensor, ScaledGram]:
    gram = _finite_gram(statistic, name)
    return gram, scaled_gram(gram)


def _finite_gram(statistic: GramMatrix, name: str) -> Tensor:
    gram = statistic.mean
    if not gram.diagonal().isfinite().all():
        raise overflowed(f"the input of {name}")
    return gram


MASK_METHODS: dict[Initial, MaskMethod] = {
    Initial.MAGNITUDE: MaskMethod(_by_magnitude),
    Initial.WANDA: MaskMethod(_by_wanda, InputSquares),
    Initial.RIA: MaskMethod(_by_ria, InputSquares),
    Initial.DSNOT: MaskMethod(_by_dsnot, InputMoments),
    Initial.SPARSEGPT: MaskMethod(_by_sparsegpt, GramMatrix, _with_factor),
    Initial.ALPS: MaskMethod(_by_alps, GramMatrix, _with_scaled_gram),
}
if lacking := set(Initial) - set(MASK_METHODS):
    raise LookupError(f"MASK_METHODS lacks {', '.join(lacking)}")


def prune_linear(method: Initial, linear: PrunableLinear, prepared: Any) -> Pruned:
    """Prune a linear by a method, and check what the method returns.

    Raises:
        TypeError: it is no keep mask of the linear's shape, or there are weights although `METHOD_FACTS` says that the
            method updates none, or the other way round.
    """
    keep, updated = MASK_METHODS[method].prune(linear, prepared)
    shape = linear.weight.shape
    if keep.dtype != torch.bool or keep.shape != shape:
        raise TypeError(f"{method}: the keep mask of {linear.name} is {_described(keep)}, not bool {tuple(shape)}")
    if (updated is not None) != method.has_updates:
        returned = "no weights" if updated is None else "weights"
        raise TypeError(f"{method} returned {returned}, but METHOD_FACTS has has_updates={method.has_updates}")
    if updated is not None and updated.shape != shape:
        raise TypeError(f"{method}: the weights of {linear.name} are {_described(updated)}, not {tuple(shape)}")
    return keep, updated
