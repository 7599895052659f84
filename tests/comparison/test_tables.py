import csv
import io

import pytest

from llm_barber.comparison.tables import TITLES, perplexities, tables_by_target
from llm_barber.comparison.written import comma_separated, markdown
from llm_barber.settings.compare import CompareRow
from tests.helpers.comparisons import make_cell, make_comparison


def test_each_row_has_a_title() -> None:
    assert set(TITLES) == set(CompareRow)


def test_means_spreads_and_bests() -> None:
    first, second = tables_by_target(make_comparison())
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
    assert perplexities(make_comparison())[CompareRow.WANDA, False] == {"0.5": pytest.approx(23.0)}


def test_markdown_and_notes() -> None:
    text = markdown(make_comparison())
    assert "| Wanda + rebuild | **18.00** |" in text
    assert "- Not done: Wanda at 2:4, seed 0: it broke." in text
    assert "- Rebuild: Wanda: within each block, ratio 0.1." in text
    assert "mean ± sample standard deviation over seeds" in text
    assert "- Machine: not noted." in text


def test_every_machine_is_named() -> None:
    cells = tuple(
        make_cell(CompareRow.WANDA, False, "0.5", seed, 20.0, machine=f"box {seed // 2}") for seed in range(4)
    )
    assert "- Machines: box 0; box 1." in markdown(make_comparison().model_copy(update={"cells": cells}))


def test_comma_separated() -> None:
    lines = list(csv.DictReader(io.StringIO(comma_separated(make_comparison()))))
    perplexity = [float(line["value"]) for line in lines if line["metric"] == "perplexity"]
    assert perplexity == [10.0, 20.0, 22.0, 27.0, 18.0, 50.0]
    assert {line["method"] for line in lines} == {"dense", "wanda", "magnitude"}
