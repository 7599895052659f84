"""Perplexity of a checkpoint, and how far its predictions are from another's."""

import hashlib
import math
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from llm_barber.config import DTYPES, Settings
from llm_barber.errors import ModelError, SettingsError
from llm_barber.evaluation.perplexity import evaluation_windows
from llm_barber.evaluation.streamed import StreamedModel
from llm_barber.evaluation.texts import evaluation_text, text_tokens
from llm_barber.job import check_positions, check_vocabulary, load_tokenizer
from llm_barber.model.device import resolve_device, resolve_dtype
from llm_barber.progress import Progress, Silent
from llm_barber.report import versions


class EvaluateConfig(Settings):
    """Settings of `evaluate`."""

    model: str = Field(description="folder, hub id or GGUF file")
    against: str | None = Field(None, description="another model, usually the dense one, to compare with")
    text: tuple[str, ...] = Field(("wikitext2",), min_length=1, description="wikitext2, ptb, c4, or files")
    windows: int | None = Field(None, ge=1, description="windows of each text; None: all")
    seqlen: int = Field(2048, ge=2, description="tokens a window")
    batch_size: int | None = Field(None, ge=1, description="windows computed together; None: chosen by the device")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 …")
    dtype: str = Field("auto", description=f"compute dtype: {', '.join(DTYPES)}")


class Comparison(BaseModel):
    """Against another model: its perplexity, and the ratio of ours to it.

    Per token: `divergence`, the mean Kullback-Leibler divergence of our next-token distribution from its (nats), and
    `top_agreement`, the share of tokens with the same most likely next token.
    """

    model_config = ConfigDict(frozen=True)

    perplexity: float
    perplexity_ratio: float
    divergence: float
    top_agreement: float


class TextResult(BaseModel):
    """Perplexity on one text, with everything that the number depends on."""

    model_config = ConfigDict(frozen=True)

    text: str
    perplexity: float
    windows: int
    seqlen: int
    begins_with_bos: bool
    sha256: str
    against: Comparison | None


class Evaluation(BaseModel):
    """What `evaluate` found."""

    model_config = ConfigDict(frozen=True)

    model: str
    against: str | None
    device: str
    dtype: str
    versions: dict[str, str]
    texts: tuple[TextResult, ...]


def evaluate(config: EvaluateConfig, progress: Progress | None = None) -> Evaluation:
    """Perplexity as the field measures it: windows without overlap, mean over all tokens but each window's first.

    Models are computed decoder layer by decoder layer.

    Raises:
        SettingsError: an unknown device or dtype.
        ModelError: a model that cannot be read or computed, or two that do not share a vocabulary.
        CalibrationError: a text that is unknown or shorter than a window.
        HubError: the hub is needed and cannot be reached.
    """
    progress = progress or Silent()
    if config.dtype not in DTYPES:
        raise SettingsError(f"dtype {config.dtype!r} is not one of {', '.join(DTYPES)}", "see --help")
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    progress.stage(f"opening {config.model}")
    model = StreamedModel(config.model, device, dtype)
    other = StreamedModel(config.against, device, dtype) if config.against is not None else None
    if other is not None and other.config.vocab_size != model.config.vocab_size:
        raise ModelError(
            f"{config.model} has a vocabulary of {model.config.vocab_size}, {config.against} one of "
            f"{other.config.vocab_size}",
            "compare models with the same tokenizer",
        )
    check_positions(model.config, config.seqlen)
    tokenizer = load_tokenizer(model.source.folder)
    if tokenizer is None:
        raise ModelError(f"{config.model} has no tokenizer, which a text needs", "add its tokenizer files")
    results = []
    for name in config.text:
        progress.stage(f"reading text {name}")
        text = evaluation_text(name)
        tokens = text_tokens(name, text, tokenizer, config.seqlen)
        windows = evaluation_windows(name, tokens, config.seqlen, config.windows)
        check_vocabulary(model.config, windows)
        measured = _measure(model, other, windows, config.batch_size, progress)
        results.append(
            TextResult(
                text=name,
                windows=len(windows),
                seqlen=config.seqlen,
                begins_with_bos=int(windows[0, 0]) == getattr(tokenizer, "bos_token_id", None),
                sha256=hashlib.sha256(text.encode()).hexdigest(),
                **measured,
            )
        )
    return Evaluation(
        model=config.model,
        against=config.against,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        versions=versions(),
        texts=tuple(results),
    )


def _measure(
    model: StreamedModel, other: StreamedModel | None, windows: Tensor, batch_size: int | None, progress: Progress
) -> dict[str, Any]:
    """Perplexity and comparison on windows, int64 (windows, seqlen)."""
    loss = other_loss = divergence = agreement = 0.0
    others = other.logits(windows, batch_size, progress) if other is not None else None
    ours = model.logits(windows, batch_size, progress)
    for index, (window, logits) in enumerate(zip(windows.to(model.skeleton.device), ours, strict=True)):
        following = window[1:].unsqueeze(1)
        log_probabilities = logits[:-1].log_softmax(1)
        loss -= log_probabilities.gather(1, following).double().sum().item()
        if others is not None:
            reference = next(others)[:-1].log_softmax(1)
            other_loss -= reference.gather(1, following).double().sum().item()
            divergence += (reference.exp() * (reference - log_probabilities)).double().sum().item()
            agreement += (reference.argmax(1) == log_probabilities.argmax(1)).sum().item()
        if index == 0:  # all layers of both models are behind us: what is left is the output heads
            progress.start("measuring predictions", len(windows))
        progress.advance("")
    count = windows.shape[0] * (windows.shape[1] - 1)
    comparison = None
    if others is not None:
        comparison = Comparison(
            perplexity=math.exp(other_loss / count),
            perplexity_ratio=math.exp((loss - other_loss) / count),
            divergence=divergence / count,
            top_agreement=agreement / count,
        )
    return {"perplexity": math.exp(loss / count), "against": comparison}
