"""The benchmark of rounding: its rounded inputs are those of products by VNNI, and it measures a model."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from llm_barber import PruneConfig, load, native, prune
from llm_barber.checkpoint.rounding import pack_rounded, unpack_rounded
from llm_barber.native import Instructions
from tests.conftest import make_model, save_tokens
from tests.native.test_weight import int8_weight, make_weight, round_inputs


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import rounding

    return rounding


@pytest.mark.parametrize("group", [64, 128, 1000])
def test_inputs_are_rounded_as_in_products(rounding: ModuleType, group: int) -> None:
    inputs = make_weight(5, 200, 0.1, torch.float32)
    inputs[1] = 0
    inputs[2] = 1e-36
    rounded = rounding.round_inputs(inputs, group)
    whole, scales = round_inputs(inputs, group)
    whole[2] = 0
    expected = torch.from_numpy(whole * scales).float()
    torch.testing.assert_close(rounded, expected, rtol=1e-6, atol=0)
    assert torch.equal(rounding.round_inputs(inputs.view(5, 1, 200), group).view(5, 200), rounded)
    if native.instructions() > Instructions.AVX2:
        weight = pack_rounded(make_weight(40, 200, 0.5, torch.float32, seed=1), group)
        product = int8_weight(weight).multiply(inputs)
        torch.testing.assert_close(product, rounded @ unpack_rounded(weight).T, rtol=1e-5, atol=1e-5)


def test_a_model_is_measured(tmp_path: Path, rounding: ModuleType) -> None:
    model = make_model(tmp_path / "dense", "llama", dtype=torch.bfloat16, hidden_size=64, intermediate_size=192)
    tokens = save_tokens(tmp_path / "tokens.safetensors")
    prune(PruneConfig(model=model, output=tmp_path / "pruned", calibration=tokens, initial="wanda", rebuild=False))
    pruned = load(tmp_path / "pruned", dtype=torch.float32)
    windows = torch.arange(1, 61).view(2, 30)
    with torch.inference_mode():
        losses = [
            nn.functional.cross_entropy(pruned(window[None]).logits[0, :-1].double(), window[1:]) for window in windows
        ]
        rows = rounding.measure(pruned, windows, [32, 64, 0], float32_scales=True)
    assert float(rows[0][6]) == pytest.approx(torch.stack(losses).mean().exp().item(), abs=2e-3)
    assert [row[0] for row in rows[1:]] == ["32", "32", "64", "64", "a row", "a row"]
    divergences = [float(row[5]) for row in rows[1:]]
    assert 0 < divergences[0] < divergences[4] < 0.01
    rounded_inputs = [row[8] for row in rows[1:]]
    assert rounded_inputs[:2] == rounded_inputs[3::2] == ["–", "–"]
    assert all(0 < float(rounded_inputs[number]) < 0.01 for number in (2, 4))
