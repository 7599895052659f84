"""The benchmarks: those that replace a step of the program find what it finds, where they ask for nothing else."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llm_barber import PruneConfig, prune
from llm_barber.masking.saliency import weight_gradient
from tests.conftest import make_model, read_folder, save_tokens

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SWAPS = {"initial": "wanda", "rebuild": False, "refine": "swaps"}


@pytest.fixture
def variants(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import variants

    return variants


def masks(variants: ModuleType, folder: Path, **variant: Any) -> dict[str, Tensor]:
    """Keep masks of all linears, pruned as a variant says."""
    model, tokens = folder / "dense", folder / "tokens.safetensors"
    if not model.exists():
        make_model(model, "llama", num_hidden_layers=2)
        save_tokens(tokens, sequences=8)
    with variants.estimated(variant) as settings:
        run_settings = {
            "model": model,
            "output": folder / "out",
            "calibration": tokens,
            "overwrite": True,
            "report": False,
        }
        prune(PruneConfig(**run_settings, dtype="float32", **settings))
    return {name: tensor != 0 for name, tensor in read_folder(folder / "out").items() if "_proj" in name}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def test_the_published_estimator_is_the_programs(tmp_path: Path, variants: ModuleType) -> None:
    settings = {"initial": "wanda", "granularity": "block", "rebuild_ratio": 0.3}
    expected = masks(variants, tmp_path, **settings)
    assert same(masks(variants, tmp_path, **settings, estimator="published"), expected)
    assert not same(masks(variants, tmp_path, **settings, estimator="signed"), expected)
    assert same(masks(variants, tmp_path, **settings), expected)  # it is the program's again


def test_what_a_swap_of_one_weight_does_is_estimated_to_second_order(variants: ModuleType) -> None:
    """A linear by itself: its squared error is quadratic, so that signed gradient and diagonal say all."""
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(3, 5, generator=generator), torch.randn(40, 5, generator=generator)
    keep = torch.rand(3, 5, generator=generator) > 0.5

    def error(mask: Tensor) -> Tensor:
        return ((weight * ~mask) @ inputs.t()).square().sum()

    sparse = (weight * keep).requires_grad_()
    ((weight - sparse) @ inputs.t()).square().sum().backward()
    assert sparse.grad is not None
    estimate = variants.ESTIMATORS["second-order"][1](
        weight, keep, SignedGradients(sparse.grad), 2 * inputs.square().sum(0).expand(3, 5)
    )
    for row in range(3):
        for column in range(5):
            changed = keep.clone()
            changed[row, column] = ~changed[row, column]
            lost = (error(keep) - error(changed)) * (1 if changed[row, column] else -1)
            assert estimate[row, column].item() == pytest.approx(lost.item(), rel=1e-4)
    assert torch.equal(
        variants.ESTIMATORS["sparse"][1](weight, keep, SignedGradients(sparse.grad), estimate),
        weight_gradient(weight, sparse.grad.square()),
    )


class SignedGradients:
    """The part of `estimators.Gradients` that one sequence has."""

    def __init__(self, gradient: Tensor) -> None:
        self.signed, self.mean = gradient, gradient.square()


@pytest.mark.parametrize(
    ("variant", "target", "expected"),
    [
        ({"preset": "mask", "guard": 0.03125}, "0.5", {"preset": "mask"}),
        ({"preset": "mask", "target_mix": 0.5}, "0.5", {"preset": "mask"}),
        ({"preset": "mask", "target_mix": 0.5}, "2:4", {"preset": "mask", "target_mix": 0.5}),
        ({"preset": "best", "target_mix": 0.75}, "2:4", {"preset": "best"}),
        ({**SWAPS, "target_mix": 0.5}, "2:4", SWAPS),
        ({"initial": "wanda", "allocation": "uniform"}, "0.5", {"initial": "wanda"}),
        ({"preset": "mask", "allocation": "uniform"}, "0.5", {"preset": "mask", "allocation": "uniform"}),
    ],
)
def test_settings_that_are_the_programs_own_make_no_other_variant(
    variants: ModuleType, variant: dict[str, Any], target: str, expected: dict[str, Any]
) -> None:
    assert variants.as_it_differs(variant, target, 16, 64) == expected
    assert variants.resolved(variant, target, 16, 64) == variants.resolved(expected, target, 16, 64)


def test_rows_of_a_page_stay_on_it(tmp_path: Path, variants: ModuleType) -> None:
    import quality_settings

    path = tmp_path / "results" / "rows.json"
    assert quality_settings.with_kept_rows(path, ()) == ()
    assert not path.exists()
    first, second = (
        quality_settings.Rows.read("wanda+rebuild=0.5,2:4@0,1", ()),
        quality_settings.Rows.read("mask=0.5", (0,)),
    )
    assert quality_settings.with_kept_rows(path, (first,)) == (first,)
    assert quality_settings.with_kept_rows(path, (second, first)) == (first, second)
    assert quality_settings.with_kept_rows(path, ()) == (first, second)


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
