"""Tuning of a model with an attention sink: one token whose states are a hundred times as large as the others'."""

import math
from collections import defaultdict
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llm_barber import PruneConfig, RunReport, prune
from llm_barber.messages import ranges
from llm_barber.method import clipped_gradients, distance
from llm_barber.record.file import read_record
from tests.conftest import Listener, make_model

SINK = 1  # the token that begins every window, and stands nowhere else
WINDOWS, LENGTH = 16, 64


def make_model_with_sink(folder: Path, seed: int) -> Path:
    """Save a tiny LLaMA in which channel 0 of the first MLP fires for `SINK` alone, and `down_proj` makes it huge."""
    make_model(folder, "llama", num_hidden_layers=3, seed=seed)
    weights = load_file(folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    embedding[:, 0] = 0
    embedding[SINK] = 0
    embedding[SINK, 0] = 3
    first = "model.layers.0."
    weights[f"{first}self_attn.o_proj.weight"][0] = 0
    for name in ("gate_proj", "up_proj"):
        weights[f"{first}mlp.{name}.weight"][0] = 0
        weights[f"{first}mlp.{name}.weight"][0, 0] = 3
    down = weights[f"{first}mlp.down_proj.weight"]
    down[:, 0] = torch.randn(len(down), generator=torch.Generator().manual_seed(seed)) * 30
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")) and not name.startswith(first):
            weight *= 0.5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def make_windows(seed: int) -> Tensor:
    windows = torch.randint(2, 128, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(seed))
    windows[:, 0] = SINK
    return windows


def states(folder: Path, windows: Tensor) -> list[Tensor]:
    """The outputs of all decoder layers but the last, each (windows, tokens, hidden)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return list(model(windows, output_hidden_states=True).hidden_states[1:-1])


@pytest.fixture(params=[0, 5])
def seed(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def dense(tmp_path: Path, seed: int) -> Path:
    return make_model_with_sink(tmp_path / "dense", seed)


def prune_with_sink(
    tmp_path: Path, dense: Path, seed: int, listener: Listener | None = None, **settings: Any
) -> tuple[RunReport, Path]:
    tokens = tmp_path / "tokens.safetensors"
    save_file({"input_ids": make_windows(seed)}, tokens)
    output = tmp_path / "pruned"
    settings = {"guard": 0.25, **settings, "dtype": "float32", "report": False, "overwrite": True}
    config = PruneConfig(model=dense, output=output, calibration=tokens, **settings)
    return (prune(config, listener) if listener else prune(config)), output


def test_the_model_has_a_sink(dense: Path, seed: int) -> None:
    squares = [state.square().sum(-1) for state in states(dense, make_windows(seed + 100))]
    assert all((of_tokens[:, 0] > 2500 * of_tokens.median()).all() for of_tokens in squares)


def test_passes_that_harm_the_other_tokens_are_rejected(
    tmp_path: Path, dense: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If gradients count the sink in full, plain squares keep passes that make all other tokens worse.

    The rule rejects these passes: the other tokens are as near as with the untuned mask.
    """
    monkeypatch.setattr(clipped_gradients, "HUGE_TERM", math.inf)
    unseen = make_windows(seed + 100)
    before = states(dense, unseen)

    def errors(**settings: Any) -> list[float]:
        """Squared error of the other tokens after each layer, in windows that no run has seen."""
        _, output = prune_with_sink(tmp_path, dense, seed, **settings)
        return [
            (dense_state - pruned_state)[:, 1:].square().sum().item()
            for dense_state, pruned_state in zip(before, states(output, unseen), strict=True)
        ]

    untuned = errors(initial="wanda", allocation="loss", rebuild=False, guard=None)
    with_rule = errors()
    monkeypatch.setattr(distance, "HUGE_TOKEN", 1e9)
    without = errors()
    for error, tuned, by_plain_squares in zip(untuned, with_rule, without, strict=True):
        assert tuned < 1.02 * error
        assert by_plain_squares > 1.2 * error


def errors_after_pruning(folder: Path, seed: int, **settings: Any) -> Tensor:
    """Squared errors (sink, other tokens) after the last layer but one, in windows that no run has seen."""
    dense = folder / "dense"
    _, output = prune_with_sink(folder, dense, seed, **settings)
    unseen = make_windows(seed + 100)
    squares = (states(dense, unseen)[-1] - states(output, unseen)[-1]).square().sum((0, 2))
    return torch.stack((squares[0], squares[1:].sum()))


def test_tuning_brings_the_other_tokens_nearer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other tokens' error falls by 3 % at least, mean of four models; in most of them `best` repairs the sink, too.

    If gradients count the sink in full, the error falls by less than 2 %, since held-out windows reject nearly every
    pass. Over ten models and two kinds of instructions the error falls by 5 % with `mask` (the same number with both
    kinds) and by 10 % ± 4 % with `best`, whose weights change with each rounding: the bound is three times the
    deviation of a mean of four.
    """
    bounds = {"clipped": clipped_gradients.HUGE_TERM, "not clipped": math.inf}
    sink: dict[tuple[str, str], list[float]] = defaultdict(list)
    others: dict[tuple[str, str], list[float]] = defaultdict(list)
    for seed in range(4):
        folder = tmp_path / str(seed)
        make_model_with_sink(folder / "dense", seed)
        untuned = errors_after_pruning(folder, seed, initial="wanda", allocation="loss", rebuild=False, guard=None)
        for case in product(("mask", "best"), bounds):
            preset, clipping = case
            monkeypatch.setattr(clipped_gradients, "HUGE_TERM", bounds[clipping])
            ratios = (errors_after_pruning(folder, seed, preset=preset) / untuned).tolist()
            sink[case].append(ratios[0])
            others[case].append(ratios[1])

    assert mean(others["mask", "clipped"]) < 0.97
    assert mean(others["best", "clipped"]) < 0.97
    assert mean(others["mask", "not clipped"]) > 0.98
    assert mean(others["best", "not clipped"]) > 0.98
    assert median(sink["best", "clipped"]) < 0.3


def test_a_run_says_where_one_token_has_most_of_the_distance(tmp_path: Path, dense: Path, seed: int) -> None:
    listener = Listener()
    report, _ = prune_with_sink(tmp_path, dense, seed, listener)
    shares = [layer.concentration for layer in report.layers]
    assert all(share is not None for share in shares)
    ruled = [layer.index for layer in report.layers if layer.concentration and layer.concentration.token_after > 0.5]
    assert 0 in ruled
    assert any(f"of 3 ({ranges(ruled)})" in message for message in listener.warnings)
    assert RunReport.model_validate_json(report.to_json()) == report


@pytest.mark.parametrize("seed", [0], indirect=True)
def test_a_record_without_the_shares_is_read(tmp_path: Path, dense: Path, seed: int) -> None:
    """Records that were written before the shares existed lack them."""
    report, output = prune_with_sink(tmp_path, dense, seed)
    layers = tuple(layer.model_copy(update={"concentration": None}) for layer in report.layers)
    older = report.model_copy(update={"layers": layers})
    assert "concentration" not in older.to_json()
    assert "concentration" not in older.model_dump_json(exclude_none=True)
    (output / "barber.json").write_text(older.to_json())
    record = read_record(output)
    assert record is not None
    assert all(layer.concentration is None and layer.held_out for layer in record.layers)
