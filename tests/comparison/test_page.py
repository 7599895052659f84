import re
import xml.etree.ElementTree
from pathlib import Path

import pytest

from llm_barber.comparison.page import comparison_page, comparison_picture
from llm_barber.comparison.result import Comparison
from llm_barber.settings.compare import CompareRow
from tests.helpers.comparisons import make_cell, make_comparison
from tests.page.browser import measure, needs_browser


def make_wide() -> Comparison:
    cells = tuple(
        make_cell(method, rebuilt, target, 0, 10.0 * (2 + number), accuracy=0.5)
        for number, method in enumerate(CompareRow)
        for rebuilt in (False, True)
        for target in ("0.5", "0.6", "0.7", "2:4", "4:8")
    )
    return make_comparison().model_copy(update={"cells": cells, "model": "/models/" + "<b>long</b>-name-" * 12})


def test_the_page_has_the_tables_numbers() -> None:
    page = comparison_page(make_comparison())
    assert "<b>18.00</b>" in page
    assert "23.00 ± 3.61" in page
    assert "Not done: Wanda at 2:4, seed 0: it broke." in page
    assert page == comparison_page(make_comparison())
    assert not re.search(r"<script|src=.http|<link[^>]*http", page)


def test_names_are_escaped() -> None:
    assert "<b>long" not in comparison_page(make_wide())


def test_the_picture_is_a_file_of_its_own() -> None:
    picture = comparison_picture(make_wide())
    assert picture is not None
    root = xml.etree.ElementTree.fromstring(picture)
    words = ["".join(element.itertext()) for element in root.iter() if element.tag.endswith("text")]
    assert {"50 %", "4:8", "Wanda + rebuild", "DSnoT on Wanda", "dense"} <= set(words)
    used = set(re.findall(r"var\((--[\w-]+)\)", picture))
    defined = set(re.findall(r"(--[\w-]+):", picture))
    assert used <= defined
    empty = make_comparison().model_copy(update={"cells": ()})
    assert comparison_picture(empty) is None
    assert "<svg" not in comparison_page(empty)


def test_every_method_of_the_key_has_a_colour_of_its_own_in_both_schemes() -> None:
    page = comparison_page(make_wide())
    key = page[page.index('class="key"') :]
    used = re.findall(r'<i style="border-color: var\((--[\w-]+)\)">', key[: key.index("</p>")])
    assert len(set(used)) == len(used) == len(CompareRow)
    schemes = [
        dict(re.findall(r"(--series-\d+): (#\w+)", part)) for part in page.split("prefers-color-scheme: dark")[:2]
    ]
    for scheme in schemes:
        assert len({scheme[name] for name in used}) == len(CompareRow)


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_nothing_overflows_in_a_browser(tmp_path: Path, dark: bool) -> None:
    frames, console = measure(comparison_page(make_wide()), tmp_path, dark)
    assert console == []
    for frame in frames:
        assert frame["closed"] <= frame["width"]
        assert len(frame["figures"]) == 1
