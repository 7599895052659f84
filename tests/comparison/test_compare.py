import csv
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import llm_barber.comparison.compare as module
from llm_barber import CompareConfig, Comparison, EvaluateConfig, PruneConfig, compare, evaluate, prune
from llm_barber.checkpoint.folder import claim_folder, locked
from llm_barber.comparison.compare import MARKER
from llm_barber.comparison.planned import cell_key, plan_cells
from llm_barber.errors import CalibrationError, ModelError, OutputError, SettingsError
from llm_barber.evaluation import harness
from llm_barber.evaluation.streamed import StreamedModel
from llm_barber.masking.granularity import Granularity
from llm_barber.progress import Silent
from llm_barber.run import stream
from llm_barber.settings.compare import CompareRow
from llm_barber.settings.initial import METHOD_FACTS, Initial
from llm_barber.settings.presets import REVISIONS, Preset
from llm_barber.usage import machine
from tests.conftest import Listener, change_json, make_model, save_tokens
from tests.helpers.tasks import QUESTIONS
from tests.helpers.text import add_tokenizer


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    model = make_model(tmp_path / "model", "llama")
    add_tokenizer(model)
    text = "".join(chr(33 + (7 * i * i + i) % 90) for i in range(400))
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    return {
        "model": model,
        "output": tmp_path / "out",
        "methods": ("magnitude", "wanda"),
        "targets": ("0.5", "2:4"),
        "rebuild_settings": {CompareRow.WANDA: (Granularity.BLOCK, 0.5)},
        "calibration": str(tmp_path / "text.txt"),
        "samples": 3,
        "seqlen": 24,
        "seeds": (0, 1),
        "text": (str(tmp_path / "text.txt"),),
        "windows": 4,
        "text_seqlen": 24,
        "tasks_folder": tmp_path / "tasks",
        "task_seeds": 1,
        "dtype": "float32",
    }


class Counter:
    """Counter of the calls of `prune` that stops at a chosen call."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.calls = 0
        self.stop_at = stop_at

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        return prune(*arguments)


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter]:
    counter = Counter()
    monkeypatch.setattr(module, "prune", counter)
    return counter


def numbers(comparison: Comparison) -> list[Any]:
    """Everything but times and memory."""
    return [
        (cell.method, cell.rebuilt, cell.target, cell.seed, cell.result and cell.result.evaluation)
        for cell in comparison.cells
    ]


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"seqlen": 65}, "give seqlen 64, or less"),
        ({"text_seqlen": 65}, "give text_seqlen 64, or less"),
        ({"calibration": "long.safetensors", "seeds": (0,)}, "make a file with windows of 64 tokens or less"),
    ],
)
def test_windows_beyond_the_positions_are_refused_at_once(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], hint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tokens(tmp_path / "long.safetensors", tokens=65)
    with pytest.raises(CalibrationError, match="beyond the model's 64 positions") as caught:
        compare(CompareConfig(**{**settings, **changes}))
    assert caught.value.hint == hint
    assert not (tmp_path / "out").exists()


def test_cells_are_what_prune_and_evaluate_give(settings: dict[str, Any], tmp_path: Path, counter: Counter) -> None:
    comparison = compare(CompareConfig(**settings))
    # Two targets; for seed 0 two methods, each twice; magnitude without rebuild only for that one.
    assert len(comparison.cells) == counter.calls == 2 * (4 + 3)
    assert comparison.failures == []
    cells = {(cell.method, cell.rebuilt, cell.target, cell.seed): cell.result for cell in comparison.cells}
    for target in ("0.5", "2:4"):
        target_settings = {"pattern": target} if ":" in target else {"sparsity": float(target)}
        by_hand = prune(
            PruneConfig(
                model=settings["model"], output=tmp_path / "by-hand", overwrite=True, granularity="block",
                rebuild_ratio=0.5, calibration=settings["calibration"], samples=3, seqlen=24, seed=1,
                dtype="float32", **target_settings,
            )
        )  # fmt: skip
        measured = evaluate(
            EvaluateConfig(model=by_hand.output, against=settings["model"], text=settings["text"], windows=4, seqlen=24,
                           dtype="float32")
        )  # fmt: skip
        cell = cells[CompareRow.WANDA, True, target, 1]
        assert cell is not None
        assert cell.evaluation.texts == measured.texts
        assert (cell.sparsity, cell.swapped, cell.granularity) == (by_hand.sparsity, by_hand.swapped, "block")
        assert cell.swapped > 0
    for (_, _, _, seed), cell in cells.items():
        assert cell is not None
        assert cell.machine == machine()
        assert [task.task for task in cell.evaluation.tasks] == (["questions"] * 2 if seed == 0 else [])
    assert comparison.dense.texts[0].against is not None
    assert comparison.dense.texts[0].against.divergence == 0
    lines = csv.DictReader((settings["output"] / "comparison.csv").open())
    pairs = [line for line in lines if "acc_less" in line["metric"]]
    assert len(pairs) == 2 * (4 * 5 // 2)  # at each target of the four rows and the dense model
    assert not (settings["output"] / "work").exists() or not any((settings["output"] / "work").iterdir())


def test_a_cell_measured_on_tasks_serves_without_them(settings: dict[str, Any], counter: Counter) -> None:
    small = {**settings, "methods": ("wanda",), "targets": ("0.5",)}
    alone = compare(CompareConfig(**{**small, "seeds": (1,)}))
    assert counter.calls == 2
    comparison = compare(CompareConfig(**small))
    assert counter.calls == 4
    before = {cell.rebuilt: cell.result for cell in alone.cells}
    for cell in comparison.cells:
        assert cell.result is not None
        assert bool(cell.result.evaluation.tasks) is (cell.seed == 0)
        if cell.seed == 1:
            with_tasks = before[cell.rebuilt]
            assert with_tasks is not None
            assert with_tasks.evaluation.tasks
            assert cell.result.evaluation.texts == with_tasks.evaluation.texts


def test_a_method_that_is_added_later_needs_no_dense_tasks(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dense model's answers are kept; differences are those of one comparison with both methods."""
    small = {name: value for name, value in settings.items() if name != "rebuild_settings"}
    small.update(targets=("0.5",), seeds=(0,), rebuild=False)
    both = compare(CompareConfig(**{**small, "output": settings["output"].with_name("both")}))
    compare(CompareConfig(**{**small, "methods": ("magnitude",)}))
    run_tasks, models = harness.run_tasks, []

    def noted(model: StreamedModel, *rest: Any) -> Any:
        models.append(model.source.folder.name)
        return run_tasks(model, *rest)

    monkeypatch.setattr(harness, "run_tasks", noted)
    later = compare(CompareConfig(**small))
    assert [name.split("-")[0] for name in models] == ["wanda"]
    assert numbers(later) == numbers(both)
    for cell, expected in zip(later.cells, both.cells, strict=True):
        assert cell.result is not None
        assert expected.result is not None
        assert cell.result.evaluation.tasks == expected.result.evaluation.tasks


def test_an_interrupted_comparison_goes_on(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CompareConfig(**settings)
    uninterrupted = compare(CompareConfig(**settings | {"output": tmp_path / "uninterrupted"}))
    stopped = Counter(stop_at=4)
    monkeypatch.setattr(module, "prune", stopped)
    with pytest.raises(KeyboardInterrupt):
        compare(config)
    assert "magnitude" in (config.output / "comparison.md").read_text()  # the cells that were finished
    rest = Counter()
    monkeypatch.setattr(module, "prune", rest)
    assert numbers(compare(config)) == numbers(uninterrupted)
    assert rest.calls == 14 - 3
    again = Counter()
    monkeypatch.setattr(module, "prune", again)
    monkeypatch.setattr(module, "Evaluator", None)  # not even the texts are read
    assert numbers(compare(config)) == numbers(uninterrupted)
    assert again.calls == 0


def test_an_interrupted_cell_goes_on_after_its_last_layer(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cell of a large model takes hours: what a killed comparison leaves of it is gone on with, or made again."""
    small = settings | {"methods": ("wanda",), "targets": ("0.5",), "seeds": (1,), "rebuild": False}
    small |= {"rebuild_settings": {}}
    expected = numbers(compare(CompareConfig(**small | {"output": tmp_path / "uninterrupted"})))
    config = CompareConfig(**small)
    layers: list[int] = []
    prune_layer = stream.prune_layer

    def stopping(job: Any, index: int, *arguments: Any) -> Any:
        if index == 1 and layers.count(1) == 0:
            layers.append(index)
            raise KeyboardInterrupt
        layers.append(index)
        return prune_layer(job, index, *arguments)

    monkeypatch.setattr(stream, "prune_layer", stopping)
    with pytest.raises(KeyboardInterrupt):
        compare(config)
    (partial,) = (config.output / "work").iterdir()
    (partial.parent / "of-another-cell.partial").mkdir()
    # A call without this cell leaves it, and says so.
    told = Listener()
    compare(CompareConfig(**small | {"methods": ("magnitude",)}), told)
    assert list(partial.parent.iterdir()) == [partial]
    (warning,) = (text for text in told.warnings if "begun" in text)
    assert partial.name.removesuffix(".partial") in warning
    shutil.rmtree(config.output / "cells")
    # Another cell that comes first leaves this one what it has.
    more = compare(CompareConfig(**small | {"methods": ("magnitude", "wanda")}))
    assert [cell for cell in numbers(more) if cell in expected] == expected
    assert layers == [0, 1, 0, 1, 0, 1, 1]
    assert not partial.parent.exists()

    layers.clear()
    shutil.rmtree(config.output / "cells")
    with pytest.raises(KeyboardInterrupt):
        compare(config)
    change_json(partial / "state.json", key={})
    (partial / "state-before.json").unlink(missing_ok=True)
    assert numbers(compare(config)) == expected
    assert layers == [0, 1, 0, 1]


def test_a_cell_is_computed_again_if_anything_it_depends_on_changed(settings: dict[str, Any], counter: Counter) -> None:
    small = settings | {
        "methods": ("wanda",),
        "targets": ("0.5",),
        "rebuild": False,
        "rebuild_settings": {},
        "seeds": (0,),
    }

    def done(**changes: Any) -> int:
        before = counter.calls
        compare(CompareConfig(**small | changes))
        return counter.calls - before

    assert done() == 1
    assert done() == 0
    assert [done(samples=2), done(text_seqlen=20), done(seeds=(5,)), done(limit=3)] == [1, 1, 1, 1]
    assert done() == 0
    (cell,) = (settings["output"] / "cells").glob("wanda-0.5-seed5*")
    cell.write_text(cell.read_text()[:-100])
    assert done(seeds=(5,)) == 1  # damaged
    text = Path(settings["calibration"])
    text.write_text(text.read_text()[:200] + "!" + text.read_text()[201:])
    assert done() == 1
    make_model(settings["model"], "llama", seed=3)
    assert done() == 1
    weights = settings["model"] / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-4] ^= 1  # one bit, in the last weight
    weights.write_bytes(content)
    assert done() == 1


def test_windows_begin_with_bos_where_texts_do(settings: dict[str, Any], counter: Counter) -> None:
    add_tokenizer(settings["model"], bos=True)
    small = settings | {"methods": ("wanda",), "targets": ("0.5",), "rebuild": False, "rebuild_settings": {}}
    for bos in (True, False):
        comparison = compare(CompareConfig(**small | {"seeds": (0,), "bos": bos, "keep_models": True}))
        assert comparison.dense.texts[0].begins_with_bos is bos
        (record,) = (settings["output"] / "models").glob("*/barber.json")
        content = json.loads(record.read_text())
        assert content["settings"]["bos"] is bos
        assert content["calibration"]["first_token"] == (94 if bos else None)
        record.unlink()
    assert counter.calls == 2
    assert len(list(settings["output"].glob("calibration-seed0-*"))) == 2


def test_stopped_before_its_first_cell_it_leaves_older_tables(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(CompareConfig(**settings))
    before = (settings["output"] / "comparison.md").read_text()
    monkeypatch.setattr(module, "prune", Counter(stop_at=1))
    with pytest.raises(KeyboardInterrupt):
        compare(CompareConfig(**settings | {"samples": 2}))
    assert (settings["output"] / "comparison.md").read_text() == before
    (settings["output"] / "short.txt").write_text("too short")
    with pytest.raises(CalibrationError, match="has 9 tokens"):
        compare(CompareConfig(**settings | {"calibration": str(settings["output"] / "short.txt")}))
    assert (settings["output"] / "comparison.md").read_text() == before
    assert len(list((settings["output"] / "cells").glob("dense-*"))) == 1  # reported before anything was measured


def test_stopped_before_a_new_cell_its_tables_have_all_that_is_measured(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = settings | {"targets": ("0.5",), "seeds": (0,), "rebuild": False, "rebuild_settings": {}}
    compare(CompareConfig(**small))
    monkeypatch.setattr(module, "prune", Counter(stop_at=1))
    with pytest.raises(KeyboardInterrupt):
        compare(CompareConfig(**small | {"methods": ("wanda", "ria", "magnitude")}))
    comparison = Comparison.model_validate_json((settings["output"] / "comparison.json").read_text())
    assert [cell.method for cell in comparison.cells] == [CompareRow.WANDA, CompareRow.MAGNITUDE]


def test_a_cell_that_fails_is_named_and_others_go_on(settings: dict[str, Any], counter: Counter) -> None:
    small = settings | {"rebuild": False, "rebuild_settings": {}, "seeds": (0,), "targets": ("0.5", "3:7")}
    comparison = compare(CompareConfig(**small))
    assert [(cell.method, cell.target) for cell in comparison.failures] == [
        (CompareRow.MAGNITUDE, "3:7"), (CompareRow.WANDA, "3:7"),
    ]  # fmt: skip
    assert "does not divide" in str(comparison.failures[0].failure)
    assert "--allow-dense-tail" in str(comparison.failures[0].hint)
    page = (settings["output"] / "comparison.md").read_text()
    assert "Not done: Wanda at 3:7, seed 0: pattern 3:7 does not divide" in page


def test_files(settings: dict[str, Any]) -> None:
    comparison = compare(CompareConfig(**settings))
    folder = settings["output"]
    assert Comparison.model_validate_json((folder / "comparison.json").read_text()) == comparison
    with (folder / "comparison.csv").open() as file:
        lines = list(csv.DictReader(file))
    perplexities = [
        float(line["value"])
        for line in lines
        if (line["method"], line["rebuilt"], line["target"], line["seed"], line["metric"])
        == ("wanda", "True", "2:4", "1", "perplexity")
    ]
    (expected,) = [
        cell.result.evaluation.texts[0].perplexity
        for cell in comparison.cells
        if cell.result and (cell.method, cell.rebuilt, cell.target, cell.seed) == (CompareRow.WANDA, True, "2:4", 1)
    ]
    assert perplexities == [expected]
    assert (folder / "comparison.svg").read_text().startswith("<svg")
    assert "<!DOCTYPE html>" in (folder / "comparison.html").read_text()


def test_cells_that_the_tables_leave_out_are_reported(settings: dict[str, Any]) -> None:
    small = settings | {"seeds": (0,), "targets": ("0.5",), "rebuild": False, "rebuild_settings": {}}
    listener = Listener()
    compare(CompareConfig(**small), listener)
    compare(CompareConfig(**small), listener)
    assert listener.warnings == []
    compare(CompareConfig(**small | {"methods": ("ria",)}), listener)
    assert [warning.partition(", and")[0] for warning in listener.warnings] == [
        f"{settings['output']} keeps cells of other calls, too (2)"
    ]
    assert "Wanda" not in (settings["output"] / "comparison.md").read_text()


def test_presets_are_default_rows_and_alps_is_not(settings: dict[str, Any]) -> None:
    small = settings | {"methods": ("alps", "mask", "best", "paper"), "seeds": (0,), "rebuild_settings": {}}
    comparison = compare(CompareConfig(**small))
    assert not comparison.failures
    rows = [(cell.method, cell.rebuilt) for cell in comparison.cells if cell.target == "0.5"]
    assert rows[:4] == [
        (CompareRow.ALPS, False),
        (CompareRow.ALPS, True),
        (CompareRow.MASK, False),
        (CompareRow.BEST, False),
    ]
    published = [cell.result for cell in comparison.cells if cell.method is CompareRow.PAPER]
    assert [(result.granularity, result.rebuild_ratio) for result in published if result] == [("output", 0.01)] * 2
    assert [cell.result.swapped > 0 for cell in comparison.cells if cell.method is CompareRow.MASK and cell.result] == [
        True
    ] * 2
    not_default = {
        CompareRow.ALPS,
        CompareRow.PAPER,
        CompareRow.SPARSEGPT_ALLOCATED,
        CompareRow.ALPS_ALLOCATED,
    }
    assert set(CompareRow) - set(CompareConfig(model="m", output="o").methods) == not_default


def test_allocated_rows_are_of_sparsities_only(settings: dict[str, Any]) -> None:
    small = settings | {"methods": ("alps", "alps-allocated"), "seeds": (0,), "rebuild": False, "rebuild_settings": {}}
    comparison = compare(CompareConfig(**small))
    assert not comparison.failures
    results = {(cell.method, cell.target): cell.result for cell in comparison.cells}
    assert results.keys() == {
        (CompareRow.ALPS, "0.5"),
        (CompareRow.ALPS, "2:4"),
        (CompareRow.ALPS_ALLOCATED, "0.5"),
    }
    plain, spread = results[CompareRow.ALPS, "0.5"], results[CompareRow.ALPS_ALLOCATED, "0.5"]
    assert plain is not None
    assert spread is not None
    assert spread.sparsity == pytest.approx(plain.sparsity, abs=1e-3)
    assert spread.evaluation.texts[0].perplexity != plain.evaluation.texts[0].perplexity
    with pytest.raises(SettingsError, match="alps-allocated: give a sparsity in targets"):
        CompareConfig(**small | {"methods": ("alps-allocated",), "targets": ("2:4",)})


class Stages(Silent):
    """Listener that keeps the stages that name cells."""

    def __init__(self) -> None:
        self.cells: list[str] = []

    def stage(self, title: str) -> None:
        if title.startswith("cell "):
            self.cells.append(title)


def test_the_eta_counts_no_stored_cells(
    settings: dict[str, Any], counter: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: 600.0 * counter.calls))  # 10 min a cell
    small = settings | {"targets": ("0.5",), "seeds": (0,), "rebuild": False, "rebuild_settings": {}}
    compare(CompareConfig(**small))  # magnitude and wanda
    listener = Stages()
    compare(CompareConfig(**small | {"methods": ("ria", "magnitude", "dsnot", "sparsegpt", "wanda")}), listener)
    assert listener.cells == [
        "cell 1 of 5: ria-0.5-seed0",
        "cell 3 of 5: dsnot-0.5-seed0, ETA 20 min",
        "cell 4 of 5: sparsegpt-0.5-seed0, ETA 10 min",
    ]


def test_keep_models(settings: dict[str, Any]) -> None:
    small = settings | {"methods": ("wanda",), "targets": ("0.5",), "seeds": (0,), "keep_models": True}
    compare(CompareConfig(**small))
    models = sorted((settings["output"] / "models").iterdir())
    assert [path.name.rpartition("-")[0] for path in models] == ["wanda-0.5-seed0", "wanda-rebuilt-0.5-seed0"]
    assert all((path / "model.safetensors.index.json").exists() for path in models)


def test_models_that_were_not_kept_are_made_again(settings: dict[str, Any], counter: Counter) -> None:
    small = settings | {"methods": ("wanda",), "targets": ("0.5",), "seeds": (0,), "rebuild": False}
    small["rebuild_settings"] = {}
    compare(CompareConfig(**small))
    compare(CompareConfig(**small, keep_models=True))
    compare(CompareConfig(**small, keep_models=True))
    assert counter.calls == 2
    assert len(list((settings["output"] / "models").iterdir())) == 1


def test_a_file_of_tokens_is_named_as_it_is(settings: dict[str, Any]) -> None:
    small = settings | {"methods": ("wanda",), "targets": ("0.5",), "seeds": (0,)}
    compare(CompareConfig(**small))
    (tokens,) = settings["output"].glob("calibration-*.safetensors")
    comparison = compare(CompareConfig(**small | {"calibration": str(tokens), "samples": 128, "seqlen": 2048}))
    assert (comparison.settings["samples"], comparison.settings["seqlen"]) == (3, 24)
    again = compare(CompareConfig(**small | {"calibration": str(tokens), "samples": 128, "seqlen": 2048}))
    assert again.settings == comparison.settings  # with every cell kept
    with pytest.raises(SettingsError, match="give one seed"):
        CompareConfig(**small | {"calibration": str(tokens), "seeds": (0, 1)})


def test_bad_input(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="target 'half' is neither a sparsity"):
        CompareConfig(**settings | {"targets": ("half",)})
    with pytest.raises(SettingsError, match="1.5 is not between 0 and 1"):
        CompareConfig(**settings | {"targets": ("1.5",)})
    with pytest.raises(SettingsError, match="methods.0: 'wands' is not one of magnitude, .*: did you mean wanda"):
        CompareConfig(**settings | {"methods": ("wands",)})
    with pytest.raises(SettingsError, match="seeds.0: -1 is too small: the least is 0"):
        CompareConfig(**settings | {"seeds": (-1,)})
    once = CompareConfig(**settings | {"targets": ("0.5", "0.50", "2:4"), "seeds": (0, 0), "methods": ("ria", "ria")})
    assert (once.targets, once.seeds, once.methods) == (("0.5", "2:4"), (0,), (CompareRow.RIA,))
    with pytest.raises(SettingsError, match="presets have their own"):
        CompareConfig(model="m", output="o", methods=("mask", "paper"), rebuild_ratio=0.5)
    with pytest.raises(SettingsError, match="need the rebuild"):
        CompareConfig(**settings | {"rebuild": False})
    with pytest.raises(CalibrationError, match="no such text"):
        compare(CompareConfig(**settings | {"text": ("nothing",)}))
    assert not settings["output"].exists()
    with pytest.raises(ModelError, match="no such model"):
        compare(CompareConfig(**settings | {"model": tmp_path / "none"}))
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine").touch()
    with pytest.raises(OutputError, match=f"was not made by this command: it has no {MARKER}"):
        compare(CompareConfig(**settings | {"output": other}))
    claim_folder(settings["output"], MARKER, "")
    with locked(settings["output"] / MARKER), pytest.raises(OutputError, match="another run is writing"):
        compare(CompareConfig(**settings))


def test_layers_and_blocks_that_the_user_names(settings: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "blocks.yaml"
    file.write_text("mlp: {output: mlp, linears: [mlp.down_proj]}")
    settings |= {"methods": ("wanda",), "targets": ("0.5",), "seeds": (0,), "rebuild_settings": {}}
    default = compare(CompareConfig(**settings)).cells[-1].result
    named = compare(CompareConfig(**settings, layers="model.layers", blocks=file)).cells[-1].result
    assert default is not None
    assert named is not None
    assert (set(default.errors), set(named.errors)) == ({"attention", "mlp"}, {"mlp"})
    assert named.evaluation.texts[0].perplexity != default.evaluation.texts[0].perplexity
    again = compare(CompareConfig(**settings)).cells[-1].result
    assert again == default
    with pytest.raises(SettingsError, match="nothing.there is not the path of a list"):
        compare(CompareConfig(**settings, layers="nothing.there"))


@pytest.mark.parametrize(
    ("method", "shape", "windows"),
    [("mask", (8, 512), 1), ("best", (31, 512), 1), ("best", (32, 512), None), ("paper", (8, 512), None)],
)
@pytest.mark.parametrize("in_a_file", [False, True])
def test_cells_of_little_text_are_those_of_its_windows_a_step(
    tmp_path: Path, method: str, shape: tuple[int, int], windows: int | None, in_a_file: bool
) -> None:
    """Those of more text stay as they were before the number of windows depended on the text."""
    text = {"samples": shape[0], "seqlen": shape[1]}
    if in_a_file:
        text = {"calibration": str(save_tokens(tmp_path / "tokens.safetensors", *shape))}
    config = CompareConfig(model="model", output=tmp_path / "out", methods=(method,), targets=("0.5",), **text)
    assert cell_key(config, next(plan_cells(config))).get("tune_windows") == windows


@pytest.mark.parametrize("row", ["sparsegpt", "sparsegpt-updates", "sparsegpt-allocated"])
def test_a_cell_depends_on_the_revision_of_its_method(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first revision has no part in the key: cells of before there were revisions count."""
    config = CompareConfig(model="model", output="out", methods=(row,), targets=("0.5",))
    (cell, *_) = plan_cells(config)
    before = cell_key(config, cell)
    facts = METHOD_FACTS[Initial.SPARSEGPT]
    assert facts.revision == 1
    monkeypatch.setitem(METHOD_FACTS, Initial.SPARSEGPT, replace(facts, revision=2))
    assert cell_key(config, cell) == before | {"initial_revision": 2}


def test_a_row_with_the_presets_allocation_depends_on_the_allocation_not_on_the_tuning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = ("mask", "alps", "alps-allocated")
    config = CompareConfig(model="model", output="out", methods=rows, targets=("0.5",), seeds=(0,), rebuild=False)

    def keys() -> dict[str, dict[str, object]]:
        return {cell.method.value: cell_key(config, cell) for cell in plan_cells(config)}

    before = keys()
    monkeypatch.setitem(REVISIONS, Preset.MASK, 100)
    assert keys() == before | {"mask": before["mask"] | {"revision": 100}}
    monkeypatch.setattr("llm_barber.comparison.planned.ALLOCATION_REVISION", 200)
    changed = keys()
    assert changed["alps-allocated"] == before["alps-allocated"] | {"revision": 200}
    assert changed["alps"] == before["alps"]
