"""The generated part of `docs/results/index.md`: tables and plots of one model's quality benchmark."""

import math
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


def write_page(
    page: Path, name: str, title: str, comparison: Comparison, choice: Choice, sequences: Sequences,
    order: Order, settings_of: str | None, elsewhere: Elsewhere = (),
) -> None:  # fmt: skip
    """Replace the model's part of the page (between its markers), and write its plots beside it."""
    comparison = comparison.model_copy(update={"model": title})
    plots = page.with_suffix("")
    plots.mkdir(exist_ok=True)
    picture = comparison_picture(comparison)
    if picture is not None:
        (plots / f"{name}.svg").write_text(picture, encoding="utf-8")
    lines = [f"## {title}", ""]
    lines += [f"- {note}" for note in notes(comparison)]
    lines += _fewer_seeds(comparison)
    lines += ["", f"![Perplexity by sparsity](results/{name}.svg)", ""]
    for block in blocks(comparison):
        lines += [f"### {block.title}", "", *markdown_table(["method", *headings(comparison)], block.rows), ""]
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
        (plots / f"{name}-sequences.svg").write_text(_sequences_picture(sequences, comparison), encoding="utf-8")
        lines += _sequences(sequences, name)
    if order:
        lines += _order(order)
    begin, end = f"<!-- {name}: written by benchmarks/quality.py -->", f"<!-- end of {name} -->"
    part = "\n".join([begin, *lines, end])
    text = page.read_text(encoding="utf-8") if page.exists() else "# Results\n"
    if begin in text:
        before, _, rest = text.partition(begin)
        text = before + part + rest.partition(end)[2]
    else:
        text = f"{text.rstrip()}\n\n{part}\n"
    page.write_text(text, encoding="utf-8")


def _fewer_seeds(comparison: Comparison) -> list[str]:
    """Which rows have other seeds than the tables, by target."""
    found: dict[tuple[str, str], list[int]] = {}
    for cell in comparison.cells:
        title = TITLES[cell.method] + REBUILT * cell.rebuilt
        found.setdefault((title, target_title(cell.target)), []).append(cell.seed)
    usual = sorted(set().union(*found.values()))
    others: dict[tuple[int, ...], dict[str, list[str]]] = {}
    for (title, target), seeds in found.items():
        # Magnitude looks at no text: it is the same for every seed.
        if sorted(seeds) != usual and title != TITLES[Method.MAGNITUDE]:
            others.setdefault(tuple(sorted(seeds)), {}).setdefault(title, []).append(target)
    return [
        f"- Seeds {', '.join(map(str, seeds))}: "
        + "; ".join(f"{title} at {', '.join(targets)}" for title, targets in rows.items())
        + "."
        for seeds, rows in others.items()
    ]


def _gap(comparison: Comparison) -> list[str]:
    """How much of the gap in log perplexity between Wanda and the dense model each row closes."""
    targets = list(dict.fromkeys(cell.target for cell in comparison.cells))
    dense = math.log(comparison.dense.texts[0].perplexity)
    found = {
        (cell.method, cell.rebuilt, cell.target, cell.seed): math.log(_perplexity(cell.result))
        for cell in comparison.cells
        if cell.result is not None
    }
    rows = []
    for method, rebuilt in dict.fromkeys(key[:2] for key in found):
        cells = []
        for target in targets:
            gaps = []
            for (one, was_rebuilt, at, seed), value in found.items():
                wanda = found.get((Method.WANDA, False, at, seed))
                if (one, was_rebuilt, at) == (method, rebuilt, target) and wanda is not None:
                    gaps.append((wanda - value) / (wanda - dense))
            cells.append(f"{sum(gaps) / len(gaps):z.0%}" if gaps else "–")
        if (method, rebuilt) != (Method.WANDA, False):
            rows.append(Row(TITLES[method] + REBUILT * rebuilt, tuple(cells), (False,) * len(cells)))
    return [
        "### How much of what Wanda loses each method wins back",
        "",
        "Share of the gap in log perplexity between Wanda and the dense model, mean over its seeds; below 0 it is "
        "worse than Wanda.",
        "",
        *markdown_table(["method", *map(target_title, targets)], rows),
        "",
    ]


def _elsewhere(elsewhere: Elsewhere, comparison: Comparison) -> list[str]:
    """Rows by llm-compressor, on the tokens of the first seed, by target."""
    dense = math.log(comparison.dense.texts[0].perplexity)
    wanda = {
        cell.target: math.log(_perplexity(cell.result))
        for cell in comparison.cells
        if (cell.method, cell.rebuilt, cell.seed) == (Method.WANDA, False, 0) and cell.result is not None
    }
    rows = []
    known = [one for one in elsewhere if one["target"] in wanda]
    tasks = next((one["tasks"] for one in known if one.get("tasks")), {})
    accuracies = [f"{name} %" for name in (*tasks, "mean")] if tasks else []
    for one in sorted(known, key=lambda one: list(wanda).index(one["target"])):
        before = wanda[one["target"]]
        gap = (before - math.log(one["perplexity"])) / (before - dense)
        values = list(one.get("tasks", {}).values())
        measured = [f"{100 * value:.1f}" for value in (*values, fmean(values))] if values else ["–"] * len(accuracies)
        cells = [f"{one['perplexity']:.2f}", f"{one['divergence']:.3f}", f"{gap:z.0%}", *measured]
        cells.append(f"{one['seconds']:.0f}")
        name = TITLES[Method.SPARSEGPT_UPDATES if one["method"] == "sparsegpt" else Method(one["method"])]
        rows.append(Row(f"{target_title(one['target'])}: {name}", tuple(cells), (False,) * len(cells)))
    versions = " and ".join(dict.fromkeys(str(one["llm-compressor"]) for one in elsewhere))
    machines = "; ".join(dict.fromkeys(str(one["machine"]) for one in elsewhere))
    pruned_under = " and ".join(dict.fromkeys(str(one["transformers"]) for one in elsewhere))
    return [
        f"### By llm-compressor {versions}",
        "",
        f"On the same tokens (seed 0), in float32, under transformers {pruned_under}; measured as the rows above are, "
        f"on {machines}; share: of the gap, as above. `benchmarks/llm_compressor.py`.",
        "",
        *markdown_table(["", "perplexity", "KL", "share", *accuracies, "seconds"], rows),
        "",
    ]


def _does_it_help(comparison: Comparison) -> list[str]:
    """Perplexity with rebuild over perplexity without, by method and target; the geometric mean over seeds."""
    targets = list(dict.fromkeys(cell.target for cell in comparison.cells))
    found = {(cell.method, cell.rebuilt, cell.target, cell.seed): cell.result for cell in comparison.cells}
    rows = []
    for method in dict.fromkeys(cell.method for cell in comparison.cells if cell.rebuilt):
        cells = []
        for target in targets:
            ratios = []
            for (one, rebuilt, at, seed), result in found.items():
                if (one, rebuilt, at) != (method, True, target) or result is None:
                    continue
                # Magnitude looks at no text: it is the same for every seed.
                plain = found.get((method, False, target, seed)) or next(
                    other for key, other in found.items() if key[:3] == (method, False, target)
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
        "### Does rebuilding help?",
        "",
        "Perplexity with rebuild divided by perplexity without (below 1: it helps; geometric mean over seeds), and in "
        "how many of the seeds it is lower.",
        "",
        *markdown_table(["method", *map(target_title, targets)], rows),
        "",
    ]


def _choice(choice: Choice) -> list[str]:
    """Every setting of the rebuild that was tried, and which one the tables use."""
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
        "### Granularity and ratio of the rebuild",
        "",
        "At 50 %, first seed. Bold: the best on the validation text, which the tables above use. Error: mean "
        "reconstruction error of the blocks after the rebuild against before.",
        "",
        *markdown_table(
            ["method", "granularity", "ratio", "swapped", *(f"{name} error" for name in names), "validation", "test"],
            rows,
        ),
        "",
    ]


def _sequences(sequences: Sequences, name: str) -> list[str]:
    """Perplexity by number of calibration sequences."""
    counts = list(dict.fromkeys(key[2] for key in sequences))
    rows = []
    for method, rebuilt in dict.fromkeys(key[:2] for key in sequences):
        values = [_perplexity(sequences[method, rebuilt, count]) for count in counts]
        rows.append(
            Row(TITLES[method] + REBUILT * rebuilt, tuple(f"{value:.2f}" for value in values), (False,) * len(values))
        )
    return [
        "### Number of calibration sequences",
        "",
        "Perplexity at 50 %, first seed.",
        "",
        *markdown_table(["method", *map(str, counts)], rows),
        "",
        f"![Perplexity by number of calibration sequences](results/{name}-sequences.svg)",
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
        "### One pass, or one after the other",
        "",
        "Perplexity at 50 %, first seed: `prune` chooses a layer's initial mask and rebuilds it before it goes on to "
        "the next layer; `prune --no-rebuild` followed by `rebuild` is the released program's order.",
        "",
        *markdown_table(["method", "one pass", "one after the other", "swapped", "swapped, one after the other"], rows),
        "",
    ]


def _perplexity(result: CellResult) -> float:
    return result.evaluation.texts[0].perplexity
