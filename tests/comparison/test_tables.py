import csv
import io
from typing import Any

import pytest

from llm_barber.comparison.cells import CellResult
from llm_barber.comparison.compare import Comparison, ComparisonCell
from llm_barber.comparison.settings import Method
from llm_barber.comparison.tables import blocks, comma_separated, markdown, perplexities
from llm_barber.evaluation.evaluate import Evaluation


def make_evaluation(perplexity: float, accuracy: float | None) -> Evaluation:
    other = {"perplexity": 10.0, "perplexity_ratio": perplexity / 10, "divergence": 0.5, "top_agreement": 0.75}
    text = {
        "text": "wikitext2", "perplexity": perplexity, "windows": 4, "seqlen": 8, "begins_with_bos": False,
        "sha256": "ab" * 32, "against": other,
    }  # fmt: skip
    tasks = [
        {
            "task": name, "metric": "acc", "value": value, "standard_error": 0.01, "examples": 100, "shots": 0,
            "source": "x.jsonl", "sha256": None, "against": None,
        }
        for name, value in (("easy", accuracy), ("hard", (accuracy or 0) / 2))
        if accuracy is not None
    ]  # fmt: skip
    return Evaluation.model_validate(
        {"model": "m", "against": "d", "device": "cpu", "dtype": "float32", "versions": {}, "texts": [text],
         "tasks": tasks}
    )  # fmt: skip


def make_cell(
    method: Method, rebuilt: bool, target: str, seed: int, perplexity: float | None, **changes: Any
) -> ComparisonCell:
    result = None
    if perplexity is not None:
        result = CellResult(
            name="n", key={}, sparsity=0.5, swapped=3 * rebuilt, granularity="block" if rebuilt else None,
            rebuild_ratio=0.1 if rebuilt else None, errors={}, seconds=2.0 + seed, peak_memory=2**30,
            peak_device_memory=None, machine=changes.get("machine"),
            evaluation=make_evaluation(perplexity, changes.get("accuracy")),
        )  # fmt: skip
    return ComparisonCell(
        method=method, rebuilt=rebuilt, target=target, seed=seed, result=result, failure=changes.get("failure")
    )


def make_comparison() -> Comparison:
    return Comparison(
        model="model",
        settings={"seeds": [0, 1, 2], "calibration": "c4", "samples": 8, "seqlen": 16, "task_seeds": 1},
        device="cpu",
        dtype="float32",
        versions={"torch": "2.6"},
        dense=make_evaluation(10.0, 0.6),
        cells=(
            make_cell(Method.WANDA, False, "0.5", 0, 20.0, accuracy=0.5),
            make_cell(Method.WANDA, False, "0.5", 1, 22.0),
            make_cell(Method.WANDA, False, "0.5", 2, 27.0),
            make_cell(Method.WANDA, True, "0.5", 0, 18.0, accuracy=0.4),
            make_cell(Method.MAGNITUDE, False, "0.5", 0, 50.0),
            make_cell(Method.WANDA, False, "2:4", 0, None, failure="it broke"),
        ),
    )


def test_means_spreads_and_bests() -> None:
    first, second = blocks(make_comparison())
    assert (first.title, second.title) == ("50 %", "2:4")
    dense, wanda, rebuilt, magnitude = first.rows
    # perplexity, KL, easy, hard, mean of both, seconds, memory
    assert dense.cells == ("10.00", "0.500", "60.0", "30.0", "45.0", "–", "–")
    # 20, 22, 27: mean 23, squared deviations 9 + 1 + 16 over 2, root 3.606
    assert wanda.cells[:3] == ("23.00 ± 3.61", "0.500 ± 0.000", "50.0")
    assert wanda.cells[4:] == ("37.5", "3.0", "1.00")
    assert rebuilt.title == "Wanda + rebuild"
    assert (wanda.best[0], rebuilt.best[0], magnitude.best[0]) == (False, True, False)
    assert (wanda.best[2], rebuilt.best[2]) == (True, False)
    assert magnitude.cells[2] == "–"
    assert second.rows[1].cells[0] == "–"
    assert perplexities(make_comparison())[Method.WANDA, False] == {"0.5": pytest.approx(23.0)}


def test_markdown_and_notes() -> None:
    text = markdown(make_comparison())
    assert "| Wanda + rebuild | **18.00** |" in text
    assert "- Not done: Wanda at 2:4, seed 0: it broke." in text
    assert "- Rebuild: Wanda: within each block, ratio 0.1." in text
    assert "mean ± sample standard deviation over seeds" in text
    assert "- Machine: not noted." in text


def test_every_machine_is_named() -> None:
    cells = tuple(make_cell(Method.WANDA, False, "0.5", seed, 20.0, machine=f"box {seed // 2}") for seed in range(4))
    assert "- Machines: box 0; box 1." in markdown(make_comparison().model_copy(update={"cells": cells}))


def test_comma_separated() -> None:
    lines = list(csv.DictReader(io.StringIO(comma_separated(make_comparison()))))
    perplexity = [float(line["value"]) for line in lines if line["metric"] == "perplexity"]
    assert perplexity == [10.0, 20.0, 22.0, 27.0, 18.0, 50.0]
    assert {line["method"] for line in lines} == {"dense", "wanda", "magnitude"}
