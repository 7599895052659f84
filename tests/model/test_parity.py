"""Each family: the streamed run equals the same algorithm on a whole model in memory."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llm_barber import PruneConfig, prune
from llm_barber.masking.granularity import Granularity
from llm_barber.masking.pattern import Unstructured
from llm_barber.model.architecture import ARCHITECTURES
from tests.conftest import FAMILIES, make_model, read_folder, save_tokens
from tests.model.reference import prune_in_memory

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LLAMA_BLOCKS = {
    "attention": ("self_attn", (*ATTENTION, "self_attn.o_proj")),
    "mlp": ("mlp", ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")),
}
OPT_BLOCKS = {"attention": ("self_attn", (*ATTENTION, "self_attn.out_proj")), "mlp": ("fc2", ("fc1", "fc2"))}


def test_every_supported_architecture_is_tested() -> None:
    assert {settings["model_type"] for settings in FAMILIES.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("granularity", [Granularity.OUTPUT, Granularity.BLOCK])
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_equals_in_memory(tmp_path: Path, family: str, granularity: Granularity) -> None:
    folder = make_model(tmp_path / "dense", family)
    tokens = save_tokens(tmp_path / "tokens.safetensors", sequences=5)
    prune(
        PruneConfig(
            model=str(folder), output=tmp_path / "out", granularity=granularity, rebuild_ratio=0.5,
            calibration=str(tokens), dtype="float32", batch_size=2,
        )
    )  # fmt: skip
    opt = family.startswith("opt")
    expected = prune_in_memory(
        folder,
        "model.decoder.layers" if opt else "model.layers",
        OPT_BLOCKS if opt else LLAMA_BLOCKS,
        load_file(tokens)["input_ids"],
        Unstructured(0.5),
        granularity,
        0.5,
    )
    written = read_folder(tmp_path / "out")
    assert len(expected) == (12 if opt else 14)
    for name, keep in expected.items():
        assert torch.equal(written[f"{name}.weight"] != 0, keep), name
