"""Decoding step by step into a cache of fixed size, on a CPU; the mode in which waits are errors."""

import pytest
import torch

from llm_barber.runtime.load import load
from llm_barber.runtime.packed_linear import PackedLinear
from llm_barber.tools.selftest.bench import CPU, Bench
from llm_barber.tools.selftest.graphs import Decoder, check_graphs, check_no_waits, decode_eagerly, judge_logits
from llm_barber.tools.selftest.result import NotRunError


@torch.no_grad()
def test_logits_of_steps_are_those_of_the_whole_text(bench: Bench) -> None:
    folder, _, _ = bench.prune(CPU, initial="magnitude", rebuild=False, format="packed")
    model = load(folder, keep_packed=True, dtype=torch.float32)
    assert any(isinstance(module, PackedLinear) for module in model.modules())
    prompt, tokens = torch.arange(8)[None], torch.arange(5)[:, None, None] + 8
    logits = decode_eagerly(Decoder(model, prompt, len(tokens)), tokens)
    whole = model(torch.cat([prompt, tokens.view(1, -1)], 1)).logits[0, 8:]
    torch.testing.assert_close(logits[:, 0, 0], whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_compiled_step_gives_the_same_logits(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as a CPU can tell: PyTorch traces a step with packed weights and a cache of fixed size."""
    modes: list[str] = []
    compile_model = torch.compile

    def traced(model: torch.nn.Module, mode: str) -> torch.nn.Module:
        modes.append(mode)
        return compile_model(model, backend="eager")

    monkeypatch.setattr(torch, "compile", traced)
    folder, _, _ = bench.prune(CPU, initial="magnitude", rebuild=False, format="packed")
    model = load(folder, keep_packed=True, dtype=torch.float32)
    prompt, tokens = torch.arange(8)[None], torch.arange(3)[:, None, None] + 8
    expected = decode_eagerly(Decoder(model, prompt, len(tokens)), tokens)
    compiled = decode_eagerly(Decoder(model, prompt, len(tokens)).compile(), tokens)
    assert modes == ["reduce-overhead"]
    assert judge_logits("compiled", compiled, expected).passed
    assert not judge_logits("compiled", compiled + 1e-3 * expected.abs().max(), expected).passed


def test_a_cpu_has_no_graphs(bench: Bench) -> None:
    with pytest.raises(NotRunError):
        list(check_graphs(bench))


class Steps:
    """A decoder whose steps wait for the device from some step on."""

    def __init__(self, waits_from: int) -> None:
        self._waits_from, self._step = waits_from, 0

    def step(self) -> None:
        self._step += 1
        if self._step >= self._waits_from:
            raise RuntimeError("called a synchronizing CUDA operation\nmore")


def test_a_step_that_waits_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str | int] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    assert check_no_waits(Steps(waits_from=9)).passed  # type: ignore[arg-type]
    waiting = check_no_waits(Steps(waits_from=2))  # type: ignore[arg-type]
    assert not waiting.passed
    assert waiting.text.endswith("called a synchronizing CUDA operation")
    assert modes == ["error", 0] * 2
