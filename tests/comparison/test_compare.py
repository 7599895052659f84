"""Comparisons: cells are what prune and evaluate give, are kept, and are done again only if something changed."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import llm_barber.comparison.compare as module
from llm_barber import CompareConfig, Comparison, EvaluateConfig, PruneConfig, compare, evaluate, prune
from llm_barber.checkpoint.folder import claim_folder, locked
from llm_barber.comparison.compare import MARKER
from llm_barber.errors import CalibrationError, ModelError, OutputError, SettingsError
from llm_barber.masking.granularity import Granularity
from llm_barber.run import stream
from llm_barber.settings.compare import CompareRow
from llm_barber.usage import machine
from tests.conftest import Listener, change_json, make_model, save_tokens
from tests.helpers.tasks import QUESTIONS
from tests.helpers.text import add_tokenizer

SMALL: dict[str, Any] = {"methods": ("wanda",), "targets": ("0.5",), "seeds": (0,), "rebuild": False}


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    model = make_model(tmp_path / "model", "llama")
    add_tokenizer(model)
    (tmp_path / "text.txt").write_text("".join(chr(33 + (7 * i * i + i) % 90) for i in range(400)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    return {
        "model": model,
        "output": tmp_path / "out",
        "methods": ("magnitude", "wanda"),
        "targets": ("0.5", "2:4"),
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

    def __init__(self) -> None:
        self.calls = 0
        self.stop_at: int | None = None

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        return prune(*arguments)


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    counter = Counter()
    monkeypatch.setattr(module, "prune", counter)
    return counter


def numbers(comparison: Comparison) -> list[Any]:
    """Everything but times and memory."""
    return [
        (cell.method, cell.rebuilt, cell.target, cell.seed, cell.result and cell.result.evaluation)
        for cell in comparison.cells
    ]


def test_cells_are_what_prune_and_evaluate_give(settings: dict[str, Any], tmp_path: Path, counter: Counter) -> None:
    rows = {"methods": ("magnitude", "wanda", "mask"), "rebuild_settings": {CompareRow.WANDA: (Granularity.BLOCK, 0.5)}}
    comparison = compare(CompareConfig(**settings | rows))
    # Two targets; for seed 0 three rows, two of them rebuilt, too; magnitude without rebuild only for that seed.
    assert len(comparison.cells) == counter.calls == 2 * (5 + 4)
    assert comparison.failures == []
    cells = {(cell.method, cell.rebuilt, cell.target, cell.seed): cell.result for cell in comparison.cells}
    rebuilt = {"initial": "wanda", "granularity": "block", "rebuild_ratio": 0.5}
    for row, by_hand in (((CompareRow.WANDA, True), rebuilt), ((CompareRow.MASK, False), {"preset": "mask"})):
        for target, amount in (("0.5", {"sparsity": 0.5}), ("2:4", {"pattern": "2:4"})):
            report = prune(
                PruneConfig(
                    model=settings["model"], output=tmp_path / "by-hand", overwrite=True, dtype="float32", seed=1,
                    calibration=settings["calibration"], samples=3, seqlen=24, **amount, **by_hand,
                )
            )  # fmt: skip
            measured = evaluate(
                EvaluateConfig(model=report.output, against=settings["model"], text=settings["text"], windows=4,
                               seqlen=24, dtype="float32")
            )  # fmt: skip
            cell = cells[*row, target, 1]
            assert cell is not None
            assert cell.evaluation.texts == measured.texts
            assert (cell.sparsity, cell.swapped, cell.granularity, cell.machine) == (
                report.sparsity, report.swapped, report.granularity, machine(),
            )  # fmt: skip
    for (_, _, _, seed), cell in cells.items():
        assert cell is not None
        assert [task.task for task in cell.evaluation.tasks] == (["questions"] * 2 if seed == 0 else [])
    dense = comparison.dense.texts[0]
    assert dense.against is not None
    assert dense.against.divergence == 0
    folder = settings["output"]
    assert Comparison.model_validate_json((folder / "comparison.json").read_text()) == comparison
    lines = list(csv.DictReader((folder / "comparison.csv").open()))
    perplexities = [float(line["value"]) for line in lines if line["metric"] == "perplexity"]
    expected = [cell.evaluation.texts[0].perplexity for cell in cells.values() if cell is not None]
    assert perplexities == [dense.perplexity, *expected]
    assert "<svg" in (folder / "comparison.svg").read_text()
    assert "<!DOCTYPE html>" in (folder / "comparison.html").read_text()
    assert not (folder / "work").exists()


def test_an_interrupted_comparison_goes_on(
    settings: dict[str, Any], tmp_path: Path, counter: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = settings | {"targets": ("0.5",)}
    uninterrupted = compare(CompareConfig(**few | {"output": tmp_path / "uninterrupted"}))
    config, total = CompareConfig(**few), counter.calls
    counter.stop_at = total + 4
    with pytest.raises(KeyboardInterrupt):
        compare(config)
    assert "magnitude" in (config.output / "comparison.md").read_text()  # the cells that were finished
    counter.calls = 0
    assert numbers(compare(config)) == numbers(uninterrupted)
    assert counter.calls == total - 3
    monkeypatch.setattr(module, "Evaluator", None)  # not even the texts are read
    listener = Listener()
    assert numbers(compare(config, listener)) == numbers(uninterrupted)
    assert (counter.calls, listener.warnings) == (total - 3, [])


def test_an_interrupted_cell_goes_on_after_its_last_layer(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cell of a large model takes hours: what a killed comparison leaves of it is gone on with, or made again."""
    small = settings | SMALL
    expected = numbers(compare(CompareConfig(**small | {"output": tmp_path / "uninterrupted"})))
    config = CompareConfig(**small)
    layers: list[int] = []
    prune_layer = stream.prune_layer

    def stopping(job: Any, index: int, *arguments: Any) -> Any:
        layers.append(index)
        if index == 1 and layers.count(1) == 1:
            raise KeyboardInterrupt
        return prune_layer(job, index, *arguments)

    monkeypatch.setattr(stream, "prune_layer", stopping)
    for damaged, expected_layers in ((False, [0, 1, 1]), (True, [0, 1, 0, 1])):
        layers.clear()
        with pytest.raises(KeyboardInterrupt):
            compare(config)
        (partial,) = (config.output / "work").iterdir()
        (partial.parent / "of-another-cell.partial").mkdir()
        if damaged:
            change_json(partial / "state.json", key={})
            (partial / "state-before.json").unlink(missing_ok=True)
        assert numbers(compare(config)) == expected
        assert layers == expected_layers
        assert not partial.parent.exists()
        shutil.rmtree(config.output / "cells")


def test_a_cell_is_computed_again_if_anything_it_depends_on_changed(settings: dict[str, Any], counter: Counter) -> None:
    def done(**changes: Any) -> int:
        before = counter.calls
        compare(CompareConfig(**settings | SMALL | changes))
        return counter.calls - before

    assert (done(), done()) == (1, 0)
    assert [done(samples=2), done(text_seqlen=20), done(seeds=(5,)), done(limit=3), done(bos=False)] == [1] * 5
    assert done(layers="model.layers") == 1
    assert done() == 0
    (cell,) = (settings["output"] / "cells").glob("wanda-0.5-seed5*")
    cell.write_text(cell.read_text()[:-100])
    assert done(seeds=(5,)) == 1  # damaged
    text = Path(settings["calibration"])
    text.write_text(text.read_text()[:200] + "!" + text.read_text()[201:])
    assert done() == 1
    weights = settings["model"] / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-4] ^= 1  # one bit, in the last weight
    weights.write_bytes(content)
    assert done() == 1


@pytest.mark.parametrize("bos", [True, False])
def test_windows_begin_with_bos_where_texts_do_and_models_are_kept(
    settings: dict[str, Any], counter: Counter, bos: bool
) -> None:
    add_tokenizer(settings["model"], bos=True)
    for keeps in (False, True, True):  # a model that was not kept is made again
        comparison = compare(CompareConfig(**settings | SMALL | {"bos": bos, "keep_models": keeps}))
    assert counter.calls == 2
    assert comparison.dense.texts[0].begins_with_bos is bos
    (record,) = (settings["output"] / "models").glob("wanda-0.5-seed0-*/barber.json")
    content = json.loads(record.read_text())
    assert content["settings"]["bos"] is bos
    assert content["calibration"]["first_token"] == (94 if bos else None)


def test_stopped_before_its_first_cell_it_leaves_older_tables(settings: dict[str, Any], counter: Counter) -> None:
    small = settings | SMALL
    compare(CompareConfig(**small))
    before = (settings["output"] / "comparison.md").read_text()
    counter.stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        compare(CompareConfig(**small | {"samples": 2}))
    (settings["output"] / "short.txt").write_text("too short")
    with pytest.raises(CalibrationError, match="has 9 tokens"):
        compare(CompareConfig(**small | {"calibration": str(settings["output"] / "short.txt")}))
    assert (settings["output"] / "comparison.md").read_text() == before
    counter.stop_at = counter.calls + 1
    with pytest.raises(KeyboardInterrupt):
        compare(CompareConfig(**small | {"methods": ("ria", "wanda")}))
    assert (settings["output"] / "comparison.md").read_text() == before  # all that is measured


def test_a_cell_that_fails_is_named_and_others_go_on(settings: dict[str, Any]) -> None:
    listener = Listener()
    compare(CompareConfig(**settings | SMALL), listener)
    comparison = compare(CompareConfig(**settings | SMALL | {"targets": ("0.6", "3:7")}), listener)
    (failure,) = comparison.failures
    assert (failure.method, failure.target) == (CompareRow.WANDA, "3:7")
    assert "does not divide" in str(failure.failure)
    assert "--allow-dense-tail" in str(failure.hint)
    assert "Not done: Wanda at 3:7, seed 0: pattern 3:7" in (settings["output"] / "comparison.md").read_text()
    assert f"{settings['output']} keeps cells of other calls, too (1)" in listener.warnings[-1]


def test_every_row_can_be_compared(settings: dict[str, Any]) -> None:
    """A method that spreads sparsity as the presets do has no row of N:M."""
    comparison = compare(CompareConfig(**settings | {"methods": tuple(CompareRow), "seeds": (0,), "rebuild": False}))
    assert not comparison.failures
    results = {(cell.method, cell.target): cell.result for cell in comparison.cells}
    spread = {row for row in CompareRow if row.allocated}
    assert results.keys() == {(row, "0.5") for row in CompareRow} | {(row, "2:4") for row in set(CompareRow) - spread}
    plain, allocated = results[CompareRow.ALPS, "0.5"], results[CompareRow.ALPS_ALLOCATED, "0.5"]
    published = results[CompareRow.PAPER, "0.5"]
    assert plain is not None
    assert allocated is not None
    assert published is not None
    assert allocated.sparsity == pytest.approx(plain.sparsity, abs=1e-3)
    assert allocated.evaluation.texts[0].perplexity != plain.evaluation.texts[0].perplexity
    assert (published.granularity, published.rebuild_ratio) == ("output", 0.01)
    with pytest.raises(SettingsError, match="alps-allocated: N:M cannot be spread"):
        CompareConfig(**settings | {"methods": ("alps-allocated",), "targets": ("2:4",)})


def test_a_file_of_tokens_is_taken_as_it_is(settings: dict[str, Any], tmp_path: Path) -> None:
    tokens = {"calibration": str(save_tokens(tmp_path / "tokens.safetensors")), "samples": 128, "seqlen": 2048}
    comparison = compare(CompareConfig(**settings | SMALL | tokens))
    assert comparison.settings["samples"] < 128
    assert compare(CompareConfig(**settings | SMALL | tokens)).settings == comparison.settings  # with every cell kept
    with pytest.raises(SettingsError, match="give one seed"):
        CompareConfig(**settings | tokens | {"seeds": (0, 1)})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"targets": ("half",)}, SettingsError, "target 'half' is neither a sparsity"),
        ({"targets": ("1.5",)}, SettingsError, "1.5 is not between 0 and 1"),
        ({"methods": ("wands",)}, SettingsError, "--methods: 'wands' should be 'magnitude', "),
        ({"seeds": (-1,)}, SettingsError, "--seeds: -1 should be greater than or equal to 0"),
        ({"methods": ("mask", "paper"), "rebuild_ratio": 0.5}, SettingsError, "presets have their own"),
        ({"rebuild": False, "rebuild_ratio": 0.5}, SettingsError, "need the rebuild"),
        ({"text": ("nothing",)}, CalibrationError, "no such text"),
        ({"model": "/none"}, ModelError, "no such model"),
        ({"seqlen": 65}, CalibrationError, "beyond the model's 64 positions"),
        ({"text_seqlen": 65}, CalibrationError, "beyond the model's 64 positions"),
        ({"calibration": "long.safetensors", "seeds": (0,)}, CalibrationError, "beyond the model's 64 positions"),
        ({"layers": "nothing.there"}, SettingsError, "nothing.there is not the path of a list"),
    ],
)
def test_bad_input(
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tokens(tmp_path / "long.safetensors", tokens=65)
    with pytest.raises(error, match=message):
        compare(CompareConfig(**settings | changes))
    assert not list(settings["output"].glob("cells/*"))


def test_a_folder_of_others_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine").touch()
    with pytest.raises(OutputError, match=f"was not made by this command: it has no {MARKER}"):
        compare(CompareConfig(**settings | {"output": other}))
    claim_folder(settings["output"], MARKER, "")
    with locked(settings["output"] / MARKER), pytest.raises(OutputError, match="another run is writing"):
        compare(CompareConfig(**settings))
