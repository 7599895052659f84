"""Runs in which experts are computed together, as on a GPU, against runs that compute them one by one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_barber import InspectConfig, PruneConfig, inspect, prune
from llm_barber.model.expert_products import Products
from tests.conftest import make_model, read_folder, save_tokens
from tests.helpers.experts import TOGETHER

MOST_BITS = 0.01  # share of the mask's bits that rounding may change
SETTINGS: dict[str, dict[str, Any]] = {
    "mask": {"preset": "mask"},
    "paper": {"preset": "paper", "granularity": "block", "rebuild_ratio": 0.5},
    "sparsegpt": {"initial": "sparsegpt", "pattern": "2:4"},
    "dsnot": {"initial": "dsnot", "sparsity": 0.6},
    "swaps": {
        "initial": "wanda",
        "rebuild": False,
        "refine": "swaps",
        "target_mix": 0.5,
        "reconstruct": "least-squares",
    },
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("products", TOGETHER)
def test_masks_are_those_of_experts_one_by_one(
    tmp_path: Path,
    products: Products,
    settings: str,
    force_products: Callable[[Products], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llm_barber.method.few_tokens.FEW_TOKENS", 6)
    model = make_model(tmp_path / "dense", "mixtral", num_local_experts=8)
    tokens = save_tokens(tmp_path / "tokens.safetensors", sequences=6)
    written = []
    for number, computed in enumerate((Products.LOOP, products, products)):
        force_products(computed)
        prune(
            PruneConfig(
                model=model, output=tmp_path / str(number), calibration=tokens, dtype="float32", batch_size=3,
                report=False, **SETTINGS[settings],
            )
        )  # fmt: skip
        written.append(read_folder(tmp_path / str(number)))
    loop, first, second = written
    assert all(torch.equal(first[name], second[name]) for name in loop)
    pruned = [name for name in loop if not torch.equal(loop[name] != 0, torch.ones_like(loop[name], dtype=torch.bool))]
    assert any(".experts." in name for name in pruned)
    differing = sum(int(((loop[name] != 0) != (first[name] != 0)).sum()) for name in pruned)
    assert differing <= MOST_BITS * sum(loop[name].numel() for name in pruned)
    assert inspect(InspectConfig(model=str(tmp_path / "1"), dense=str(model))).problems == ()
