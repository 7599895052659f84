"""Settings of refining and tuning, resolved to numbers."""

from pathlib import Path
from typing import Any

import pytest

from llm_barber import PruneConfig, RebuildConfig, prune
from llm_barber.errors import SettingsError
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


@pytest.mark.parametrize(("target_mix", "of_head"), [(None, 0.5), (0.75, 0.75), (0.0, 0.0)])
def test_the_head_is_swapped_towards_its_own_target(target_mix: float | None, of_head: float) -> None:
    """The default mix is of tuned masks: swaps with N:M do worse with it."""
    config = PruneConfig(model="model", output="out", pattern="2:4", prune_head=True, target_mix=target_mix)
    settings = RefineSettings.of(config, NofM(2, 4), 8, 64)
    assert settings is not None
    assert settings.target_mix == (0.75 if target_mix is None else target_mix)
    assert settings.of_head.target_mix == of_head


@pytest.mark.parametrize(
    ("settings", "mix"),
    [
        ({"reconstruct": "least-squares"}, 0.25),
        ({"reconstruct": "least-squares", "target_mix": 0.5}, 0.5),
        ({"refine": "swaps", "reconstruct": "least-squares"}, 0.5),
        ({"reconstruct": "tune"}, 0.5),
    ],
)
def test_least_squares_alone_has_its_own_target(settings: dict[str, Any], mix: float) -> None:
    config = PruneConfig(model="model", output="out", **{"refine": "none", "prune_head": True, **settings})
    refining = RefineSettings.of(config, None, 8, 64)
    assert refining is not None
    assert (refining.target_mix, refining.of_head.target_mix) == (mix, mix)


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


def preset_of(config: PruneConfig) -> str | None:
    """The preset that the record of a run names."""
    preset: str | None = prepare_prune(config, Silent(), Ranks()).resolved["preset"]
    return preset


def test_a_preset_with_settings_of_ones_own_is_not_called_that(tmp_path: Path, model: Path, tokens: Path) -> None:
    common = {"model": model, "calibration": tokens, "report": False, "overwrite": True, "output": tmp_path / "out"}
    assert preset_of(PruneConfig(**common, preset="mask", refine="tune")) == "mask"
    for settings in (
        {"guard": 0.0},
        {"target_mix": 1.0},
        {"tune_passes": 1},
        {"tune_windows": 1},
        {"preset": "mask", "initial": "magnitude"},
    ):
        assert preset_of(PruneConfig(**common, **settings)) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refine": "tune", "reconstruct": "least-squares"}, "does not go with refine tune, which was asked"),
        ({"preset": "mask", "reconstruct": "least-squares"}, "is the preset's: give refine swaps or none, too"),
        ({"preset": "paper", "target_mix": 0.3}, "target_mix needs refine or reconstruct"),
        ({"preset": "paper", "guard": 0.3}, "guard needs refine or reconstruct"),
        ({"preset": "mask", "swaps": 10}, "swaps needs refine swaps"),
        ({"refine": "swaps", "tune_passes": 2}, "tune_passes are of refine tune and reconstruct tune"),
        ({"refine": "swaps", "tune_windows": 2}, "tune_windows are of refine tune and reconstruct tune"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path: Path, model: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        PruneConfig(model=model, output=tmp_path / "out", **settings)
    if "preset" not in settings:
        with pytest.raises(SettingsError, match=message):
            RebuildConfig(dense=model, pruned=tmp_path, output=tmp_path / "out", **settings)
