"""An error names the first wrong setting as the command line writes it, and its hint says what is allowed."""

import os
import traceback
from pathlib import Path
from typing import Any

import pytest

import llm_barber
from llm_barber.errors import SettingsError
from llm_barber.settings.base import Settings
from llm_barber.settings.compare import CompareConfig, EvaluateConfig
from llm_barber.settings.plan import PlanConfig
from llm_barber.settings.prune import PruneConfig, RebuildConfig
from llm_barber.settings.tools import ConvertConfig, PackConfig

PATHS = {"model": "m", "dense": "d", "pruned": "p", "output": "o"}


def error_of(kind: type[Settings], **values: Any) -> SettingsError:
    """The error that settings of these values raise; required paths are given."""
    required = {name: PATHS[name] for name, field in kind.model_fields.items() if field.is_required()}
    with pytest.raises(SettingsError) as caught:
        kind(**required | values)
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        (PruneConfig, {"samples": 0}, "--samples: 0 should be greater than or equal to 1"),
        (PruneConfig, {"samples": "half"}, "--samples: 'half' should be a valid integer"),
        (PruneConfig, {"guard": float("inf")}, "--guard: inf should be a finite number"),
        (PruneConfig, {"preset": "mas"}, "--preset: 'mas' should be 'paper', 'mask' or 'best'"),
        (PruneConfig, {"dtype": "int8"}, "--dtype: 'int8' should be 'auto', 'float32', 'bfloat16' or 'float16'"),
        (PruneConfig, {"layers": " "}, "--layers: the value is empty"),
        (PruneConfig, {"include": ("mlp", "")}, "--include: the value is empty"),
        (PruneConfig, {"include": (3,)}, "--include: 3 should be a valid string"),
        (PruneConfig, {"sparsity": 1.5}, "--sparsity: sparsity 1.5 is not between 0 and 1"),
        (PruneConfig, {"pattern": "4:2"}, "--pattern: pattern 4:2 must keep"),
        (PruneConfig, {"memory": "8x"}, "--memory: '8x' is not a size, like 8GiB"),
        (PruneConfig, {"skip_layers": "0,a"}, "--skip-layers: 'a' should be a valid integer"),
        (PruneConfig, {"output": ""}, "OUT: the value is empty"),
        (PruneConfig, {"output": "."}, "OUT: '.' is the current folder"),
        (PruneConfig, {"model": 3}, "MODEL: 3 should be a valid string"),
        (PruneConfig, {"sampels": 3}, "there is no setting sampels"),
        (RebuildConfig, {"pattern": "half"}, "--pattern: pattern 'half' is not N:M"),
        (CompareConfig, {"methods": ()}, "--methods: Tuple should have at least 1 item"),
        (CompareConfig, {"tasks": ","}, "--tasks: ',' names nothing: name at least one"),
        (CompareConfig, {"seeds": "0,-1"}, "--seeds: '-1' should be greater than or equal to 0"),
        (CompareConfig, {"targets": "half"}, "--targets: target 'half' is neither a sparsity"),
        (PlanConfig, {"tflops": 0}, "--tflops: 0 should be greater than 0"),
        (PackConfig, {"output": 3}, "PACKED: is not a folder's name"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_what_is_allowed(kind: type[Settings], values: dict[str, Any], words: str) -> None:
    error = error_of(kind, **values)
    assert str(error).startswith(words)
    name = words.partition(":")[0]
    assert error.hint.startswith(f"{name}: " if ":" in words else "PruneConfig has device, ")


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        (PruneConfig, {"sparsity": 0.5, "pattern": "2:4"}, "--sparsity and --pattern exclude each other"),
        (PruneConfig, {"allocation": "owl", "pattern": "2:4"}, "--allocation is not for patterns"),
        (PruneConfig, {"allocation": "loss", "sparsities": {"q": 0.5}}, "--allocation and --sparsities exclude"),
        (PruneConfig, {"reorder": True}, "--reorder needs --pattern"),
        (PruneConfig, {"allow_dense_tail": True}, "--allow-dense-tail needs N:M"),
        (PruneConfig, {"keep_updates": True}, "--keep-updates needs --initial sparsegpt or alps"),
        (PruneConfig, {"keep_updates": True, "initial": "alps", "refine": "swaps"}, "--keep-updates goes with neither"),
        (PruneConfig, {"initial_granularity": "block"}, "--initial-granularity block is not defined"),
        (PruneConfig, {"initial_granularity": "input", "pattern": "2:4"}, "--initial-granularity is not for patterns"),
        (PruneConfig, {"initial_granularity": "input", "initial": "sparsegpt"}, "--initial-granularity is not for spa"),
        (PruneConfig, {"rebuild": False, "rebuild_ratio": 1}, "--granularity and --rebuild-ratio need the rebuild"),
        (PruneConfig, {"reconstruct": "least-squares"}, "--reconstruct least-squares does not go with --refine tune"),
        (PruneConfig, {"swaps": 3}, "--swaps needs --refine swaps, which --preset mask does not use"),
        (RebuildConfig, {"tune_passes": 2}, "--tune-passes needs --refine tune or --reconstruct tune"),
        (RebuildConfig, {"guard": 0.5}, "--guard needs --refine or --reconstruct, which --preset paper does not use"),
        (RebuildConfig, {"rebuild": False}, "--no-rebuild, --refine none and --reconstruct none leave nothing to do"),
        (CompareConfig, {"granularity": "block", "rebuild": False}, "--granularity and --rebuild-ratio need"),
        (CompareConfig, {"granularity": "block", "methods": "mask"}, "--granularity and --rebuild-ratio are of"),
        (CompareConfig, {"seeds": "0,1", "calibration": "a.safetensors"}, "--seeds: a file of tokens"),
        (CompareConfig, {"methods": "alps-allocated", "targets": "2:4"}, "alps-allocated: N:M cannot be spread"),
        (CompareConfig, {"limit": 5}, "--limit needs --tasks or --tasks-folder"),
        (EvaluateConfig, {"limit": 5}, "--limit needs --tasks or --tasks-folder"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together(kind: type[Settings], values: dict[str, Any], words: str) -> None:
    assert str(error_of(kind, **values)).startswith(words)


def test_a_missing_value_and_a_call_without_settings() -> None:
    with pytest.raises(SettingsError, match="^OUT: is missing\n"):
        PruneConfig(model="m")
    with pytest.raises(SettingsError, match="prune takes settings of type PruneConfig, not str") as caught:
        llm_barber.prune("model")  # type: ignore[arg-type]
    assert caught.value.hint == "call prune(PruneConfig(model=…, output=…))"
    assert f"hint: {caught.value.hint}" in "".join(traceback.format_exception(caught.value))


def test_an_output_lies_apart_from_its_model(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for output, relation in ((folder, "is"), (folder / "inside", "lies inside"), (tmp_path, "contains")):
        error = error_of(ConvertConfig, model=folder, output=output)
        assert str(error) == f"the output folder {output} {relation} MODEL"


def test_a_plan_of_any_folder_writes_nothing_into_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = PlanConfig.model_fields["output"].default
    folder.mkdir()
    assert PlanConfig(model=folder).model == str(folder)


def test_paths_that_no_record_can_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = Path(os.fsdecode(bytes(tmp_path) + b"/\xff"))
    for name, typed in (("model", "MODEL"), ("output", "OUT")):
        assert str(error_of(PruneConfig, **{name: odd})).startswith(f"{typed}: is not valid UTF-8")
    odd.mkdir()
    monkeypatch.chdir(odd)
    assert "lies in a folder whose name is not valid UTF-8" in str(error_of(PruneConfig))
