import csv
import io
import math
import random
from statistics import fmean

import pytest
from pydantic import ValidationError

from llm_barber.comparison.paired import Difference, answers, beyond_chance, paired_differences
from llm_barber.comparison.result import Comparison
from llm_barber.comparison.tables import tables_by_target
from llm_barber.comparison.written import comma_separated, markdown
from llm_barber.evaluation.result import TaskResult
from llm_barber.settings.compare import CompareRow
from tests.helpers.comparisons import make_cell, make_comparison, make_evaluation


def compared() -> Comparison:
    """Wanda (two seeds), magnitude and the dense model on the same four and two examples."""
    cells = (
        make_cell(CompareRow.WANDA, False, "0.5", 0, 20.0, accuracy=0.5, right=("1100", "10")),
        make_cell(CompareRow.WANDA, False, "0.5", 1, 20.0, accuracy=0.5, right=("1000", "10")),
        make_cell(CompareRow.WANDA, False, "0.5", 2, 20.0),
        make_cell(CompareRow.MAGNITUDE, False, "0.5", 0, 50.0, accuracy=0.3, right=("0000", "10")),
        make_cell(CompareRow.RIA, False, "0.5", 0, 50.0, accuracy=0.3),
    )
    dense = make_evaluation(10.0, 0.6, ("1110", "11"))
    return make_comparison().model_copy(update={"cells": cells, "dense": dense})


def test_differences_by_hand() -> None:
    rows = {"dense": {"easy": [1, 1, 1, 0], "hard": [1, 1]}, "pruned": {"easy": [1, 0.5, 0, 0], "hard": [1, 0]}}
    ((pair, difference),) = paired_differences(rows).items()
    assert pair == ("pruned", "dense")
    # easy: 0, -0.5, -1, 0, mean -0.375, squared deviations 0.140625 + 0.015625 + 0.390625 + 0.140625 = 0.6875,
    # variance of the mean 0.6875 / 3 / 4; hard: 0, -1, mean -0.5, variance of the mean 0.5 / 2.
    assert difference.mean == pytest.approx(-0.4375)
    assert difference.standard_error == pytest.approx(math.sqrt(0.6875 / 12 + 0.25) / 2)


def test_standard_error_is_the_spread_of_the_mean() -> None:
    """Two models that differ on known shares of the examples, drawn anew again and again."""
    draws = random.Random(0)
    found, errors = [], []
    for _ in range(2000):
        one, two = {}, {}
        for task, count, chance in (("a", 40, 0.8), ("b", 90, 0.4)):
            one[task] = [float(draws.random() < chance) for _ in range(count)]
            two[task] = [value if draws.random() < 0.7 else 1 - value for value in one[task]]
        (difference,) = paired_differences({"one": one, "two": two}).values()
        found.append(difference.mean)
        errors.append(difference.standard_error)
    spread = math.sqrt(fmean((value - fmean(found)) ** 2 for value in found))
    assert fmean(errors) == pytest.approx(spread, rel=0.05)


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
    assert beyond_chance({("a", "b"): Difference(0.0, 0.0)}) == set()
    assert beyond_chance({("a", "b"): Difference(0.1, 0.0)}) == set()


def test_answers_are_means_over_the_seeds_that_have_tasks() -> None:
    first, second = make_evaluation(1.0, 0.5, ("1100", "10")), make_evaluation(1.0, 0.5, ("1000", "11"))
    without, earlier = make_evaluation(1.0, None), make_evaluation(1.0, 0.5)
    assert answers([first, without, second]) == {"easy": [1, 0.5, 0, 0], "hard": [1, 0.5]}
    assert answers([without]) is answers([first, earlier]) is answers([]) is None


def test_tables_and_files_have_the_triangle() -> None:
    assert "Without differences on tasks: RIA. Their cells" in markdown(compared())
    (table,) = tables_by_target(compared())
    assert table.paired is not None
    assert table.paired.headings == ("dense", "Wanda")
    wanda, magnitude = table.paired.rows
    # Wanda: easy 1, 0.5, 0, 0 and hard 1, 0, as above; magnitude: none, and hard 1, 0.
    assert wanda.cells == (f"-43.8 ± {196 * math.sqrt(0.6875 / 12 + 0.25) / 2:.1f}", "")
    assert (wanda.title, magnitude.title) == ("Wanda", "magnitude")
    assert magnitude.cells[1].startswith("-18.8 ± ")
    assert "| row − column | dense | Wanda |" in markdown(compared())
    lines = [line for line in csv.DictReader(io.StringIO(comma_separated(compared()))) if "less" in line["metric"]]
    assert [(line["method"], line["metric"]) for line in lines] == [
        ("wanda", "acc_less_dense"),
        ("magnitude", "acc_less_dense"),
        ("magnitude", "acc_less_wanda"),
    ]
    assert float(lines[0]["value"]) == pytest.approx(-0.4375)


def test_without_answers_by_example_there_is_no_triangle() -> None:
    assert [table.paired for table in tables_by_target(make_comparison())] == [None, None]
    assert "row − column" not in markdown(make_comparison())
    assert "Without differences" not in markdown(make_comparison())


def test_a_task_whose_accuracy_is_a_probability_does_not_count() -> None:
    """The dense model has no answers to it, right or wrong; the other task's differences stay."""
    cells = (make_cell(CompareRow.WANDA, False, "0.5", 0, 20.0, accuracy=0.5, right=("1100", None)),)
    dense = make_evaluation(10.0, 0.6, ("1110", None))
    comparison = make_comparison().model_copy(update={"cells": cells, "dense": dense})
    (table,) = tables_by_target(comparison)
    assert table.paired is not None
    assert table.paired.rows[0].cells[0].startswith("-25.0 ± ")
    assert "No differences paired by example on: hard. " in markdown(comparison)
    assert "No differences paired by example" not in markdown(compared())


@pytest.mark.parametrize("digits", ["012", "1 0", ""])
def test_damaged_answers_are_refused(digits: str) -> None:
    with pytest.raises(ValidationError):
        make_evaluation(1.0, 0.5, (digits, "10"))
    task = make_evaluation(1.0, 0.5, ("11", "10")).tasks[0].model_dump()
    with pytest.raises(ValidationError, match="right has 2 digits for 3 examples"):
        TaskResult.model_validate({**task, "examples": 3})
