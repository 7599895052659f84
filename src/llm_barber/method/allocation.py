"""Spread a sparsity over the linears, by passes over the dense model before anything is pruned."""

import torch
from torch import Tensor

from llm_barber.errors import ModelError, NotFiniteError, SettingsError
from llm_barber.loading.job import Job
from llm_barber.masking.budget import removal_costs, spread_budget
from llm_barber.masking.gradient_squares import FisherSums
from llm_barber.masking.owl import layer_sparsities, outlier_share
from llm_barber.masking.saliency import wanda
from llm_barber.masking.statistics import InputSquares
from llm_barber.method.dense_layers import dense_layers, first_input_kept
from llm_barber.method.few_tokens import linears_with_few_tokens, total_token_counts
from llm_barber.method.initial_masks import InitialMasks
from llm_barber.method.input_statistics import collect_inputs
from llm_barber.model.gradients import loss_gradients
from llm_barber.model.streams import HIDDEN, ActivationStreams, pieces
from llm_barber.progress import Progress
from llm_barber.settings.presets import Allocation

LOSS_TOKENS = 4096  # most tokens that gradients of the loss are taken on: each layer's input on them is kept
LOGITS = 2**24  # most logits that are computed at once

Sparsities = dict[str, float]  # by the linear's name in the model


def loss_windows(tokens: int) -> int:
    """Most windows, of `tokens` tokens each, that gradients of the loss are taken on."""
    return max(1, LOSS_TOKENS // tokens)


def allocate(
    allocation: Allocation,
    initial_masks: InitialMasks,
    outside: dict[str, Tensor],
    streams: ActivationStreams,
    sparsity: float,
    progress: Progress,
) -> Sparsities:
    """Spread a sparsity over the linears that are pruned; the first layer's input is left as it was.

    Args:
        allocation: by the loss or by outliers.
        initial_masks: say which linears are pruned.
        outside: parameters outside the decoder layers, by the model's names; used up. Others are read.
        streams: the activations.
        sparsity: of all weights that are pruned, together.
        progress: is told of each layer.

    Raises:
        SettingsError: the spread does not fit the sparsity.
        ModelError: the model's gradients are all zero.
        NotFiniteError: they are NaN or Inf.
    """
    with first_input_kept(streams):
        if allocation is Allocation.OWL:
            return _by_outliers(initial_masks, streams, sparsity, progress)
        return _by_loss(initial_masks, outside, streams, sparsity, progress)


def _by_outliers(
    initial_masks: InitialMasks,
    streams: ActivationStreams,
    sparsity: float,
    progress: Progress,
) -> Sparsities:
    """Spread by the outliers of layers (OWL, arXiv 2310.05175), in one pass forward."""
    job = initial_masks.job
    shares: dict[int, float] = {}
    sizes: dict[int, int] = {}
    progress.start("looking for outliers", job.layer_count)
    for index, layer, weights in dense_layers(initial_masks, range(job.layer_count)):
        if layer.linears:
            squares = collect_inputs(layer, streams, InputSquares, HIDDEN)
            scores = [wanda(weights[name], squares[name].mean) for name in layer.linears]
            shares[index] = outlier_share(scores)
            sizes[index] = sum(score.numel() for score in scores)
        else:
            for batch in streams.batches():
                streams.write(HIDDEN, batch, layer.output(streams.read(HIDDEN, batch)))
        progress.advance(f"{shares[index]:.2%} outliers" if index in shares else "not pruned")
    try:
        sparsities = layer_sparsities(list(shares.values()), list(sizes.values()), sparsity)
    except ValueError as error:
        raise SettingsError(
            f"--allocation owl: {error}",
            "choose a sparsity nearer to 0.5, or --allocation uniform",
        ) from error
    return {
        job.linear_name(index, name): layer_sparsity
        for index, layer_sparsity in zip(shares, sparsities, strict=True)
        for name in initial_masks.linears(index)
    }


def _by_loss(
    initial_masks: InitialMasks,
    outside: dict[str, Tensor],
    streams: ActivationStreams,
    sparsity: float,
    progress: Progress,
) -> Sparsities:
    """Spread by what pruning a linear adds to the loss (`masking/budget.py`): forward, then back."""
    job = initial_masks.job
    progress.start("looking for what pruning costs", 2 * job.layer_count)
    inputs, gradients, few_tokens = _forward(initial_masks, outside, streams, progress)
    costs = _backward(initial_masks, streams, inputs, gradients, progress)
    if not any(cost.any() for cost, _ in costs.values()):
        raise ModelError(
            "the model's loss does not depend on its linears: all gradients are zero", "give --allocation uniform"
        )
    names = [job.linear_name(index, name) for index in range(job.layer_count) for name in initial_masks.linears(index)]
    spread = [name for name in names if name not in few_tokens]  # the costs of idle experts are hardly known
    sparsities = []
    if spread:
        linear_costs, rows = zip(*(costs[name] for name in spread), strict=True)
        sparsities = spread_budget(linear_costs, rows, sparsity)
    return dict.fromkeys(names, sparsity) | dict(zip(spread, sparsities, strict=True))


def _forward(
    initial_masks: InitialMasks,
    outside: dict[str, Tensor],
    streams: ActivationStreams,
    progress: Progress,
) -> tuple[list[list[Tensor]], list[Tensor], set[str]]:
    """Run the dense model and its loss on the first calibration windows; uses up `outside`.

    Returns:
        The layers' inputs on these windows, (sequences, tokens, hidden), by layer and batch; the loss's gradients at
        the last layer's output, by batch; linears, by their names in the model, of experts with few tokens.
    """
    job, skeleton = initial_masks.job, initial_masks.job.skeleton
    windows = loss_windows(job.tokens.input_ids.shape[1])  # the first of all: some processes may have none of them
    batches = pieces(0, streams.count_among_first(windows), streams.batch_size)
    tokens = streams.select_local(job.tokens.input_ids)
    missing = [name for name in skeleton.outside_names_and_head if name not in outside]
    skeleton.fill_outside(outside | job.source.read_parameters(missing))
    outside.clear()  # the copies in the stored dtype are not needed: free their memory
    for size in {batch.stop - batch.start for batch in batches}:
        skeleton.embed(job.tokens.input_ids[:size], lambda _: None)  # records the arguments that layers get
    inputs: list[list[Tensor]] = []
    few_tokens: set[str] = set()
    for index, layer, _ in dense_layers(initial_masks, range(job.layer_count)):
        layer.forget_tokens()
        inputs.append([streams.copy_off_device(streams.read(HIDDEN, batch)) for batch in batches])
        for batch in batches:
            streams.write(HIDDEN, batch, layer.output(streams.read(HIDDEN, batch)))
        names = linears_with_few_tokens(layer, total_token_counts(layer, streams.ranks))
        few_tokens |= {job.linear_name(index, name) for name in names}
        skeleton.tails[index] = layer.tail
        progress.advance("forward")
    gradients = [_loss_gradient(job, streams.read(HIDDEN, batch), tokens[batch]) for batch in batches]
    skeleton.drop_outside()
    return inputs, gradients, few_tokens


def _backward(
    initial_masks: InitialMasks,
    streams: ActivationStreams,
    inputs: list[list[Tensor]],
    gradients: list[Tensor],
    progress: Progress,
) -> dict[str, tuple[Tensor, int]]:
    """Take the loss's gradients back through the layers; uses up `inputs` and `gradients`.

    Returns:
        Costs of removing weights (`removal_costs`), and the number of rows, by the linear's name in the model.
    """
    job = initial_masks.job
    costs: dict[str, tuple[Tensor, int]] = {}
    for index, layer, weights in dense_layers(initial_masks, range(job.layer_count)[::-1]):
        sums = {name: FisherSums(tuple(weights[name].shape), streams.device) for name in layer.linears}
        for number, hidden in enumerate(inputs.pop()):
            gradients[number] = loss_gradients(layer, hidden.to(streams.device), gradients[number], sums)
        for name in layer.linears:
            full_name, fisher = job.linear_name(index, name), sums[name]
            streams.ranks.add(fisher)
            if not torch.isfinite(fisher.rows.max()):
                raise NotFiniteError(
                    f"the loss has NaN or Inf gradients at {full_name}",
                    "compute with --dtype bfloat16 or float32, or give --allocation uniform",
                )
            cost = removal_costs(weights[name], fisher.rows.float(), fisher.columns.float())
            costs[full_name] = cost, len(weights[name])
        progress.advance("back")
    return costs


def _loss_gradient(job: Job, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Gradient of the next-token loss at the last layer's output, float32, of that output's shape.

    The loss is summed over tokens.

    Args:
        job: with the parameters outside the layers filled in.
        hidden: (sequences, tokens, hidden).
        tokens: int64, (sequences, tokens).
    """
    gradient = torch.zeros(hidden.shape, device=hidden.device)
    following = tokens[:, 1:].to(hidden.device)
    for sequence in range(len(hidden)):
        for part in pieces(0, following.shape[1], max(1, LOGITS // int(job.config.vocab_size))):
            states = hidden[sequence : sequence + 1, part].detach().requires_grad_()
            with torch.enable_grad():
                logits = job.skeleton.finish(states)[0].float()
                loss = torch.nn.functional.cross_entropy(logits, following[sequence, part], reduction="sum")
            gradient[sequence, part] = torch.autograd.grad(loss, states)[0].float()
    return gradient
