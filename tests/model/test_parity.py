"""Each family: the streamed run equals the same algorithm on a whole model in memory."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llm_barber import PruneConfig, prune
from llm_barber.masking.granularity import Granularity
from llm_barber.masking.pattern import Unstructured
from llm_barber.model.architecture import ARCHITECTURES
from llm_barber.model.empty import empty_model
from llm_barber.model.structure import find_architecture
from tests.conftest import FAMILIES, KNOWN, load_model, make_config, make_model, save_tokens
from tests.model.reference import one_by_one, prune_in_memory

ROUTERS = ("mlp.gate", "mlp.router", "feed_forward.gate", "shared_expert_gate")


def test_every_supported_architecture_is_tested() -> None:
    tested = {settings.get("model_type", family) for family, settings in KNOWN.items()}
    assert tested == set(ARCHITECTURES), "tests/conftest.py: KNOWN has the smallest configuration of each entry"


@pytest.mark.parametrize("family", KNOWN)
def test_records_name_every_matrix_of_a_layer(family: str) -> None:
    config = make_config(family)
    model = empty_model(config, torch.float32)
    architecture = ARCHITECTURES[config.model_type]
    for layer in model.get_submodule(architecture.layers):
        matrices = {
            name
            for name, module in layer.named_modules()
            if getattr(getattr(module, "weight", None), "ndim", 0) == 2 and not name.endswith(ROUTERS)
        }
        assert matrices == {name for block in architecture.blocks_of(layer) for name in block.linears}


OUTPUTS = ("llama", "gpt2", "qwen3_moe")  # rows are compared alike in all families; these have other linears


@pytest.mark.parametrize(
    ("family", "granularity"),
    [(family, Granularity.BLOCK) for family in FAMILIES] + [(family, Granularity.OUTPUT) for family in OUTPUTS],
)
def test_streamed_equals_in_memory(
    tmp_path: Path, family: str, granularity: Granularity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_barber.method.few_tokens.FEW_TOKENS", 0)  # a hundred tokens must do for all experts here
    folder = make_model(tmp_path / "dense", family)
    tokens = save_tokens(tmp_path / "tokens.safetensors", sequences=5)
    prune(
        PruneConfig(
            model=str(folder), output=tmp_path / "out", granularity=granularity, rebuild_ratio=0.5,
            calibration=str(tokens), dtype="float32", batch_size=2, report=False,
        )
    )  # fmt: skip
    architecture = find_architecture(make_config(family))
    expected = prune_in_memory(
        folder,
        architecture.layers,
        lambda layer: {block.name: (block.output, block.linears) for block in architecture.blocks_of(layer)},
        load_file(tokens)["input_ids"],
        Unstructured(0.5),
        granularity,
        0.5,
    )
    written = one_by_one(load_model(tmp_path / "out", dtype=torch.float32))
    assert len(expected) >= 6
    for name, keep in expected.items():
        assert torch.equal(written.get_submodule(name).weight != 0, keep), name
