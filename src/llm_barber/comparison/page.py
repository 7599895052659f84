"""The page and the plot of a comparison of methods."""

from collections.abc import Sequence
from statistics import fmean

from matplotlib.figure import Figure

from llm_barber.comparison.result import Comparison
from llm_barber.comparison.tables import PAIRED, TITLES, TargetTable, headings, row_title, target_title, targets
from llm_barber.page.environment import environment, model_name
from llm_barber.page.figures import Line, perplexity_lines, picture, svg


def comparison_page(comparison: Comparison, tables: Sequence[TargetTable], notes: Sequence[str]) -> str:
    """The page, as one HTML text that needs no other file, no network and no scripts."""
    figure = comparison_figure(comparison)
    text = comparison.dense.texts[0].text if comparison.dense.texts else ""
    label = f"Perplexity on {text} by sparsity and pattern, a line a method"
    return (
        environment()
        .get_template("comparison.html.j2")
        .render(
            name=model_name(comparison.model),
            tables=tables,
            headings=headings(comparison),
            notes=notes,
            paired=PAIRED,
            plot=None if figure is None else picture(figure, label),
            rebuilt=any(cell.rebuilt for cell in comparison.cells),
            text=text,
        )
    )


def comparison_picture(comparison: Comparison) -> str | None:
    """The figure as an SVG file; None: there is no figure."""
    figure = comparison_figure(comparison)
    return None if figure is None else svg(figure)


def comparison_figure(comparison: Comparison) -> Figure | None:
    """Figure of the mean perplexity on the first text by target; None: there is no text, or no cell."""
    if not comparison.dense.texts:
        return None
    values: dict[tuple[str, int, bool], dict[str, list[float]]] = {}
    for cell in comparison.cells:
        if cell.result is not None:
            line = (row_title(cell.method, cell.rebuilt), list(TITLES).index(cell.method), cell.rebuilt)
            perplexity = cell.result.evaluation.texts[0].perplexity
            values.setdefault(line, {}).setdefault(target_title(cell.target), []).append(perplexity)
    lines = [
        Line(name, colour, dashed, {target: fmean(seeds) for target, seeds in points.items()})
        for (name, colour, dashed), points in values.items()
    ]
    titles = [target_title(target) for target in targets(comparison)]
    return perplexity_lines(lines, titles, comparison.dense.texts[0].perplexity) if lines else None
