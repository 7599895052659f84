"""Decoding with packed weights in CUDA graphs, and without waiting for the GPU."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from llm_barber.runtime.load import load
from llm_barber.runtime.on_gpu import has_kernels
from llm_barber.runtime.packed_linear import PackedLinear
from llm_barber.tools.selftest.bench import Bench
from llm_barber.tools.selftest.result import Finding, NotRunError
from llm_barber.tools.selftest.waits import sync_mode

PROMPT, WARM_UPS, REPLAYS = 8, 3, 3  # tokens
TOLERANCE = 1e-4  # of the largest logit: float32, in a graph, where libraries may choose another kernel


class Decoder:
    """A model that decodes one token a step, into a cache of fixed size."""

    def __init__(self, model: PreTrainedModel, prompt: Tensor, room: int) -> None:
        names = inspect.signature(type(model).forward).parameters
        self._model = model
        self._keywords = {
            "cache" if "cache" in names else "past_key_values": StaticCache(
                config=model.config, max_cache_len=prompt.shape[1] + room
            ),
            "use_cache": True,
        }
        self.token = prompt[:, :1].clone()  # read by each step; a graph reads this same memory
        self._forward(prompt)

    def _forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self._model(input_ids=tokens, **self._keywords).logits
        return logits

    def compile(self) -> "Decoder":
        """Let PyTorch compile the steps that follow, and capture CUDA graphs of them; return the decoder."""
        self._model = torch.compile(self._model, mode="reduce-overhead")  # type: ignore[assignment]
        return self

    def step(self) -> Tensor:
        """Logits after the token, (1, 1, vocabulary)."""
        return self._forward(self.token)


@torch.no_grad()
def check_graphs(bench: Bench) -> Iterator[Finding]:
    """Decode with packed weights: without a wait, and in CUDA graphs that give what eager decoding gives.

    One graph is captured here, and others by `torch.compile`.

    Raises:
        NotRunError: the device is a CPU, or Triton's kernels do not run on it.
    """
    if not bench.on_gpu:
        raise NotRunError("a CPU has no CUDA graphs")
    if not has_kernels(bench.device):
        raise NotRunError("Triton's kernels do not run on this GPU")
    folder, _, _ = bench.prune(
        bench.device, initial="magnitude", rebuild=False, format="packed", sparsity=0.5, dtype="float32"
    )
    model = load(folder, keep_packed=True, dtype=torch.float32, device=str(bench.device))
    packed = sum(isinstance(module, PackedLinear) for module in model.modules())
    yield Finding(text=f"{packed} linears are packed", passed=packed > 0)
    prompt = torch.arange(PROMPT, device=bench.device)[None]
    tokens = torch.arange(WARM_UPS + REPLAYS, device=bench.device)[:, None, None] + PROMPT
    expected = decode_eagerly(Decoder(model, prompt, len(tokens)), tokens)
    with torch.cuda.device(bench.device):
        yield check_no_waits(Decoder(model, prompt, len(tokens)))
        replayed = replay_graph(Decoder(model, prompt, len(tokens)), tokens)
        yield judge_logits("a CUDA graph of a step", replayed, expected[-REPLAYS:])
        compiled = decode_eagerly(Decoder(model, prompt, len(tokens)).compile(), tokens)
        yield judge_logits("torch.compile(mode='reduce-overhead')", compiled, expected)


def judge_logits(way: str, logits: Tensor, expected: Tensor) -> Finding:
    """Compare logits of a way to decode with those of eager decoding."""
    difference = float((logits - expected).abs().max() / expected.abs().max())
    text = f"{way}: logits differ by {difference:.2g} of the largest (bound {TOLERANCE:g})"
    return Finding(text=text, passed=difference <= TOLERANCE)


def decode_eagerly(decoder: Decoder, tokens: Tensor) -> Tensor:
    """Logits after each token, (tokens, 1, 1, vocabulary)."""
    logits = []
    for token in tokens:
        decoder.token.copy_(token)
        logits.append(decoder.step().clone())
    return torch.stack(logits)


def check_no_waits(decoder: Decoder) -> Finding:
    """Decode a token in PyTorch's mode in which a wait for the GPU is an error."""
    decoder.step()
    try:
        with sync_mode("error"):
            decoder.step()
    except RuntimeError as error:
        return Finding(text=f"a step of decoding waits for the GPU: {str(error).splitlines()[0]}", passed=False)
    return Finding(text="a step of decoding does not wait for the GPU", passed=True)


def replay_graph(decoder: Decoder, tokens: Tensor) -> Tensor:
    """Warm up with the first tokens, capture a step, and replay it for the others; logits as `decode_eagerly`."""
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        decode_eagerly(decoder, tokens[:WARM_UPS])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = decoder.step()
    logits = []
    for token in tokens[WARM_UPS:]:
        decoder.token.copy_(token)
        graph.replay()
        logits.append(output.clone())
    return torch.stack(logits)
