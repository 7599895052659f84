"""Other estimators of a weight's worth in the rebuild, for `variants.py --groups estimators`.

The paper scores weights by |W| · sqrt(mean over sequences of G²), G the gradient of the block's squared error at the
dense weights, and swaps once. Here G is also taken at the sparse weights, with its sign, with a second-order term, and
in several rounds, each of which looks at the weights that the one before left.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from llm_barber.masking.rebuild import Rebuilt, rebuild_masks
from llm_barber.masking.saliency import weight_gradient
from llm_barber.masking.statistics import GradientSquares
from llm_barber.method import layer as method
from llm_barber.method.block_pass import BlockPass
from llm_barber.method.outcome import BlockOutcome
from llm_barber.method.pruned_linear import PrunedLinear
from llm_barber.method.rebuild import RebuildSettings
from llm_barber.model.streams import DENSE_OUTPUT, HIDDEN

SEED = 20250101  # of the second-order estimator's probes


class Gradients(GradientSquares):
    """Means over sequences of a weight's squared gradient, `mean`, and of its gradient, `signed`."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        super().__init__(shape, device)
        self.sums = torch.zeros(shape, device=device)

    def update(self, inputs: Tensor, output_gradient: Tensor, scale: Tensor) -> None:
        super().update(inputs, output_gradient, scale)
        for sequence, gradient, factor in zip(inputs, output_gradient, scale.tolist(), strict=True):
            self.sums.add_((gradient.t() @ sequence).float(), alpha=factor)

    @property
    def signed(self) -> Tensor:
        """float32, (out, in)."""
        return self.sums / self.sequences.item()


# Of weights, float32 (out, in), their keep mask, their gradients, and the error's diagonal second derivatives:
# what a weight that comes back wins, or one that goes costs.
Estimator = Callable[[Tensor, Tensor, Gradients, Tensor], Tensor]
ESTIMATORS: dict[str, tuple[str, Estimator]] = {  # and at which weights gradients are taken
    "published": ("dense", lambda weight, keep, found, second: weight_gradient(weight, found.mean)),
    "sparse": ("sparse", lambda weight, keep, found, second: weight_gradient(weight, found.mean)),
    "signed": ("sparse", lambda weight, keep, found, second: -weight * found.signed),
    "second-order": (
        "sparse",
        lambda weight, keep, found, second: (
            -weight * found.signed + torch.where(keep, 0.5, -0.5) * second * weight.square()
        ),
    ),
}


@contextmanager
def estimated(settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The settings without `estimator` and `rounds`; within, the rebuild works by them, if they are given."""
    given = dict(settings)
    estimator, rounds = given.pop("estimator", None), int(given.pop("rounds", 1))
    if rounds != 1 and estimator is None:
        raise SystemExit("rounds: of an estimator; add estimator=published")
    before = method.rebuild_block
    if estimator is not None:
        method.rebuild_block = rebuild_by(estimator, rounds)
    try:
        yield given
    finally:
        method.rebuild_block = before


def rebuild_by(estimator: str, rounds: int) -> Callable[..., BlockOutcome]:
    """A `method.rebuild_block` with another estimator, which swaps in rounds; one process, no experts."""
    place, score = ESTIMATORS[estimator]

    def rebuild(
        block_pass: BlockPass,
        dense: Mapping[str, Tensor],
        pruned: Mapping[str, PrunedLinear],
        settings: RebuildSettings,
        where: str,
    ) -> BlockOutcome:
        names, error = block_pass.block.linears, 0.0
        dense_weights = {name: dense[name] for name in names}
        now = {name: pruned[name] for name in names}
        for index in range(rounds):
            sparse_weights = {name: one.weight for name, one in now.items()}
            points = (dense_weights, sparse_weights) if place == "dense" else (sparse_weights, dense_weights)
            found, seconds, total = _gradients(block_pass, *points, second=estimator == "second-order")
            if index == 0:
                error = total
            rebuilt = rebuild_masks(
                keep=[now[name].keep for name in names],
                saliency=[
                    score(dense[name].float(), now[name].keep, found[name], seconds.get(name, torch.zeros(())))
                    for name in names
                ],
                granularity=settings.granularity,
                rebuild_ratio=settings.ratio,
                patterns=[now[name].pattern for name in names],
                fixed=[torch.zeros_like(one.keep) if one.fixed is None else one.fixed for one in now.values()],
                pattern_granularity=settings.pattern_granularity,
            )
            for name, one in zip(names, rebuilt, strict=True):
                now[name] = now[name].with_mask(one.keep)
        _keep_outputs(block_pass, dense_weights, {name: pruned[name].weight for name in names})
        masks = {name: Rebuilt.between(pruned[name].keep, now[name].keep) for name in names}
        error /= block_pass.streams.all_sequences
        return BlockOutcome(now, masks, error, measured_from=0, output_kept=not block_pass.last)

    return rebuild


def _gradients(
    block_pass: BlockPass, here: Mapping[str, Tensor], there: Mapping[str, Tensor], second: bool
) -> tuple[dict[str, Gradients], dict[str, Tensor], float]:
    """Of the squared distance of the block's outputs with both weights, by those `here`; second derivatives; Σ."""
    layer, block, streams = block_pass.layer, block_pass.block, block_pass.streams
    made = torch.Generator().manual_seed(SEED)
    found, probed = ({name: Gradients(tuple(w.shape), w.device) for name, w in here.items()} for _ in range(2))
    total, size = 0.0, 0
    for batch in streams.batches():
        hidden, replays = streams.read(HIDDEN, batch), block_pass.replays(batch)
        layer.set_weights(there)
        other = layer.block_output(block, hidden, replays)
        layer.set_weights(here)
        output, losses = layer.block_gradients(block, hidden, other, replays, found)
        total, size = total + losses.double().sum().item(), output[0].numel()
        if second:  # Jᵀv for a random v of signs, in whose square's mean nothing is left but the diagonal of JᵀJ
            signs = torch.randint(0, 2, output.shape, generator=made).float().mul_(2).sub_(1)
            layer.block_gradients(block, hidden, output.float() - signs, replays, probed)
    # The gradient of mean(v²) is 2/size · Jᵀv; the second derivative of the mean square is 2/size · (Jᵀv)².
    return found, {name: one.mean * (size / 2) for name, one in probed.items()} if second else {}, total


def _keep_outputs(
    block_pass: BlockPass, dense_weights: Mapping[str, Tensor], sparse_weights: Mapping[str, Tensor]
) -> None:
    """What `method` reads afterwards: the dense output, and that with the mask before, if nothing was swapped."""
    for batch in block_pass.streams.batches():
        block_pass.layer.set_weights(dense_weights)
        block_pass.streams.write(DENSE_OUTPUT, batch, block_pass.output(batch))
        if not block_pass.last:
            block_pass.layer.set_weights(sparse_weights)
            block_pass.streams.write(block_pass.block.output, batch, block_pass.output(batch))
