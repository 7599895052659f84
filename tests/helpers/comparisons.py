"""A comparison with invented results."""

from typing import Any

from llm_barber.comparison.result import CellResult, Comparison, ComparisonCell
from llm_barber.evaluation.result import Evaluation
from llm_barber.settings.compare import CompareRow


def make_evaluation(
    perplexity: float, accuracy: float | None, right: tuple[str | None, str | None] = (None, None)
) -> Evaluation:
    """An evaluation on one text and, where an accuracy is given, two tasks (the second half as accurate).

    `right`: the digits of both tasks.
    """
    other = {"perplexity": 10.0, "perplexity_ratio": perplexity / 10, "divergence": 0.5, "top_agreement": 0.75}
    text = {
        "text": "wikitext2", "perplexity": perplexity, "windows": 4, "seqlen": 8, "begins_with_bos": False,
        "sha256": "ab" * 32, "against": other,
    }  # fmt: skip
    tasks = [
        {
            "task": name, "metric": "acc", "value": value, "standard_error": 0.01,
            "examples": len(digits or "-" * 100), "shots": 0, "source": "x.jsonl", "sha256": None, "against": None,
            "right": digits,
        }
        for name, value, digits in (("easy", accuracy, right[0]), ("hard", (accuracy or 0) / 2, right[1]))
        if accuracy is not None
    ]  # fmt: skip
    return Evaluation.model_validate(
        {"model": "m", "against": "d", "device": "cpu", "dtype": "float32", "versions": {}, "texts": [text],
         "tasks": tasks}
    )  # fmt: skip


def make_cell(
    method: CompareRow, rebuilt: bool, target: str, seed: int, perplexity: float | None, **changes: Any
) -> ComparisonCell:
    """A cell of the comparison; a perplexity of None: it has no result."""
    result = None
    if perplexity is not None:
        result = CellResult(
            name="n", key={}, sparsity=0.5, swapped=3 * rebuilt, granularity="block" if rebuilt else None,
            rebuild_ratio=0.1 if rebuilt else None, errors={}, seconds=2.0 + seed, peak_memory=2**30,
            peak_device_memory=None, machine=changes.get("machine"),
            evaluation=make_evaluation(perplexity, changes.get("accuracy"), changes.get("right", (None, None))),
        )  # fmt: skip
    return ComparisonCell(
        method=method, rebuilt=rebuilt, target=target, seed=seed, result=result, failure=changes.get("failure")
    )


def make_comparison() -> Comparison:
    """A comparison with three seeds, a method without a rebuild, and a failure."""
    return Comparison(
        model="model",
        settings={"seeds": [0, 1, 2], "calibration": "c4", "samples": 8, "seqlen": 16, "task_seeds": 1},
        device="cpu",
        dtype="float32",
        versions={"torch": "2.6"},
        dense=make_evaluation(10.0, 0.6),
        cells=(
            make_cell(CompareRow.WANDA, False, "0.5", 0, 20.0, accuracy=0.5),
            make_cell(CompareRow.WANDA, False, "0.5", 1, 22.0),
            make_cell(CompareRow.WANDA, False, "0.5", 2, 27.0),
            make_cell(CompareRow.WANDA, True, "0.5", 0, 18.0, accuracy=0.4),
            make_cell(CompareRow.MAGNITUDE, False, "0.5", 0, 50.0),
            make_cell(CompareRow.WANDA, False, "2:4", 0, None, failure="it broke"),
        ),
    )
