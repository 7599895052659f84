"""Refining in a streamed run equals refining on whole models in memory, with plain hooks."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llm_barber import PruneConfig, prune
from llm_barber.masking.granularity import Granularity
from llm_barber.masking.initial import initial_mask
from llm_barber.masking.least_squares import least_squares
from llm_barber.masking.pattern import NofM, Unstructured
from llm_barber.masking.saliency import wanda
from llm_barber.masking.swaps import swap_pairs
from llm_barber.refine import UNGUARDED_DAMPING, UNGUARDED_STEPS
from tests.conftest import make_model, read_folder, save_tokens
from tests.model.reference import captured, first_call

GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",),
)  # fmt: skip


@torch.no_grad()
def refine_in_memory(folder: Path, tokens: torch.Tensor, pattern: Unstructured | NofM, mix: float, solve: bool) -> dict:
    """Wanda, then 5 swaps a row and least squares, layer by layer; weights by name."""
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sparse = copy.deepcopy(dense)
    result = {}
    for index in range(len(sparse.model.layers)):
        layer, other = sparse.model.layers[index], dense.model.layers[index]
        calls = [first_call(sparse, sparse.model.layers, index, sequence[None]) for sequence in tokens]
        other_calls = [first_call(dense, dense.model.layers, index, sequence[None]) for sequence in tokens]
        keep = {}
        for name in sum(GROUPS, ()):
            inputs = [captured(layer, name, *call)[0] for call in calls]
            squares = sum(one.square().flatten(0, -2).sum(0) for one in inputs) / len(inputs)
            keep[name] = initial_mask(wanda(layer.get_submodule(name).weight, squares), pattern, Granularity.OUTPUT)
        for name in keep:
            layer.get_submodule(name).weight[~keep[name]] = 0
        for group in GROUPS:
            ours = torch.cat([captured(layer, group[0], *call)[0].flatten(0, -2) for call in calls])
            its = torch.cat([captured(other, group[0], *call)[0].flatten(0, -2) for call in other_calls])
            gram, difference = ours.t() @ ours / len(ours), (ours - its).t() @ ours / len(ours)
            for name in group:
                weight = other.get_submodule(name).weight
                linear = mix * weight @ difference
                found, _ = swap_pairs(
                    keep[name], weight, gram, 5, linear, pattern if isinstance(pattern, NofM) else None
                )
                values = weight * found
                if solve:
                    values = least_squares(found, weight, gram, linear, UNGUARDED_STEPS, UNGUARDED_DAMPING)
                layer.get_submodule(name).weight.copy_(values)
                result[f"model.layers.{index}.{name}.weight"] = values
    return result


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NofM(2, 4)], ids=str)
@pytest.mark.parametrize(("mix", "solve"), [(0.0, False), (0.5, False), (0.5, True)])
def test_streamed_equals_in_memory(tmp_path: Path, pattern: Unstructured | NofM, mix: float, solve: bool) -> None:
    folder = make_model(tmp_path / "dense", "llama")
    tokens = save_tokens(tmp_path / "tokens.safetensors", sequences=5)
    report = prune(
        PruneConfig(
            model=folder, output=tmp_path / "out", pattern="2:4" if isinstance(pattern, NofM) else None, rebuild=False,
            refine="swaps", swaps=5, target_mix=mix, guard=0,
            reconstruct="least-squares" if solve else None, calibration=tokens, dtype="float32", batch_size=2,
        )
    )  # fmt: skip
    expected = refine_in_memory(folder, load_file(tokens)["input_ids"], pattern, mix, solve)
    written = read_folder(tmp_path / "out")
    assert report.swapped > 0
    assert len(expected) == 14
    for name, values in expected.items():
        assert torch.equal(written[name] != 0, values != 0), name
        assert torch.allclose(written[name], values, rtol=1e-3, atol=1e-4), name
