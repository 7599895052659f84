"""Perplexity of a model's predictions on text, and their distance from another model's predictions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llm_barber.errors import ModelError
from llm_barber.evaluation.result import TextComparison
from llm_barber.evaluation.streamed import StreamedModel
from llm_barber.progress import Progress, Silent


@dataclass(frozen=True)
class HiddenStates:
    """A model, and its last hidden states of each window, (tokens, hidden)."""

    model: StreamedModel
    windows: Sequence[Tensor]


@dataclass
class Sums:
    """Sums over predicted tokens: negative log-likelihoods in nats, divergences in nats, agreements."""

    loss: float = 0.0
    other_loss: float = 0.0
    divergence: float = 0.0
    agreement: float = 0.0


def measure_predictions(
    text: str, windows: Tensor, states: HiddenStates, other: HiddenStates | None, progress: Progress
) -> tuple[float, TextComparison | None]:
    """Perplexity on the windows of a text, and the comparison with another model's predictions.

    Each window's tokens after its first are predicted.

    Args:
        text: its name, for messages.
        windows: token ids, int64, (windows, seqlen), on the model's device.
        states: of the model.
        other: of the other model; None: no comparison.
        progress: told of each window.

    Raises:
        ModelError: logits are NaN or Inf, or a perplexity overflows.
    """
    sums = Sums()
    progress.start("measuring predictions", len(windows))
    for index, window in enumerate(windows):
        for start in range(0, len(window) - 1, states.model.positions_at_once):
            part = slice(start, min(start + states.model.positions_at_once, len(window) - 1))
            following, where = window[1:][part], f"window {index} of {text}"
            logits = states.model.logits(states.windows[index][part], where)
            log_total = logits.logsumexp(1)
            sums.loss += token_losses(logits, log_total, following).double().sum().item()
            if other is not None:
                reference = other.model.logits(other.windows[index][part], where)
                _add_comparison(sums, logits, log_total, reference, following)
        progress.advance("")
    count = windows.shape[0] * (windows.shape[1] - 1)
    comparison = None
    if other is not None:
        comparison = TextComparison(
            perplexity=_perplexity(sums.other_loss / count, f"the other model on {text}"),
            perplexity_ratio=_perplexity((sums.loss - sums.other_loss) / count, f"the ratio on {text}"),
            divergence=sums.divergence / count,
            top_agreement=sums.agreement / count,
        )
    return _perplexity(sums.loss / count, text), comparison


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor, progress: Progress | None = None) -> float:
    """Perplexity of a model in memory: exp of the mean loss of each window's tokens after its first.

    Args:
        model: a transformers causal language model.
        windows: int64, (windows, seqlen).
        progress: told of each window.
    """
    progress = progress or Silent()
    progress.start("measuring perplexity", len(windows))
    device = next(model.parameters()).device
    total = 0.0
    for window in windows:
        tokens = window.unsqueeze(0).to(device)
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1]
        total += nn.functional.cross_entropy(logits.float(), tokens[0, 1:], reduction="sum").item()
        progress.advance("")
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))


def token_losses(logits: Tensor, log_total: Tensor, following: Tensor) -> Tensor:
    """Negative log-likelihood of the token that follows each position, nats, (positions,).

    Args:
        logits: float32, (positions, vocabulary).
        log_total: their logsumexp, (positions,).
        following: int64, (positions,).
    """
    return log_total - logits.gather(1, following.unsqueeze(1)).squeeze(1)


def _add_comparison(sums: Sums, logits: Tensor, log_total: Tensor, reference: Tensor, following: Tensor) -> None:
    """Add the other model's loss, its divergence and the agreement of both models at some positions.

    Args:
        sums: changed.
        logits: (positions, vocabulary), float32.
        log_total: their logsumexp, (positions,).
        reference: the other model's logits; overwritten.
        following: the tokens to predict, int64, (positions,).
    """
    top = reference.amax(1, keepdim=True)
    # The same token is the most likely one of both models; finding its number would take ten times as long.
    agrees = (reference == top) & (logits == logits.amax(1, keepdim=True))
    sums.agreement += agrees.any(1).sum().item()
    weights = (reference - top).exp_()
    total = weights.sum(1)
    other_log_total = top.squeeze(1) + total.log()
    sums.other_loss += token_losses(reference, other_log_total, following).double().sum().item()
    # Σ p (log p − log q), with log p = reference − its log total and p = weights / their total: one product.
    distance = torch.linalg.vecdot(weights, reference.sub_(logits)) / total - (other_log_total - log_total)
    sums.divergence += distance.double().sum().item()


def _perplexity(loss: float, where: str) -> float:
    """The exponential of a mean loss in nats.

    Raises:
        ModelError: it is too large for a float.
    """
    try:
        return math.exp(loss)
    except OverflowError as error:
        raise ModelError(
            f"perplexity of {where} overflows: its mean loss is {loss:.4g} nats a token",
            "the model predicts worse than a uniform guess, whose loss is log(vocabulary): check its weights",
        ) from error
