"""Perplexity of a causal language model on a text: windows without overlap, mean over tokens."""

import math

import torch
from torch import Tensor, nn

from llm_barber.progress import Progress, Silent


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor, progress: Progress | None = None) -> float:
    """Exponential of the mean negative log-likelihood of each window's tokens after its first.

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
