"""Write a model's page in `docs/results`: the tables and plots of its quality benchmark."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from quality_sections import (
    Choice,
    Order,
    Sequences,
    choice_section,
    order_section,
    perplexity,
    sequences_picture,
    sequences_section,
    wrapped,
)

from llm_barber.comparison.page import comparison_picture
from llm_barber.comparison.result import Comparison
from llm_barber.comparison.tables import (
    REBUILT,
    TITLES,
    Row,
    headings,
    tables_by_target,
    target_title,
)
from llm_barber.comparison.written import markdown_table, notes, section
from llm_barber.settings.compare import CompareRow

Elsewhere = Sequence[Mapping[str, Any]]  # what `llm_compressor.py` keeps


@dataclass(frozen=True)
class Results:
    """Results of a model's stages.

    `settings_of`: the model on which the rebuild's settings were chosen; None: this one.
    """

    comparison: Comparison
    choice: Choice
    sequences: Sequences
    order: Order
    settings_of: str | None
    elsewhere: Elsewhere = ()


def write_page(folder: Path, name: str, title: str, results: Results) -> None:
    """Write the model's page, `folder/name.md`, and its plots beside it."""
    comparison = results.comparison.model_copy(update={"model": title})
    folder.mkdir(exist_ok=True)
    picture = comparison_picture(comparison)
    if picture is not None:
        (folder / f"{name}.svg").write_text(picture, encoding="utf-8")
    lines = ["<!-- written by benchmarks/quality.py -->", f"# {title}", ""]
    lines += [wrapped(f"- {note}", "  ") for note in [*notes(comparison), *_other_seeds(comparison)]]
    lines += ["", f"![Perplexity by sparsity]({name}.svg)", ""]
    for table in tables_by_target(comparison):
        lines += section(table, headings(comparison))
    lines += _gap(comparison)
    if results.elsewhere:
        lines += _elsewhere(results.elsewhere, comparison)
    if any(cell.rebuilt for cell in comparison.cells):
        lines += _does_it_help(comparison)
        if results.settings_of is not None:
            lines += [f"The settings of the rebuild are those chosen on {results.settings_of}.", ""]
    if results.choice:
        lines += choice_section(results.choice)
    if results.sequences:
        (folder / f"{name}-sequences.svg").write_text(
            sequences_picture(results.sequences, comparison), encoding="utf-8"
        )
        lines += sequences_section(results.sequences, name)
    if results.order:
        lines += order_section(results.order)
    (folder / f"{name}.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _other_seeds(comparison: Comparison) -> list[str]:
    """Sentences that name the rows with other calibration seeds than the page's, by target."""
    row_seeds: dict[tuple[str, str], list[int]] = {}
    for cell in comparison.cells:
        title = TITLES[cell.method] + REBUILT * cell.rebuilt
        row_seeds.setdefault((title, target_title(cell.target)), []).append(cell.seed)
    usual = sorted(set().union(*row_seeds.values()))
    others: dict[tuple[int, ...], dict[str, list[str]]] = {}
    for (title, target), seeds in row_seeds.items():
        # Magnitude looks at no text: it is the same for every seed.
        if sorted(seeds) != usual and title != TITLES[CompareRow.MAGNITUDE]:
            others.setdefault(tuple(sorted(seeds)), {}).setdefault(title, []).append(target)
    return [
        f"Seeds {', '.join(map(str, seeds))}: "
        + "; ".join(f"{title} at {', '.join(targets)}" for title, targets in rows.items())
        + "."
        for seeds, rows in others.items()
    ]


def _gap(comparison: Comparison) -> list[str]:
    """The share of the gap in log perplexity between Wanda and the dense model that each row closes."""
    targets = list(dict.fromkeys(cell.target for cell in comparison.cells))
    dense = math.log(comparison.dense.texts[0].perplexity)
    logarithms = {
        (cell.method, cell.rebuilt, cell.target, cell.seed): math.log(perplexity(cell.result))
        for cell in comparison.cells
        if cell.result is not None
    }
    rows = []
    for method, rebuilt in dict.fromkeys(key[:2] for key in logarithms):
        cells = []
        for target in targets:
            gaps = []
            for (other, was_rebuilt, at, seed), value in logarithms.items():
                wanda = logarithms.get((CompareRow.WANDA, False, at, seed))
                if (other, was_rebuilt, at) == (method, rebuilt, target) and wanda is not None:
                    gaps.append((wanda - value) / (wanda - dense))
            cells.append(f"{sum(gaps) / len(gaps):z.0%}" if gaps else "–")
        if (method, rebuilt) != (CompareRow.WANDA, False):
            rows.append(Row(TITLES[method] + REBUILT * rebuilt, tuple(cells), (False,) * len(cells)))
    return [
        "## How much of what Wanda loses each method wins back",
        "",
        wrapped(
            "Share of the gap in log perplexity between Wanda and the dense model, mean over its seeds; below 0 it is "
            "worse than Wanda."
        ),
        "",
        *markdown_table(["method", *map(target_title, targets)], rows),
        "",
    ]


def _elsewhere(elsewhere: Elsewhere, comparison: Comparison) -> list[str]:
    """The table of llm-compressor's results, on the tokens of the first seed, by target."""
    dense = math.log(comparison.dense.texts[0].perplexity)
    wanda = {
        cell.target: math.log(perplexity(cell.result))
        for cell in comparison.cells
        if (cell.method, cell.rebuilt, cell.seed) == (CompareRow.WANDA, False, 0) and cell.result is not None
    }
    table = []
    known = [row for row in elsewhere if row["target"] in wanda]
    tasks = next((row["tasks"] for row in known if row.get("tasks")), {})
    accuracies = [f"{name} %" for name in (*tasks, "mean")] if tasks else []
    for row in sorted(known, key=lambda row: list(wanda).index(row["target"])):
        before = wanda[row["target"]]
        gap = (before - math.log(row["perplexity"])) / (before - dense)
        values = list(row.get("tasks", {}).values())
        measured = [f"{100 * value:.1f}" for value in (*values, fmean(values))] if values else ["–"] * len(accuracies)
        cells = [f"{row['perplexity']:.2f}", f"{row['divergence']:.3f}", f"{gap:z.0%}", *measured]
        cells.append(f"{row['seconds']:.0f}")
        name = TITLES[CompareRow.SPARSEGPT_UPDATES if row["method"] == "sparsegpt" else CompareRow(row["method"])]
        table.append(Row(f"{target_title(row['target'])}: {name}", tuple(cells), (False,) * len(cells)))
    versions = " and ".join(dict.fromkeys(str(row["llm-compressor"]) for row in elsewhere))
    machines = "; ".join(dict.fromkeys(str(row["machine"]) for row in elsewhere))
    pruned_under = " and ".join(dict.fromkeys(str(row["transformers"]) for row in elsewhere))
    return [
        f"## By llm-compressor {versions}",
        "",
        wrapped(
            f"On the same tokens (seed 0), in float32, under transformers {pruned_under}; measured as the rows above "
            f"are, on {machines}; share: of the gap, as above. `benchmarks/llm_compressor.py`."
        ),
        "",
        *markdown_table(["", "perplexity", "KL", "share", *accuracies, "seconds"], table),
        "",
    ]


def _does_it_help(comparison: Comparison) -> list[str]:
    """The table of perplexity with rebuild over perplexity without; geometric means over seeds."""
    targets = list(dict.fromkeys(cell.target for cell in comparison.cells))
    results = {(cell.method, cell.rebuilt, cell.target, cell.seed): cell.result for cell in comparison.cells}
    rows = []
    for method in dict.fromkeys(cell.method for cell in comparison.cells if cell.rebuilt):
        cells = []
        for target in targets:
            ratios = []
            for (other, rebuilt, at, seed), result in results.items():
                if (other, rebuilt, at) != (method, True, target) or result is None:
                    continue
                # Magnitude looks at no text: it is the same for every seed.
                plain = results.get((method, False, target, seed)) or next(
                    value for key, value in results.items() if key[:3] == (method, False, target)
                )
                if plain is not None:
                    ratios.append(math.log(perplexity(result) / perplexity(plain)))
            if not ratios:
                cells.append("–")
                continue
            lower = sum(ratio < 0 for ratio in ratios)
            cells.append(f"{math.exp(sum(ratios) / len(ratios)):.3f} ({lower} of {len(ratios)})")
        rows.append(Row(TITLES[method], tuple(cells), (False,) * len(cells)))
    return [
        "## Does rebuilding help?",
        "",
        wrapped(
            "Perplexity with rebuild divided by perplexity without (below 1: it helps; geometric mean over seeds), and "
            "in how many of the seeds it is lower."
        ),
        "",
        *markdown_table(["method", *map(target_title, targets)], rows),
        "",
    ]
