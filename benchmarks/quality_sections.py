"""Sections of a model's page: settings of the rebuild, numbers of windows, orders of the steps."""

import textwrap
from collections.abc import Mapping

from llm_barber.comparison.result import CellResult, Comparison
from llm_barber.comparison.tables import REBUILT, TITLES, Row
from llm_barber.comparison.written import markdown_table
from llm_barber.masking.granularity import Granularity
from llm_barber.page.figures import standalone
from llm_barber.page.lines import Line, perplexity_lines
from llm_barber.settings.compare import CompareRow

Choice = Mapping[tuple[CompareRow, Granularity, float], CellResult]
Sequences = Mapping[tuple[CompareRow, bool, int], CellResult]
Order = Mapping[CompareRow, tuple[CellResult, CellResult]]

WIDTH = 100  # of prose


def wrapped(text: str, indent: str = "") -> str:
    """Wrap prose; further lines begin with the indent."""
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def choice_section(choice: Choice) -> list[str]:
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
        wrapped(
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


def sequences_section(sequences: Sequences, name: str) -> list[str]:
    """The table of perplexity by number of calibration sequences."""
    counts = list(dict.fromkeys(key[2] for key in sequences))
    rows = []
    for method, rebuilt in dict.fromkeys(key[:2] for key in sequences):
        values = [perplexity(sequences[method, rebuilt, count]) for count in counts]
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


def sequences_picture(sequences: Sequences, comparison: Comparison) -> str:
    """Plot perplexity by number of calibration sequences, as SVG."""
    methods = list(TITLES)
    lines = [
        Line(
            TITLES[method] + REBUILT * rebuilt,
            methods.index(method),
            rebuilt,
            {str(key[2]): perplexity(result) for key, result in sequences.items() if key[:2] == (method, rebuilt)},
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


def order_section(order: Order) -> list[str]:
    """The table of perplexity by the order of the steps."""
    rows = [
        Row(
            TITLES[method],
            (f"{perplexity(fused):.2f}", f"{perplexity(apart):.2f}", f"{fused.swapped:,}", f"{apart.swapped:,}"),
            (False,) * 4,
        )
        for method, (fused, apart) in order.items()
    ]
    return [
        "## One pass, or one after the other",
        "",
        wrapped(
            "Perplexity at 50 %, first seed: `prune` chooses a layer's initial mask and rebuilds it before it goes on "
            "to the next layer; `prune --no-rebuild` followed by `rebuild` is the released program's order."
        ),
        "",
        *markdown_table(["method", "one pass", "one after the other", "swapped", "swapped, one after the other"], rows),
        "",
    ]


def perplexity(result: CellResult) -> float:
    """Perplexity on the first text, which is reported."""
    return result.evaluation.texts[0].perplexity
