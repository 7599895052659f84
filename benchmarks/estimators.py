"""Other estimators of a weight's worth in the rebuild, for `variants.py --groups estimators`.

The paper scores weights by |W| · sqrt(mean over sequences of G²), G the gradient of the block's squared error at the
dense weights, and swaps once. Here G is also taken at the sparse weights, with its sign, with a second-order term, and
in several rounds, each of which looks at the weights that the round before left.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from llm_barber.masking.gradient_squares import GradientSquares
from llm_barber.masking.rebuild import Rebuilt, rebuild_masks
from llm_barber.masking.saliency import weight_gradient
from llm_barber.method import layer as method
from llm_barber.method.block_pass import BlockPass
from llm_barber.method.outcome import BlockOutcome
from llm_barber.method.pruned_linear import PrunedLinear
from llm_barber.method.rebuild import RebuildSettings
from llm_barber.model.gradients import block_gradients
from llm_barber.model.streams import DENSE_OUTPUT, HIDDEN

SEED = 20250101  # of the second-order estimator's probes


class Gradients(GradientSquares):
    """Means over sequences of a weight's squared gradient, `mean`, and of its gradient, `signed`."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        super().__init__(shape, device)
        self.sums = torch.zeros(shape, device=device)

    def update(self, inputs: Tensor, output_gradient: Tensor, scale: Tensor, factor: float = 1.0) -> None:
        super().update(inputs, output_gradient, scale, factor)
        for sequence, gradient, scaling in zip(inputs, output_gradient, (scale * factor).tolist(), strict=True):
            self.sums.add_((gradient.t() @ sequence).float(), alpha=scaling)

    @property
    def signed(self) -> Tensor:
        """float32, (out, in)."""
        return self.sums / self.sequences.item()


# From weights, float32 (out, in), their keep mask, their gradients, and the error's diagonal second derivatives:
# the gain of bringing a pruned weight back, or the cost of pruning a kept weight.
Estimator = Callable[[Tensor, Tensor, Gradients, Tensor], Tensor]
ESTIMATORS: dict[str, tuple[str, Estimator]] = {  # the weights at which gradients are taken, and the estimator
    "published": ("dense", lambda weight, keep, gradients, second: weight_gradient(weight, gradients.mean)),
    "sparse": ("sparse", lambda weight, keep, gradients, second: weight_gradient(weight, gradients.mean)),
    "signed": ("sparse", lambda weight, keep, gradients, second: -weight * gradients.signed),
    "second-order": (
        "sparse",
        lambda weight, keep, gradients, second: (
            -weight * gradients.signed + torch.where(keep, 0.5, -0.5) * second * weight.square()
        ),
    ),
}


@contextmanager
def estimated(settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Rebuild by `estimator` and `rounds`, if the settings have them; yields the other settings."""
    prune_settings = dict(settings)
    estimator, rounds = prune_settings.pop("estimator", None), int(prune_settings.pop("rounds", 1))
    if rounds != 1 and estimator is None:
        raise SystemExit("rounds: of an estimator; add estimator=published")
    before = method.rebuild_block
    if estimator is not None:
        method.rebuild_block = rebuild_by(estimator, rounds)
    try:
        yield prune_settings
    finally:
        method.rebuild_block = before


def rebuild_by(estimator: str, rounds: int) -> Callable[..., BlockOutcome]:
    """A `method.rebuild_block` with another estimator, which swaps in rounds; for a single process, without experts."""
    gradients_at, score = ESTIMATORS[estimator]

    def rebuild(
        block_pass: BlockPass,
        dense: Mapping[str, Tensor],
        pruned: Mapping[str, PrunedLinear],
        settings: RebuildSettings,
        where: str,
    ) -> BlockOutcome:
        names, error = block_pass.block.linears, 0.0
        dense_weights = {name: dense[name] for name in names}
        current = {name: pruned[name] for name in names}
        for index in range(rounds):
            sparse_weights = {name: linear.weight for name, linear in current.items()}
            points = (dense_weights, sparse_weights) if gradients_at == "dense" else (sparse_weights, dense_weights)
            gradients, curvatures, total = _gradients(block_pass, *points, second=estimator == "second-order")
            if index == 0:
                error = total
            rebuilt = rebuild_masks(
                keep=[current[name].keep for name in names],
                saliency=[
                    score(
                        dense[name].float(), current[name].keep, gradients[name], curvatures.get(name, torch.zeros(()))
                    )
                    for name in names
                ],
                granularity=settings.granularity,
                rebuild_ratio=settings.ratio,
                patterns=[current[name].pattern for name in names],
                fixed=[
                    torch.zeros_like(linear.keep) if linear.fixed is None else linear.fixed
                    for linear in current.values()
                ],
                pattern_granularity=settings.pattern_granularity,
            )
            for name, linear_rebuilt in zip(names, rebuilt, strict=True):
                current[name] = current[name].with_mask(linear_rebuilt.keep)
        _keep_outputs(block_pass, dense_weights, {name: pruned[name].weight for name in names})
        masks = {name: Rebuilt.between(pruned[name].keep, current[name].keep) for name in names}
        error /= block_pass.streams.all_sequences
        return BlockOutcome(current, masks, error, measured_from=0, output_kept=not block_pass.last)

    return rebuild


def _gradients(
    block_pass: BlockPass, here: Mapping[str, Tensor], there: Mapping[str, Tensor], second: bool
) -> tuple[dict[str, Gradients], dict[str, Tensor], float]:
    """Gradients of the squared distance of the block's outputs with the weights `here` and `there`.

    Returns:
        Gradients by the weights `here`, by linear; the mean square's diagonal second derivatives, if `second`; the
        sum of the sequences' losses.
    """
    layer, block, streams = block_pass.layer, block_pass.block, block_pass.streams
    generator = torch.Generator().manual_seed(SEED)
    gradients, probed = ({name: Gradients(tuple(w.shape), w.device) for name, w in here.items()} for _ in range(2))
    total, size = 0.0, 0
    for batch in streams.batches():
        hidden, replays = streams.read(HIDDEN, batch), block_pass.replays(batch)
        layer.set_weights(there)
        other = layer.block_output(block, hidden, replays)
        layer.set_weights(here)
        output, losses = block_gradients(layer, block, hidden, other, replays, gradients)
        total, size = total + losses.double().sum().item(), output[0].numel()
        if second:  # Jᵀv for random signs v: the mean of its square is the diagonal of JᵀJ
            signs = torch.randint(0, 2, output.shape, generator=generator).float().mul_(2).sub_(1)
            block_gradients(layer, block, hidden, output.float() - signs, replays, probed)
    # The gradient of mean(v²) is 2/size · Jᵀv; the second derivative of the mean square is 2/size · (Jᵀv)².
    curvatures = {name: squares.mean * (size / 2) for name, squares in probed.items()} if second else {}
    return gradients, curvatures, total


def _keep_outputs(
    block_pass: BlockPass, dense_weights: Mapping[str, Tensor], sparse_weights: Mapping[str, Tensor]
) -> None:
    """Keep the outputs that `method` reads afterwards: with dense weights, and with the mask before the rebuild."""
    for batch in block_pass.streams.batches():
        block_pass.layer.set_weights(dense_weights)
        block_pass.streams.write(DENSE_OUTPUT, batch, block_pass.output(batch))
        if not block_pass.last:
            block_pass.layer.set_weights(sparse_weights)
            block_pass.streams.write(block_pass.block.output, batch, block_pass.output(batch))
