"""Bytes between host and device, and launches, do not grow.

Runs are on the pretend GPU (`tests/helpers/device_budgets.py`).

A budget is what a run takes today. Whoever lowers it lowers the number here. Launches may be a few more with other
versions of PyTorch and transformers.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import backend_registration

from llm_barber import PruneConfig
from llm_barber.planning.costs import run_costs
from llm_barber.planning.launches import allocation_launches, layer_launches
from llm_barber.planning.recipe import Recipe
from llm_barber.planning.shapes import ModelShapes
from llm_barber.planning.waiting import LAYER_STAGES
from tests.conftest import COMMON, FAMILIES, make_model, save_tokens
from tests.helpers.plans import shapes_of

if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("this PyTorch has no devices written in Python", allow_module_level=True)

HIDDEN, SEQUENCES, TOKENS = COMMON["hidden_size"], 4, 24  # of the tiny LLaMA, and of `save_tokens`
WEIGHTS = 4 * 9216  # bytes of a layer's linears, in float32
LAYER = WEIGHTS + 4 * 2 * HIDDEN  # with its norms
ARRAY = 4 * SEQUENCES * TOKENS * HIDDEN  # bytes of an array of activations
EMBEDDING = 4 * COMMON["vocab_size"] * HIDDEN
TOKEN_IDS = 8 * SEQUENCES * TOKENS
VERSIONS = 1.03
SCALARS = 600  # bytes of a stage's errors, counts and flags that the host reads
RUNS = 16  # bytes of the numbers of weights that rows lose, which the host reads once a layer


@dataclass(frozen=True)
class Budget:
    """Most bytes in each direction, and most launches, of a stage."""

    to_device: int
    to_host: int
    launches: int

    def allows(self, counts: dict[str, int]) -> bool:
        limits = {**vars(self), "launches": VERSIONS * self.launches}
        return all(counts[kind] <= limit for kind, limit in limits.items())


# `room`: activations stay on the device. A layer's weights come once, and its activations not at all; off the device
# each pass reads them, and writes them back. `other`: finished weights, and inputs of the next layer, for the disk.
ROOM = 10**9
TUNED = {"preset": "mask", "tune_passes": 1, "tune_windows": 4, "guard": 0}
RUN_BUDGETS: dict[str, tuple[dict[str, Any], dict[str, Budget]]] = {
    "paper": (
        {"preset": "paper", "room": ROOM},
        {
            "embed": Budget(EMBEDDING + TOKEN_IDS + 384, SCALARS, 86),
            "layer": Budget(LAYER, SCALARS, 1108),
            "other": Budget(SCALARS, 2 * WEIGHTS + ARRAY + SCALARS, 38),
        },
    ),
    "paper, activations off the device": (
        {"preset": "paper"},
        {
            "embed": Budget(EMBEDDING + TOKEN_IDS + 384, SCALARS, 84),
            "layer": Budget(LAYER + 7 * ARRAY, 5 * ARRAY + SCALARS, 1100),
            "other": Budget(SCALARS, 2 * WEIGHTS + SCALARS, 38),
        },
    ),
    "mask": (  # the allocation reads both layers once, since they stay, and the output head
        {**TUNED, "room": ROOM},
        {
            "embed": Budget(EMBEDDING + TOKEN_IDS + 384, SCALARS, 87),
            "allocate": Budget(2 * LAYER + EMBEDDING + 2 * ARRAY + 2 * TOKEN_IDS, 2 * ARRAY + 4 * SCALARS, 1378),
            "layer": Budget(LAYER, SCALARS + RUNS, 2087),
            "other": Budget(SCALARS, 2 * WEIGHTS + 2 * ARRAY + SCALARS, 38),
        },
    ),
    "mask, activations off the device": (
        TUNED,
        {
            "embed": Budget(EMBEDDING + TOKEN_IDS + 384, ARRAY + SCALARS, 84),
            "allocate": Budget(4 * LAYER + EMBEDDING + 7 * ARRAY + 2 * TOKEN_IDS, 4 * ARRAY + 4 * SCALARS, 1373),
            "layer": Budget(LAYER + 55 * ARRAY // 2, 11 * ARRAY + SCALARS + RUNS, 2065),
            "other": Budget(SCALARS, 2 * WEIGHTS + SCALARS, 38),
        },
    ),
}


# Of the plan's launches in a layer, as a share of those counted: other versions, and attention in several kernels.
LAUNCHES_ARE_LIKE = (0.7, 1.3)
# Planned bytes of a layer beside those counted, at most so far from 1.
BYTES_ARE_LIKE = 0.1
PROPORTIONS = {
    "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
DENSE_RUNS: dict[int, tuple[dict[str, Any], ...]] = {  # of a model without experts, by the number of windows
    8: (
        {"preset": "paper"},
        {"preset": "mask", "tune_passes": 2, "tune_windows": 4},
        {"preset": "best", "tune_passes": 2, "tune_windows": 4},
        {"preset": "mask", "tune_passes": 2, "tune_windows": 4, "pattern": "2:4"},
    ),
    32: ({"preset": "paper"}, {"preset": "mask", "tune_passes": 1, "tune_windows": 4}),
}
EXPERT_RUNS: dict[int, tuple[dict[str, Any], ...]] = {
    8: ({"preset": "paper"}, TUNED),  # so many windows that experts have tokens enough to be tuned
}


def counts(*settings: dict[str, Any]) -> list[dict[str, dict[str, int]]]:
    """Counts of each run, by stage, from a process for all of them."""
    command = [sys.executable, "-m", "tests.helpers.device_budgets", *map(json.dumps, settings)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert not process.returncode, process.stderr[-3000:]
    return [json.loads(line) for line in process.stdout.splitlines()]


def test_a_budget_is_a_limit() -> None:
    budget = Budget(to_device=10, to_host=5, launches=3)
    assert budget.allows({"to_device": 10, "to_host": 5, "launches": 3})
    for kind in vars(budget):
        assert not budget.allows({"to_device": 0, "to_host": 0, "launches": 0, kind: 11})


def test_no_stage_takes_more_than_its_budget(llama: Path, tokens: Path) -> None:
    common = {"model": str(llama), "calibration": str(tokens), "dtype": "float32", "batch_size": 2}
    for (name, (_, budgets)), stages in zip(
        RUN_BUDGETS.items(), counts(*({**common, **settings} for settings, _ in RUN_BUDGETS.values())), strict=True
    ):
        assert stages.keys() == budgets.keys(), name
        for stage, counted in stages.items():
            assert budgets[stage].allows(counted), f"{name}, {stage}: {counted}, budget {budgets[stage]}"


def test_a_plan_knows_the_bytes_that_move_and_the_launches(tmp_path: Path) -> None:
    """With few windows weights move most of the bytes, with many activations do, in proportions of a real LLaMA."""
    folder = make_model(tmp_path / "llama", "llama", torch.bfloat16, **PROPORTIONS)
    model = shapes_of({**COMMON, **PROPORTIONS})
    for config, stages in counted_runs(folder, DENSE_RUNS, "bfloat16", batch=4):
        recipe = Recipe.of(config, 4, torch.bfloat16, torch.bfloat16, torch.device("cuda"))
        costs = run_costs(model, recipe)
        planned = sum(getattr(costs, stage).moved for stage in LAYER_STAGES)
        counted = stages["layer"]["moved"]
        assert abs(planned / counted - 1) < BYTES_ARE_LIKE, f"{config}: {planned} planned, {counted} counted"
        check_launches(model, recipe, stages)


def test_a_plan_knows_the_launches_of_experts(tmp_path: Path) -> None:
    folder, model = make_model(tmp_path / "mixtral", "mixtral"), shapes_of(FAMILIES["mixtral"], "mixtral")
    for config, stages in counted_runs(folder, EXPERT_RUNS, "float32", batch=2):
        check_launches(model, Recipe.of(config, 2, torch.float32, torch.float32, torch.device("cuda")), stages)


def counted_runs(
    folder: Path, runs: dict[int, tuple[dict[str, Any], ...]], dtype: str, batch: int
) -> list[tuple[PruneConfig, dict[str, dict[str, int]]]]:
    """Settings of each run on a model, activations on the device, and its counts by stage."""
    settings: list[dict[str, Any]] = []
    configs = []
    for windows, of_windows in runs.items():
        text = save_tokens(folder.parent / f"{windows}.safetensors", windows, TOKENS)
        common = {"model": str(folder), "calibration": str(text), "dtype": dtype, "batch_size": batch}
        for changes in of_windows:
            settings.append({**common, **changes})
            configs.append(PruneConfig(**settings[-1], output=folder.parent / "out", samples=windows, seqlen=TOKENS))
    return list(zip(configs, counts(*({**each, "room": ROOM} for each in settings)), strict=True))


def check_launches(model: ModelShapes, recipe: Recipe, stages: dict[str, dict[str, int]]) -> None:
    """Hold the plan's launches against those counted in a run of one layer, or of two alike."""
    planned = {"layer": sum(layer_launches(model.layers[0], recipe).values())}
    if "allocate" in stages:
        planned["allocate"] = allocation_launches(model, recipe)
    for stage, number in planned.items():
        low, high = (share * stages[stage]["launches"] for share in LAUNCHES_ARE_LIKE)
        assert low <= number <= high, f"{recipe}, {stage}: {number} planned, {stages[stage]['launches']} counted"
