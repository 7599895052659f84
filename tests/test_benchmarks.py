"""The benchmarks: those that replace a step of the program find what it finds."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import make_model

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_shares_of_a_token_agree_with_weight_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shares of `sink_shares` in the last token, whose own gradient is that of a loss in which only it counts."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import sink_shares

    make_model(tmp_path / "dense", "llama", num_hidden_layers=2)
    make_model(tmp_path / "pruned", "llama", num_hidden_layers=2, seed=1)
    dense, pruned = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval().requires_grad_(False)
        for name in ("dense", "pruned")
    )
    tokens = torch.randint(2, 100, (1, 12), generator=torch.Generator().manual_seed(0))
    errors, gradients = sink_shares.block_shares(dense, pruned, tokens, [11])
    mlp, calls = dense.model.layers[0].mlp, []
    pruned.model.layers[0].mlp.register_forward_hook(lambda _, inputs, output: calls.append((inputs[0], output)))
    pruned(tokens)
    (states, output), squares = calls[0], []
    mlp.requires_grad_()
    for kept in (slice(11, 12), slice(None)):  # an MLP takes each token by itself
        loss = (mlp(states) - output)[:, kept].square().sum()
        weights = torch.autograd.grad(loss, list(mlp.parameters()))
        squares.append((loss.item(), sum(weight.square().sum().item() for weight in weights)))
    assert errors[0][1] == pytest.approx(squares[0][0] / squares[1][0], rel=1e-4)
    assert gradients[0][1] == pytest.approx(squares[0][1] / squares[1][1], rel=1e-4)
    (fisher,) = sink_shares.fisher_shares(dense, tokens, [11])
    assert fisher == pytest.approx([0, 0], abs=1e-12)  # no token follows the last one
    assert all(0 < share < 1 for share in sink_shares.fisher_shares(dense, tokens, [0])[0])
