"""The sparsity of each linear, from a look at the dense model before anything is pruned."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from llm_barber.checkpoint.ahead import ReadAhead
from llm_barber.errors import ModelError, NotFiniteError, SettingsError
from llm_barber.loading.job import Job
from llm_barber.masking.budget import removal_costs, spread_budget
from llm_barber.masking.owl import layer_sparsities, outlier_share
from llm_barber.masking.saliency import wanda
from llm_barber.masking.statistics import FisherSums, InputSquares
from llm_barber.messages import message
from llm_barber.method.few_tokens import linears_with_few_tokens, total_token_counts
from llm_barber.method.initial_masks import InitialMasks
from llm_barber.method.input_statistics import collect_inputs
from llm_barber.model.block import DecoderLayer
from llm_barber.model.streams import HIDDEN, ActivationStreams, pieces
from llm_barber.progress import Progress
from llm_barber.settings.presets import Allocation

START = "start"  # the first layer's input, while a pass overwrites it
LOSS_TOKENS = 4096  # that gradients are taken of, at most: every layer's input is kept for them
LOGITS = 2**24  # computed at once

Sparsities = dict[str, float]  # by the linear's name in the model
Found = TypeVar("Found")


def loss_windows(tokens: int) -> int:
    """Number of windows of `tokens` tokens that gradients of the loss are taken of, at most."""
    return max(1, LOSS_TOKENS // tokens)


def allocate(
    allocation: Allocation, initial: InitialMasks, streams: ActivationStreams, sparsity: float, progress: Progress
) -> Sparsities:
    """Spread a sparsity over the linears that are pruned; the streams are left as they were.

    Raises:
        SettingsError: the spread does not fit the sparsity.
        ModelError: the model's gradients are all zero.
        NotFiniteError: they are NaN or Inf.
    """
    streams.copy(HIDDEN, START)
    try:
        if allocation is Allocation.OWL:
            return _by_outliers(initial, streams, sparsity, progress)
        return _by_loss(initial, streams, sparsity, progress)
    finally:
        streams.swap(START, HIDDEN)
        streams.drop(START)


def _by_outliers(initial: InitialMasks, streams: ActivationStreams, sparsity: float, progress: Progress) -> Sparsities:
    """OWL (arXiv 2310.05175): one pass forward."""
    job = initial.job
    shares: dict[int, float] = {}
    sizes: dict[int, int] = {}
    progress.start("looking for outliers", job.layer_count)
    for index, layer, weights in _layers(initial, streams, range(job.layer_count)):
        if layer.linears:
            squares = collect_inputs(layer, streams, InputSquares)
            scores = [wanda(weights[name], squares[name].mean) for name in layer.linears]
            shares[index] = outlier_share(scores)
            sizes[index] = sum(score.numel() for score in scores)
        for batch in streams.batches():
            streams.write(HIDDEN, batch, layer.output(streams.read(HIDDEN, batch)))
        progress.advance(f"{shares[index]:.2%} outliers" if index in shares else "not pruned")
    try:
        found = layer_sparsities(list(shares.values()), list(sizes.values()), sparsity)
    except ValueError as error:
        raise SettingsError(
            message("{allocation:owl}: {error}", error=error),
            message("choose a sparsity nearer to 0.5, or {allocation:uniform}"),
        ) from error
    of_layers = zip(shares, found, strict=True)
    return {job.linear_name(index, name): one for index, one in of_layers for name in initial.linears(index)}


def _by_loss(initial: InitialMasks, streams: ActivationStreams, sparsity: float, progress: Progress) -> Sparsities:
    """What pruning each linear costs the model's loss: forward, then back through the layers (`masking/budget.py`)."""
    job, skeleton = initial.job, initial.job.skeleton
    windows = loss_windows(job.tokens.input_ids.shape[1])  # the first of all: some processes may have none
    batches = pieces(0, streams.count_among_first(windows), streams.batch_size)
    tokens = streams.select_local(job.tokens.input_ids)
    skeleton.fill_outside(job.source.read_parameters(skeleton.outside_names_and_head))
    for size in {batch.stop - batch.start for batch in batches}:
        skeleton.embed(job.tokens.input_ids[:size], lambda _: None)  # for how layers are called with so many
    inputs: list[list[Tensor]] = []
    progress.start("looking for what pruning costs", 2 * job.layer_count)
    little: set[str] = set()  # is known of these: hardly a token went to their experts
    for index, layer, _ in _layers(initial, streams, range(job.layer_count)):
        layer.forget_tokens()
        inputs.append([streams.unpinned_copy(streams.read(HIDDEN, batch)) for batch in batches])
        for batch in batches:
            streams.write(HIDDEN, batch, layer.output(streams.read(HIDDEN, batch)))
        few = linears_with_few_tokens(layer, total_token_counts(layer, streams.ranks))
        little |= {job.linear_name(index, name) for name in few}
        skeleton.tails[index] = layer.tail
        progress.advance("forward")
    gradients = [_loss_gradient(job, streams.read(HIDDEN, batch), tokens[batch]) for batch in batches]
    skeleton.drop_outside()
    costs: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    for index, layer, weights in _layers(initial, streams, range(job.layer_count)[::-1]):
        sums = {name: FisherSums(tuple(weights[name].shape), streams.device) for name in layer.linears}
        for number, hidden in enumerate(inputs.pop()):
            gradients[number] = layer.loss_gradients(hidden.to(streams.device), gradients[number], sums)
        for name in layer.linears:
            streams.ranks.add(sums[name])
            if not torch.isfinite(sums[name].rows.max()):
                raise NotFiniteError(
                    f"the loss has NaN or Inf gradients at {job.linear_name(index, name)}",
                    "compute with --dtype bfloat16 or float32, or give --allocation uniform",
                )
            costs[job.linear_name(index, name)] = removal_costs(
                weights[name], sums[name].rows.float(), sums[name].columns.float()
            )
            rows[job.linear_name(index, name)] = len(weights[name])
        progress.advance("back")
    names = [job.linear_name(index, name) for index in range(job.layer_count) for name in initial.linears(index)]
    if not any(cost.any() for cost in costs.values()):
        raise ModelError(
            "the model's loss does not depend on its linears: all gradients are zero", "give --allocation uniform"
        )
    used = [name for name in names if name not in little]
    found = spread_budget([costs[name] for name in used], [rows[name] for name in used], sparsity) if used else []
    return dict.fromkeys(names, sparsity) | dict(zip(used, found, strict=True))


def _layers(
    initial: InitialMasks, streams: ActivationStreams, order: Sequence[int]
) -> Iterator[tuple[int, DecoderLayer, dict[str, Tensor]]]:
    """Dense decoder layers, one computed with while the next is read, with the linears that are pruned."""
    job = initial.job
    with ReadAhead(job.source, [job.layer_tensors[index] for index in order], streams.memory.pinned) as ahead:
        for index in order:
            try:
                layer, weights = job.open_layer(index, ahead.take())
                layer.select(initial.linears(index))
                yield index, layer, weights
            finally:
                job.skeleton.release_layer(index)


def _loss_gradient(job: Job, hidden: Tensor, tokens: Tensor) -> Tensor:
    """The gradient of the next-token loss, summed over tokens, by the last layer's output; float32, its shape.

    Args:
        job: with the parameters outside the layers filled in.
        hidden: (sequences, tokens, hidden).
        tokens: int64, (sequences, tokens).
    """
    gradient = torch.zeros(hidden.shape, device=hidden.device)
    following = tokens[:, 1:].to(hidden.device)
    for sequence in range(len(hidden)):
        for part in pieces(0, following.shape[1], max(1, LOGITS // int(job.config.vocab_size))):
            own = hidden[sequence : sequence + 1, part].detach().requires_grad_()
            with torch.enable_grad():
                logits = job.skeleton.finish(own)[0].float()
                loss = torch.nn.functional.cross_entropy(logits, following[sequence, part], reduction="sum")
            gradient[sequence, part] = torch.autograd.grad(loss, own)[0].float()
    return gradient
