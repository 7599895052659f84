"""The README agrees with the code and with the kept results, and it stays short."""

import ast
import json
import re

import pytest

from llm_barber import PruneConfig, RunReport
from llm_barber.settings.presets import Preset
from tests.conftest import FAMILIES, make_config
from tests.helpers.pages import FENCE, README, ROOT, prose

TEXT = README.read_text(encoding="utf-8")
MODELS = ("qwen2.5-coder-1.5b-32x512", "smollm2-135m-64x1024")  # two columns of the results each
NOT_MEASURED = "–"
ROWS = {  # a row of the results, and its cells
    "magnitude": "magnitude",
    "Wanda": "wanda",
    "`paper`": "paper",
    "SparseGPT": "sparsegpt-updates",
    "ALPS": "alps",
    "**`mask`**": "mask",
    "**`best`**": "best",
}
TASK_EXAMPLES = 300  # of the cells that tables show


def perplexities(model: str, method: str, target: str) -> list[float]:
    """Perplexities of a method's cells; first those of the newest revision, with reordered channels."""
    folder = ROOT / "benchmarks" / "results" / model / "cells"
    cells = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{method}-{target}-seed0-*.json"))]
    shown = [cell for cell in cells if all(task[2] == TASK_EXAMPLES for task in cell["key"].get("tasks") or [])]
    shown.sort(key=lambda cell: (-cell["key"].get("revision", 1), "reorder" not in cell["key"]))
    return [cell["evaluation"]["texts"][0]["perplexity"] for cell in shown]


def three_digits(value: float) -> str:
    return f"{value:,.0f}" if value > 99.95 else f"{value:.1f}"


@pytest.mark.parametrize("row", ROWS)
def test_results_are_those_of_the_kept_cells(row: str) -> None:
    (line,) = re.findall(rf"^\| {re.escape(row)}(?:[,: ][^|]*)?\|(.*)\|$", TEXT, re.MULTILINE)
    shown = [re.sub(r"\(.*?\)|\*", "", cell).strip() for cell in line.split("|")]
    kept = [perplexities(model, ROWS[row], target) for model in MODELS for target in ("0.5", "2of4")]
    assert shown == [three_digits(cells[0]) if cells else NOT_MEASURED for cells in kept]


def test_it_is_short() -> None:
    assert len(TEXT.splitlines()) <= 127
    numbers = re.findall(r"(?<![\w.])\d[\d.,]*(?!\w)", prose(TEXT))
    assert len(numbers) <= 60


def test_presets_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| `--preset (\w+)`( \(default\))? \|", TEXT, re.MULTILINE)
    assert {name for name, _ in rows} == {preset.value for preset in Preset}
    assert [name for name, default in rows if default] == [PruneConfig(model="model", output="out").preset_name]
    assert (
        f"{PruneConfig.model_fields['samples'].default} windows of {PruneConfig.model_fields['seqlen'].default} tokens"
        in TEXT
    )


def test_families_are_counted() -> None:
    assert f"{len({make_config(family).model_type for family in FAMILIES})} model types are tested" in TEXT


def test_its_python_uses_settings_and_results_that_exist() -> None:
    (example,) = (block for block in FENCE.findall(TEXT) if block.startswith("```python"))
    tree = ast.parse(example.removeprefix("```python").removesuffix("```"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    (config,) = (call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "PruneConfig")
    assert {keyword.arg for keyword in config.keywords} <= set(PruneConfig.model_fields)
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert all(hasattr(RunReport, name) or name in RunReport.model_fields for name in used)


def test_its_pictures_exist() -> None:
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", TEXT)
    assert len(pictures) == 2
    assert all((ROOT / picture).read_text(encoding="utf-8").lstrip().startswith("<") for picture in pictures)
