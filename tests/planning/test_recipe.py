"""The numbers that a plan takes from a run's settings are those that the run computes with."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_barber.masking.pattern import NofM
from llm_barber.method import allocation, refine_linear
from llm_barber.method.pruned_linear import PrunedLinear
from llm_barber.method.refine_linear import Objective
from llm_barber.parallel.ranks import Ranks
from llm_barber.planning.recipe import Recipe
from llm_barber.settings.prune import PruneConfig
from llm_barber.settings.refining import RefineSettings

CPU = torch.device("cpu")


def recipe_of(**settings: Any) -> Recipe:
    config = PruneConfig(model="model", output=Path("out"), **settings)
    return Recipe.of(config, 1, torch.float32, torch.float32, CPU)


def swaps_of_a_run(monkeypatch: pytest.MonkeyPatch, settings: RefineSettings) -> list[int]:
    """Most swaps of each call of `swap_pairs` in the refining of one linear."""
    calls: list[int] = []

    def swap_pairs(keep: Tensor, weight: Tensor, gram: Tensor, swaps: int, *_: Any) -> tuple[Tensor, Tensor]:
        calls.append(swaps)
        return keep, torch.ones(len(keep))

    monkeypatch.setattr(refine_linear, "swap_pairs", swap_pairs)
    weight, keep = torch.ones(2, 4), torch.tensor([True, False, True, False]).expand(2, 4)
    pruned = PrunedLinear(keep, weight * keep, weight, None)
    objective = Objective(torch.eye(4), None)
    refine_linear.refine_linear(pruned, weight, objective, objective if settings.held_out else None, settings)
    return calls


@pytest.mark.parametrize("swaps", [0, 1, 2, 3, 5, 7, 10, 11, 14, 98, 99, 100, 101, 102, 103, None])
@pytest.mark.parametrize("held_out", [0, 2])
def test_a_plan_counts_the_swaps_that_a_run_makes(
    monkeypatch: pytest.MonkeyPatch, swaps: int | None, held_out: int
) -> None:
    settings = RefineSettings(swaps, 0.5, False, held_out=held_out)
    planned = replace(recipe_of(preset="mask"), refine=settings, pattern=None).swap_stages
    assert list(planned) == swaps_of_a_run(monkeypatch, settings)
    assert sum(planned) == settings.swaps_of(None)


@pytest.mark.parametrize(
    ("windows", "held_out", "processes"), [(20, 3, 3), (10, 3, 3), (16, 2, 4), (32, 1, 8), (2, 1, 4)]
)
def test_a_plan_counts_the_held_out_windows_that_the_busiest_process_has(
    windows: int, held_out: int, processes: int
) -> None:
    recipe = replace(recipe_of(samples=windows, seqlen=64), refine=RefineSettings(None, 0.5, False, held_out=held_out))
    started = min(windows, processes)
    shares = [Ranks(rank, started).shares(windows, held_out)[1] for rank in range(started)]
    assert recipe.among(processes).held_out == 64 * max(len(range(windows)[share]) for share in shares)


def test_stages_by_hand() -> None:
    assert refine_linear.swap_stages(100, guarded=True) == (25, 25, 50)
    assert refine_linear.swap_stages(2, guarded=True) == (1, 1)
    assert refine_linear.swap_stages(10, guarded=True) == (3, 2, 5)  # rounded up, not to even
    assert refine_linear.swap_stages(10, guarded=False) == (10,)
    assert refine_linear.swap_stages(0, guarded=True) == ()


def test_a_pattern_has_stages_of_its_own_default() -> None:
    settings = RefineSettings(None, 0.5, False, held_out=1)
    assert sum(replace(recipe_of(preset="mask"), refine=settings, pattern=NofM(2, 4)).swap_stages) == 400


def test_the_allocation_by_loss_takes_the_first_4096_tokens() -> None:
    assert allocation.loss_windows(512) == 8
    assert allocation.loss_windows(3000) == 1
    assert allocation.loss_windows(10_000) == 1  # a whole window, even where it is longer
    planned = recipe_of(preset="best", samples=16, seqlen=1024)
    assert planned.loss_tokens == 4096
    assert planned.among(8).loss_tokens == 2048  # the first process has two of the four windows


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("windows", [1, 2, 3, 4])
def test_processes_wait_for_each_other_in_each_step(processes: int, windows: int) -> None:
    """The longest share of each step, summed over a pass, is the plan's time of the pass."""
    sequences = 48
    recipe = replace(recipe_of(preset="mask", tune_windows=windows, guard=0, samples=sequences), processes=processes)
    assert recipe.refine is not None
    share = sequences // processes
    by_process = [
        recipe.refine.steps(
            SimpleNamespace(all_sequences=sequences, held_out=0, held_out_start=share, first_sequence=rank * share)
        )
        for rank in range(processes)
    ]
    longest = [max(len(step.local_sequences) for step in steps) for steps in zip(*by_process, strict=True)]
    assert len(longest) == recipe.tune_steps
    assert sum(longest) == pytest.approx(recipe.local_sequences * recipe.tune_turns)
