"""Tables, differences on tasks, notes, plot and page of a comparison with invented results."""

import csv
import io
import math
import random
from statistics import fmean

import pytest
from pydantic import ValidationError

from llm_barber.comparison.page import comparison_page, comparison_picture
from llm_barber.comparison.paired import Difference, answers, beyond_chance, paired_differences
from llm_barber.comparison.result import Comparison
from llm_barber.comparison.tables import TITLES, tables_by_target
from llm_barber.comparison.written import comma_separated, markdown, notes
from llm_barber.evaluation.result import TaskResult
from llm_barber.settings.compare import CompareRow
from tests.helpers.comparisons import make_cell, make_comparison, make_evaluation


def page(comparison: Comparison) -> str:
    return comparison_page(comparison, tables_by_target(comparison), notes(comparison))


def test_means_spreads_and_bests() -> None:
    assert set(TITLES) == set(CompareRow)
    first, second = tables_by_target(make_comparison())
    assert (first.title, second.title, first.paired) == ("50 %", "2:4", None)
    dense, wanda, rebuilt, magnitude = first.rows
    # perplexity, KL, easy, hard, mean of both, seconds, memory
    assert dense.cells == ("10.00", "0.500", "60.0", "30.0", "45.0", "–", "–")
    # 20, 22, 27: mean 23, squared deviations 9 + 1 + 16 over 2, root 3.606
    assert wanda.cells[:3] == ("23.00 ± 3.61", "0.500 ± 0.000", "50.0")
    assert wanda.cells[4:] == ("37.5", "3.0 ± 1.0", "1.00 ± 0.00")
    assert rebuilt.title == "Wanda + rebuild"
    assert (wanda.best[0], rebuilt.best[0], magnitude.best[0]) == (False, True, False)
    assert (wanda.best[2], rebuilt.best[2]) == (True, False)
    assert magnitude.cells[2] == "–"
    assert second.rows[1].cells[0] == "–"


def test_files() -> None:
    text = markdown(make_comparison())
    assert "| Wanda + rebuild | **18.00** |" in text
    assert "row − column" not in text
    for note in (
        "Not done: Wanda at 2:4, seed 0: it broke.",
        "Rebuild: Wanda: within each block, ratio 0.1.",
        "Machine: not noted.",
        "Tasks: calibration seed 0 only.",
    ):
        assert f"- {note}" in text
        assert note in page(make_comparison())
    assert "(mean ± sample standard deviation over seeds)." in notes(make_comparison())[1]
    lines = list(csv.DictReader(io.StringIO(comma_separated(make_comparison()))))
    perplexity = [float(line["value"]) for line in lines if line["metric"] == "perplexity"]
    assert perplexity == [10.0, 20.0, 22.0, 27.0, 18.0, 50.0]
    assert {line["method"] for line in lines} == {"dense", "wanda", "magnitude"}


def test_the_page_has_the_tables_numbers_and_a_plot() -> None:
    shown = page(make_comparison().model_copy(update={"model": "/models/<b>long</b>"}))
    assert "<b>18.00</b>" in shown
    assert "23.00 ± 3.61" in shown
    assert "<b>long" not in shown
    assert shown.count("<img alt=") == 1
    empty = make_comparison().model_copy(update={"cells": ()})
    assert comparison_picture(empty) is None
    assert "<img" not in page(empty)


def test_a_perplexity_far_beyond_dense_does_not_stretch_the_axis() -> None:
    rows = ((CompareRow.WANDA, "0.5", 30.0), (CompareRow.RIA, "0.5", 8e6), (CompareRow.RIA, "2:4", 500.0))
    cells = tuple(make_cell(method, False, target, 0, value) for method, target, value in rows)
    drawn = comparison_picture(make_comparison().model_copy(update={"cells": cells}))
    assert drawn is not None
    assert all(f">{words}<" in drawn for words in ("50 %", "2:4", "Wanda", "RIA", "dense", "500"))
    assert "triangles: beyond the axis" in drawn
    assert "1e+0" not in drawn


def compared(hard: str | None = "11") -> Comparison:
    """Wanda (two seeds), magnitude and the dense model on the same four and two examples."""
    cells = (
        make_cell(CompareRow.WANDA, False, "0.5", 0, 20.0, accuracy=0.5, right=("1100", hard and "10")),
        make_cell(CompareRow.WANDA, False, "0.5", 1, 20.0, accuracy=0.5, right=("1000", hard and "10"), machine="box"),
        make_cell(CompareRow.WANDA, False, "0.5", 2, 20.0),
        make_cell(CompareRow.MAGNITUDE, False, "0.5", 0, 50.0, accuracy=0.3, right=("0000", hard and "10")),
        make_cell(CompareRow.RIA, False, "0.5", 0, 50.0),
    )
    return make_comparison().model_copy(update={"cells": cells, "dense": make_evaluation(10.0, 0.6, ("1110", hard))})


def test_differences_on_tasks() -> None:
    (table,) = tables_by_target(compared())
    assert table.paired is not None
    assert table.paired.headings == ("dense", "Wanda")
    wanda, magnitude = table.paired.rows
    # Wanda: easy 1, 0.5, 0, 0 less 1, 1, 1, 0: 0, -0.5, -1, 0, mean -0.375, squared deviations 0.6875, variance of the
    # mean 0.6875 / 3 / 4; hard 1, 0 less 1, 1: 0, -1, mean -0.5, variance of the mean 0.5 / 2.
    assert wanda.cells == (f"-43.8 ± {196 * math.sqrt(0.6875 / 12 + 0.25) / 2:.1f}", "")
    assert (wanda.title, magnitude.title) == ("Wanda", "magnitude")
    assert magnitude.cells[1].startswith("-18.8 ± ")
    assert "| row − column | dense | Wanda |" in markdown(compared())
    assert "- Machines: not noted; box." in markdown(compared())
    assert "No differences paired by example" not in markdown(compared())


def test_a_task_whose_accuracy_is_a_probability_does_not_count() -> None:
    """The dense model has no answers to it, right or wrong; the other task's differences stay."""
    (table,) = tables_by_target(compared(hard=None))
    assert table.paired is not None
    assert table.paired.rows[0].cells[0].startswith("-37.5 ± ")
    assert "No differences paired by example on: hard. " in markdown(compared(hard=None))
    assert answers([make_evaluation(1.0, None), make_evaluation(1.0, 0.5)]) == {}


def test_standard_error_is_the_spread_of_the_mean() -> None:
    """Two models that differ on known shares of the examples, drawn anew again and again."""
    draws = random.Random(0)
    differences = []
    for _ in range(2000):
        one, two = {}, {}
        for task, count, chance in (("a", 40, 0.8), ("b", 90, 0.4)):
            one[task] = [float(draws.random() < chance) for _ in range(count)]
            two[task] = [value if draws.random() < 0.7 else 1 - value for value in one[task]]
        differences += paired_differences({"one": one, "two": two}).values()
    mean = fmean(difference.mean for difference in differences)
    spread = math.sqrt(fmean((difference.mean - mean) ** 2 for difference in differences))
    assert fmean(difference.standard_error for difference in differences) == pytest.approx(spread, rel=0.05)


def test_holm_rejects_from_the_smallest_on() -> None:
    def at(probability: float) -> Difference:
        low, high = 0.0, 10.0  # the mean in standard errors, by bisection
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if Difference(middle, 1.0).probability > probability else (low, middle)
        return Difference(low, 1.0)

    assert Difference(1.96, 1.0).probability == pytest.approx(0.05, rel=1e-3)
    # Against 0.05 / 4, 0.05 / 3, 0.05 / 2: the third is larger, and stops the fourth.
    chosen = beyond_chance({("a", "b"): at(0.012), ("c", "b"): at(0.016), ("d", "b"): at(0.026), ("e", "b"): at(0.04)})
    assert chosen == {("a", "b"), ("c", "b")}
    assert beyond_chance({("a", "b"): Difference(0.0, 0.0), ("c", "b"): Difference(0.1, 0.0)}) == set()


@pytest.mark.parametrize("digits", ["012", "1 0", ""])
def test_damaged_answers_are_refused(digits: str) -> None:
    with pytest.raises(ValidationError):
        make_evaluation(1.0, 0.5, (digits, "10"))
    task = make_evaluation(1.0, 0.5, ("11", "10")).tasks[0].model_dump()
    with pytest.raises(ValidationError, match="right has 2 digits for 3 examples"):
        TaskResult.model_validate({**task, "examples": 3})
