"""Settings of refining and tuning, resolved to numbers."""

from pathlib import Path
from typing import Any

import pytest

from llm_barber import PruneConfig, prune
from llm_barber.masking.pattern import NofM
from llm_barber.parallel.ranks import Ranks
from llm_barber.progress import Silent
from llm_barber.run.commands import prepare_prune
from llm_barber.run.dry_run import dry_run
from llm_barber.settings.refining import RefineSettings
from tests.conftest import Listener, save_tokens
from tests.helpers.tuned_runs import run


@pytest.mark.parametrize(
    ("windows", "length", "passes", "a_step"),
    [(128, 2048, 2, 4), (43, 512, 2, 4), (42, 512, 3, 4), (32, 512, 4, 4), (31, 512, 3, 1), (8, 512, 3, 1)],
)
def test_passes_and_windows_a_step_by_the_amount_of_text(windows: int, length: int, passes: int, a_step: int) -> None:
    """Passes are twice as many where masks and weights are tuned."""
    for settings, expected in (
        ({"preset": "mask"}, passes),
        ({"refine": "none", "reconstruct": "tune"}, passes),
        ({"preset": "best"}, 2 * passes),
        ({"preset": "mask", "tune_passes": 3}, 3),
        ({"preset": "best", "tune_passes": 3}, 3),
        ({"refine": "swaps"}, 0),
    ):
        refining = RefineSettings.of(PruneConfig(model="model", output="out", **settings), None, windows, length)
        assert refining is not None
        assert (refining.passes, refining.sequences_a_step) == (expected, a_step), settings
    chosen = RefineSettings.of(PruneConfig(model="model", output="out", tune_windows=7), None, windows, length)
    assert chosen is not None
    assert chosen.sequences_a_step == 7


@pytest.mark.parametrize(
    ("settings", "pattern", "mixes"),
    [
        ({}, NofM(2, 4), (0.75, 0.5)),  # the default mix is of tuned masks: the head's swaps do worse with it
        ({"target_mix": 0.25}, NofM(2, 4), (0.25, 0.25)),
        ({"refine": "none", "reconstruct": "least-squares"}, None, (0.25, 0.25)),
        ({"refine": "none", "reconstruct": "least-squares", "target_mix": 0.5}, None, (0.5, 0.5)),
        ({"refine": "swaps", "reconstruct": "least-squares"}, None, (0.5, 0.5)),
        ({"refine": "none", "reconstruct": "tune"}, None, (0.5, 0.5)),
    ],
)
def test_target_mix_of_layers_and_of_the_head(
    settings: dict[str, Any], pattern: NofM | None, mixes: tuple[float, float]
) -> None:
    config = PruneConfig(model="model", output="out", prune_head=True, **settings)
    refining = RefineSettings.of(config, pattern, 8, 64)
    assert refining is not None
    assert (refining.target_mix, refining.of_head.target_mix) == mixes


def test_the_target_is_that_of_most_weights(tmp_path: Path, model: Path, tokens: Path) -> None:
    """Sparsities of linears' own can make most of a model N:M, or all but a few."""
    variants: dict[str, dict[str, Any]] = {
        "all": {"sparsities": {".*": "2:4"}},
        "most": {"sparsities": {"mlp": "2:4"}},
        "few": {"sparsities": {"k_proj": "2:4"}},
        "others": {"sparsities": {".*": 0.5}, "pattern": "2:4"},
    }
    mixes = {}
    for name, settings in variants.items():
        report = run(model, tmp_path / name, tokens, preset="mask", tune_passes=1, **settings)
        mixes[name] = report.resolved["target_mix"]
    assert mixes == {"all": 0.75, "most": 0.75, "few": 0.5, "others": 0.5}


def test_one_window_is_not_held_out(tmp_path: Path, model: Path) -> None:
    told = Listener()
    tokens = save_tokens(tmp_path / "one.safetensors", sequences=1)
    for guard in (None, 0.0):
        config = {"model": model, "calibration": tokens, "guard": guard, "report": False, "overwrite": True}
        prune(PruneConfig(output=tmp_path / "out", **config), told)
    (message,) = (warning for warning in told.warnings if "held out" in warning)
    assert message == told.warnings[0]
    assert message.startswith("there is one calibration window")
    planned = Listener()
    dry_run(PruneConfig(model=model, output=tmp_path / "other", calibration=tokens), planned)
    assert message in planned.warnings


@pytest.mark.parametrize(
    ("share", "sequences", "held_out"), [(0.07, 100, 7), (0.28, 25, 7), (0.29, 25, 8), (0.9, 1, 0), (1e-20, 4, 1)]
)
def test_the_share_that_is_held_out_is_read_as_it_is_written(share: float, sequences: int, held_out: int) -> None:
    config = PruneConfig(model="model", output="out", guard=share)
    settings = RefineSettings.of(config, None, sequences, 16)
    assert settings is not None
    assert settings.held_out == held_out


def test_a_preset_with_settings_of_ones_own_is_not_called_that(tmp_path: Path, model: Path, tokens: Path) -> None:
    common = {"model": model, "calibration": tokens, "report": False, "output": tmp_path / "out"}
    for settings, preset in (
        ({"preset": "mask", "refine": "tune"}, "mask"),
        ({"guard": 0.0}, None),
        ({"target_mix": 1.0}, None),
        ({"tune_passes": 1}, None),
        ({"tune_windows": 1}, None),
        ({"preset": "mask", "initial": "magnitude"}, None),
    ):
        assert prepare_prune(PruneConfig(**common, **settings), Silent(), Ranks()).resolved["preset"] == preset
