"""All problems of settings are reported at once: wrong values, and values that do not go together."""

import os
import traceback
from pathlib import Path
from typing import Any

import pytest

import llm_barber
from llm_barber.errors import SettingsError
from llm_barber.settings.checked import Settings
from llm_barber.settings.compare import CompareConfig
from llm_barber.settings.copies import ConvertConfig
from llm_barber.settings.evaluate import EvaluateConfig
from llm_barber.settings.plan import PlanConfig
from llm_barber.settings.prune import PruneConfig, RebuildConfig

PRUNE = {"model": "m", "output": "o"}
REBUILD = {"dense": "d", "pruned": "p", "output": "o"}


def error_of(kind: type[Settings], **values: Any) -> str:
    """Message of the error that settings of these values raise."""
    with pytest.raises(SettingsError) as caught:
        kind(**values)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "values", "parts"),
    [
        (PruneConfig, {**PRUNE, "sparsity": 1.5, "pattern": "2:4"}, ("sparsity 1.5 is", "and pattern exclude")),
        (PruneConfig, {**PRUNE, "sparsity": 0.5, "pattern": "4:2"}, ("pattern 4:2 must", "and pattern exclude")),
        (PruneConfig, {**PRUNE, "samples": 0, "keep_updates": True}, ("samples: ", "keep_updates needs initial")),
        (PruneConfig, {"model": "m", "pattern": "2:4", "sparsity": 0.5}, ("output: is missing", "exclude each")),
        (PruneConfig, {**PRUNE, "what": 1, "pattern": "2:4", "sparsity": 0.5}, ("what: there is ", "exclude each")),
        (
            PruneConfig,
            {**PRUNE, "sparsities": 1, "allocation": "owl", "pattern": "2:4"},
            ("sparsities: ", "allocation is not for patterns"),
        ),
        (RebuildConfig, {**REBUILD, "rebuild": False, "rebuild_ratio": 2}, ("rebuild_ratio: ", "need the rebuild")),
        (RebuildConfig, {**REBUILD, "swaps": 0, "preset": "mask"}, ("swaps: ", "swaps needs refine swaps")),
        (RebuildConfig, {**REBUILD, "seed": -1, "rebuild": False}, ("seed: ", "leave nothing to do")),
        (
            CompareConfig,
            {**PRUNE, "granularity": "row", "rebuild": False, "calibration": "a.safetensors", "seeds": (0, 1)},
            ("granularity: ", "need the rebuild", "give one seed"),
        ),
    ],
)  # fmt: skip
def test_wrong_values_and_conflicts_are_reported_together(
    kind: type[Settings], values: dict[str, Any], parts: tuple[str, ...]
) -> None:
    error = error_of(kind, **values)
    assert all(part in error for part in parts), error


def test_an_output_that_is_its_source_is_reported_beside_a_wrong_value(tmp_path: Path) -> None:
    error = error_of(ConvertConfig, model=tmp_path, output=tmp_path, revision=1)
    assert "revision: " in error
    assert "output is model itself" in error


def test_a_plan_of_any_folder_writes_nothing_into_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = PlanConfig.model_fields["output"].default
    folder.mkdir()
    assert PlanConfig(model=folder).model == str(folder)


@pytest.mark.parametrize(
    "values",
    [
        {"preset": "worst", "guard": 0.5}, {"refine": "twice", "reconstruct": "least-squares"}, {"sparsity": "half"},
        {"initial": "best", "keep_updates": True}, {"allocation": "none", "pattern": "2:4"}, {"output": ""},
        {"keep_updates": "perhaps"}, {"model": 3}, {"initial_granularity": "row", "initial": "sparsegpt"},
    ],
    ids=str,
)  # fmt: skip
def test_conflicts_that_depend_on_a_wrong_value_are_not_reported(values: dict[str, Any]) -> None:
    expected = "initial_granularity" if "initial_granularity" in values else next(iter(values))
    error = error_of(PruneConfig, **{**PRUNE, **values})
    assert error.startswith(f"{expected}: ")
    assert "; " not in error or expected == "initial_granularity"


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        (PruneConfig, {"samples": 1.5}, "samples: 1.5 is not a whole number"),
        (PruneConfig, {"samples": None}, "samples: None is not a whole number"),
        (PruneConfig, {"samples": "1" * 5000}, f"samples: '{'1' * 79}… has too many digits"),
        (PruneConfig, {"sparsity": "half"}, "sparsity: 'half' is not a number"),
        (PruneConfig, {"guard": float("inf")}, "guard: inf is not a finite number"),
        (PruneConfig, {"bos": "perhaps"}, "bos: 'perhaps' is neither true nor false"),
        (PruneConfig, {"model": 3}, "model: 3 is not text"),
        (PruneConfig, {"include": "mlp"}, "include: 'mlp' is not a list"),
        (PruneConfig, {"include": (3,)}, "include.0: 3 is not text"),
        (PruneConfig, {"blocks": (3,)}, "blocks.0: 3 is not of type Block"),
        (PruneConfig, {"sampels": 3}, "sampels: there is no such setting: did you mean samples?"),
        (PruneConfig, {"xyz": 3}, "xyz: there is no such setting"),
        (PruneConfig, {"preset": "mas"}, "preset: 'mas' is not one of paper, mask, best: did you mean mask?"),
        (PruneConfig, {"seed": 10**5000}, "seed: the number is too large: it must be below 9223372036854775808"),
        (PruneConfig, {"swaps": 10**7}, "swaps: 10000000 is too large: the most is 1000000"),
        (PlanConfig, {"output": "o", "tflops": 0}, "tflops: 0 is too small: it must be above 0"),
        (CompareConfig, {"limit": 1}, "limit: 1 is too small: the least is 2"),
        (CompareConfig, {"tasks_folder": 3}, "tasks_folder: 3 is not a path"),
        (CompareConfig, {"rebuild_settings": 3}, "rebuild_settings: 3 is not a mapping"),
        (CompareConfig, {"rebuild_settings": {"ria": ("row", 1)}},
         "rebuild_settings.ria.0: 'row' is not one of output, input, linear, block"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_told_in_our_words(kind: type[Settings], values: dict[str, Any], words: str) -> None:
    assert error_of(kind, **{**PRUNE, **values}).split("; ")[0] == words


def test_a_missing_value_is_told_in_our_words() -> None:
    assert error_of(PruneConfig, model="m") == "output: is missing: give it a value"


def test_the_hint_says_what_a_wrong_setting_takes() -> None:
    with pytest.raises(SettingsError) as caught:
        PruneConfig(**PRUNE, samples=0)
    assert caught.value.hint == "samples: Windows of text"
    with pytest.raises(SettingsError) as caught:
        PruneConfig(**PRUNE, pattern="2:4", sparsity=0.5)
    assert "see --help" in caught.value.hint


def test_a_call_without_settings_says_how_to_make_them() -> None:
    with pytest.raises(SettingsError, match="prune takes settings of type PruneConfig, not str") as caught:
        llm_barber.prune("model")  # type: ignore[arg-type]
    assert caught.value.hint == "call prune(PruneConfig(model=…, output=…))"
    with pytest.raises(SettingsError, match="rebuild takes settings of type RebuildConfig, not PruneConfig"):
        llm_barber.rebuild(PruneConfig(**PRUNE))  # type: ignore[arg-type]


def test_a_traceback_shows_the_hint() -> None:
    with pytest.raises(SettingsError) as caught:
        PruneConfig(**PRUNE, samples=0)
    assert f"hint: {caught.value.hint}" in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("kind", [EvaluateConfig, CompareConfig])
def test_a_limit_needs_tasks(kind: type[Settings]) -> None:
    given: dict[str, Any] = {"model": "m"} if kind is EvaluateConfig else dict(PRUNE)
    assert "limit needs tasks or tasks_folder" in error_of(kind, **given, limit=5)
    kind(**given, limit=5, tasks=("boolq",))


@pytest.mark.parametrize("name", ["model", "output"])
def test_paths_that_no_record_can_name_are_refused(tmp_path: Path, name: str) -> None:
    odd = os.fsdecode(bytes(tmp_path) + b"/\xff")
    assert f"{name}: is not valid UTF-8" in error_of(PruneConfig, **PRUNE | {name: odd})


def test_a_current_folder_that_no_record_can_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = Path(os.fsdecode(bytes(tmp_path) + b"/\xff"))
    odd.mkdir()
    monkeypatch.chdir(odd)
    assert "lies in a folder whose name is not valid UTF-8" in error_of(PruneConfig, **PRUNE)
