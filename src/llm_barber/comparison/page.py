"""The page and the plot of a comparison of methods."""

from markupsafe import Markup

from llm_barber.comparison.result import Comparison
from llm_barber.comparison.tables import (
    PAIRED,
    REBUILT,
    TITLES,
    headings,
    perplexities,
    tables_by_target,
    target_title,
)
from llm_barber.comparison.written import notes
from llm_barber.page.environment import environment, model_name
from llm_barber.page.figures import standalone
from llm_barber.page.lines import Line, perplexity_lines


def comparison_page(comparison: Comparison) -> str:
    """The page, as one HTML text that needs no other file, no network and no scripts."""
    rebuilt = any(cell.rebuilt for cell in comparison.cells)
    return (
        environment()
        .get_template("comparison.html.j2")
        .render(
            comparison=comparison,
            name=model_name(comparison.model),
            tables=tables_by_target(comparison),
            headings=headings(comparison),
            notes=notes(comparison),
            paired=PAIRED,
            plot=comparison_figure(comparison),
            methods=[(line.colour, line.name) for line in _lines(comparison) if not line.dashed],
            rebuilt=rebuilt,
            text=comparison.dense.texts[0].text if comparison.dense.texts else "",
        )
    )


def comparison_figure(comparison: Comparison) -> Markup | None:
    """Figure of the perplexity on the first text against sparsity; None: there is no text, or no cell."""
    lines = _lines(comparison)
    if not lines or not comparison.dense.texts:
        return None
    targets = list(dict.fromkeys(target_title(cell.target) for cell in comparison.cells))
    return perplexity_lines(
        "perplexity",
        lines,
        joined=[target for target in targets if ":" not in target],
        single=[target for target in targets if ":" in target],
        dense=comparison.dense.texts[0].perplexity,
        label=f"Perplexity on {comparison.dense.texts[0].text} by sparsity and pattern, a line a method",
        axis="sparsity",
    )


def comparison_picture(comparison: Comparison) -> str | None:
    """The figure as an SVG file, with its key; None: there is no figure."""
    figure = comparison_figure(comparison)
    if figure is None:
        return None
    lines = _lines(comparison)
    return standalone(figure, [(line.name, line.colour, line.dashed) for line in lines] + [("dense", None, True)])


def _lines(comparison: Comparison) -> list[Line]:
    methods = list(TITLES)
    return [
        Line(
            TITLES[method] + (REBUILT if rebuilt else ""),
            methods.index(method),
            rebuilt,
            {target_title(target): value for target, value in points.items()},
        )
        for (method, rebuilt), points in perplexities(comparison).items()
    ]
