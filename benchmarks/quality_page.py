"""A model's page in `docs/results`: the tables and plots of its quality benchmark."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from llm_barber.comparison.page import comparison_picture
from llm_barber.comparison.result import CellResult, Comparison
from llm_barber.comparison.tables import (
    REBUILT,
    TITLES,
    Row,
    blocks,
    headings,
    markdown_table,
    notes,
    target_title,
)
from llm_barber.masking.granularity import Granularity
from llm_barber.page.figures import standalone
from llm_barber.page.lines import Line, perplexity_lines
from llm_barber.settings.compare import Method

Choice = Mapping[tuple[Method, Granularity, float], CellResult]
Sequences = Mapping[tuple[Method, bool, int], CellResult]
Order = Mapping[Method, tuple[CellResult, CellResult]]
Elsewhere = Sequence[Mapping[str, Any]]  # what `llm_compressor.py` keeps


WIDTH = 100  # of prose


def write_page(
    folder: Path, name: str, title: str, comparison: Comparison, choice: Choice, sequences: Sequences,
    order: Order, settings_of: str | None, elsewhere: Elsewhere = (),
) -> None:  # fmt: skip
    """Write the model's page, `folder/name.md`, and its plots beside it."""
    comparison = comparison.model_copy(update={"model": title})
    folder.mkdir(exist_ok=True)
    picture = comparison_picture(comparison)
    if picture is not None:
        (folder / f"{name}.svg").write_text(picture, encoding="utf-8")
    lines = ["<!-- written by benchmarks/quality.py -->", f"# {title}", ""]
    lines += [_wrapped(f"- {note}", "  ") for note in [*notes(comparison), *_other_seeds(comparison)]]
    lines += ["", f"![Perplexity by sparsity]({name}.svg)", ""]
    for block in blocks(comparison):
        lines += [f"## {block.title}", "", *markdown_table(["method", *headings(comparison)], block.rows), ""]
    lines += _gap(comparison)
    if elsewhere:
        lines += _elsewhere(elsewhere, comparison)
    if any(cell.rebuilt for cell in comparison.cells):
        lines += _does_it_help(comparison)
        if settings_of is not None:
            lines += [f"The settings of the rebuild are those chosen on {settings_of}.", ""]
    if choice:
        lines += _choice(choice)
    if sequences:
        (folder / f"{name}-sequences.svg").write_text(_sequences_picture(sequences, comparison), encoding="utf-8")
        lines += _sequences(sequences, name)
    if order:
        lines += _order(order)
    (folder / f"{name}.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


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
        if sorted(seeds) != usual and title != TITLES[Method.MAGNITUDE]:
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
        (cell.method, cell.rebuilt, cell.target, cell.seed): math.log(_perplexity(cell.result))
        for cell in comparison.cells
        if cell.result is not None
    }
    rows = []
    for method, rebuilt in dict.fromkeys(key[:2] for key in logarithms):
        cells = []
        for target in targets:
            gaps = []
            for (other, was_rebuilt, at, seed), value in logarithms.items():
                wanda = logarithms.get((Method.WANDA, False, at, seed))
                if (other, was_rebuilt, at) == (method, rebuilt, target) and wanda is not None:
                    gaps.append((wanda - value) / (wanda - dense))
            cells.append(f"{sum(gaps) / len(gaps):z.0%}" if gaps else "–")
        if (method, rebuilt) != (Method.WANDA, False):
            rows.append(Row(TITLES[method] + REBUILT * rebuilt, tuple(cells), (False,) * len(cells)))
    return [
        "## How much of what Wanda loses each method wins back",
        "",
        _wrapped(
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
        cell.target: math.log(_perplexity(cell.result))
        for cell in comparison.cells
        if (cell.method, cell.rebuilt, cell.seed) == (Method.WANDA, False, 0) and cell.result is not None
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
        name = TITLES[Method.SPARSEGPT_UPDATES if row["method"] == "sparsegpt" else Method(row["method"])]
        table.append(Row(f"{target_title(row['target'])}: {name}", tuple(cells), (False,) * len(cells)))
    versions = " and ".join(dict.fromkeys(str(row["llm-compressor"]) for row in elsewhere))
    machines = "; ".join(dict.fromkeys(str(row["machine"]) for row in elsewhere))
    pruned_under = " and ".join(dict.fromkeys(str(row["transformers"]) for row in elsewhere))
    return [
        f"## By llm-compressor {versions}",
        "",
        _wrapped(
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
                    ratios.append(math.log(_perplexity(result) / _perplexity(plain)))
            if not ratios:
                cells.append("–")
                continue
            lower = sum(ratio < 0 for ratio in ratios)
            cells.append(f"{math.exp(sum(ratios) / len(ratios)):.3f} ({lower} of {len(ratios)})")
        rows.append(Row(TITLES[method], tuple(cells), (False,) * len(cells)))
    return [
        "## Does rebuilding help?",
        "",
        _wrapped(
            "Perplexity with rebuild divided by perplexity without (below 1: it helps; geometric mean over seeds), and "
            "in how many of the seeds it is lower."
        ),
        "",
        *markdown_table(["method", *map(target_title, targets)], rows),
        "",
    ]


def _choice(choice: Choice) -> list[str]:
    """The table of all settings of the rebuild that were tried; the tables above use the bold ones."""
    best = {}
    for method in dict.fromkeys(key[0] for key in choice):
        best[method] = min(
            (key for key in choice if key[0] is method), key=lambda key: choice[key].evaluation.texts[1].perplexity
        )
    rows = []
    for key, result in choice.items():
        method, granularity, ratio = key
        test, validation = result.evaluation.texts
        error = {
            name: f"{after / before - 1:+.0%}" for name, (before, after) in result.errors.items() if before and after
        }
        rows.append(
            Row(
                TITLES[method],
                (
                    granularity.value, f"{ratio:g}", f"{result.swapped:,}", *error.values(),
                    f"{validation.perplexity:.2f}", f"{test.perplexity:.2f}",
                ),
                (*(False,) * (3 + len(error)), best[method] == key, False),
            )
        )  # fmt: skip
    names = list(next(iter(choice.values())).errors)
    return [
        "## Granularity and ratio of the rebuild",
        "",
        _wrapped(
            "At 50 %, first seed. Bold: the best on the validation text, which the tables above use. Error: mean "
            "reconstruction error of the blocks after the rebuild against before."
        ),
        "",
        *markdown_table(
            ["method", "granularity", "ratio", "swapped", *(f"{name} error" for name in names), "validation", "test"],
            rows,
        ),
        "",
    ]


def _sequences(sequences: Sequences, name: str) -> list[str]:
    """The table of perplexity by number of calibration sequences."""
    counts = list(dict.fromkeys(key[2] for key in sequences))
    rows = []
    for method, rebuilt in dict.fromkeys(key[:2] for key in sequences):
        values = [_perplexity(sequences[method, rebuilt, count]) for count in counts]
        rows.append(
            Row(TITLES[method] + REBUILT * rebuilt, tuple(f"{value:.2f}" for value in values), (False,) * len(values))
        )
    return [
        "## Number of calibration sequences",
        "",
        "Perplexity at 50 %, first seed.",
        "",
        *markdown_table(["method", *map(str, counts)], rows),
        "",
        f"![Perplexity by number of calibration sequences]({name}-sequences.svg)",
        "",
    ]


def _sequences_picture(sequences: Sequences, comparison: Comparison) -> str:
    methods = list(TITLES)
    lines = [
        Line(
            TITLES[method] + REBUILT * rebuilt,
            methods.index(method),
            rebuilt,
            {str(key[2]): _perplexity(result) for key, result in sequences.items() if key[:2] == (method, rebuilt)},
        )
        for method, rebuilt in dict.fromkeys(key[:2] for key in sequences)
    ]
    figure = perplexity_lines(
        "sequences",
        lines,
        joined=list(dict.fromkeys(str(key[2]) for key in sequences)),
        single=[],
        dense=comparison.dense.texts[0].perplexity,
        label="Perplexity by number of calibration sequences",
        axis="calibration sequences",
    )
    return standalone(figure, [(line.name, line.colour, line.dashed) for line in lines] + [("dense", None, True)])


def _order(order: Order) -> list[str]:
    rows = [
        Row(
            TITLES[method],
            (f"{_perplexity(fused):.2f}", f"{_perplexity(apart):.2f}", f"{fused.swapped:,}", f"{apart.swapped:,}"),
            (False,) * 4,
        )
        for method, (fused, apart) in order.items()
    ]
    return [
        "## One pass, or one after the other",
        "",
        _wrapped(
            "Perplexity at 50 %, first seed: `prune` chooses a layer's initial mask and rebuilds it before it goes on "
            "to the next layer; `prune --no-rebuild` followed by `rebuild` is the released program's order."
        ),
        "",
        *markdown_table(["method", "one pass", "one after the other", "swapped", "swapped, one after the other"], rows),
        "",
    ]


def _perplexity(result: CellResult) -> float:
    return result.evaluation.texts[0].perplexity
