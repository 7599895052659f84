"""Every family with every way to prune: the presets, allocation by the loss, swaps, and the output head."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llm_barber import PruneConfig, prune
from llm_barber.model.skeleton import Skeleton
from llm_barber.model.structure import find_architecture
from tests.conftest import FAMILIES, make_config, make_model, read_folder, save_tokens

# Together: tuned masks and tuned weights, swaps; allocated by the loss or not; the output head after either or not.
WAYS: dict[str, dict[str, Any]] = {
    "mask": {"tune_passes": 1},
    "best with the head": {"preset": "best", "tune_passes": 1, "prune_head": True},
    "swaps with the head": {"refine": "swaps", "swaps": 2, "allocation": "uniform", "prune_head": True},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_prunes_half_of_the_linears_and_of_the_head(tmp_path: Path, family: str) -> None:
    model = make_model(tmp_path / "dense", family)
    tokens = save_tokens(tmp_path / "tokens.safetensors", sequences=2, tokens=8)
    for way, settings in WAYS.items():
        output = tmp_path / way
        report = prune(
            PruneConfig(
                model=model, output=output, calibration=tokens, dtype="float32", report=False, guard=0, **settings
            )
        )
        linears = [linear for layer in report.layers[:-1] for linear in layer.linears]
        if settings.get("prune_head"):
            (head,) = report.layers[-1].linears
            assert head.pruned == head.weights / 2
        else:
            linears += report.layers[-1].linears
        weights = sum(linear.weights for linear in linears)
        assert sum(linear.pruned for linear in linears) / weights == pytest.approx(0.5, abs=0.01)
        assert all(tensor.isfinite().all() for tensor in read_folder(output).values())


def parts(family: str) -> tuple[set[str], set[str]]:
    """Modules outside the decoder layers whose parameters make logits of text, and all others that have any."""
    config = make_config(family)
    skeleton = Skeleton(config, find_architecture(config), torch.device("cpu"), torch.float32)
    used = set(skeleton.outside_names_and_head)
    assert set(skeleton.outside_names) <= used
    assert all(skeleton.model.get_parameter(name).is_meta for name in used)
    names = (used, set(skeleton.all_outside_names) - used)
    modules = [{name.rpartition(".")[0] for name in some} for some in names]
    return modules[0], modules[1]


def test_what_makes_logits_of_text_is_loaded_wherever_it_is() -> None:
    used, others = parts("modernbert-decoder")
    assert used == {
        "model.embeddings.tok_embeddings", "model.embeddings.norm", "model.final_norm", "lm_head.dense",
        "lm_head.norm", "decoder",
    }  # fmt: skip
    assert not others


@pytest.mark.parametrize("family", ["gemma3", "internvl", "llava", "mistral3", "qwen2_5_vl", "qwen3_vl", "smolvlm"])
def test_what_sees_is_not_loaded(family: str) -> None:
    used, others = parts(family)
    language = "text_model" if family == "smolvlm" else "language_model"
    assert used <= {f"model.{language}.embed_tokens", f"model.{language}.norm", "lm_head"}
    assert len(others) > 5
