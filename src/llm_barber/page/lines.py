"""Plots of comparisons, as inline SVG: a line for each method, solid without and dashed with rebuild."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from llm_barber.page.figures import SERIES, TEXT, WIDTH, figure_of_page, inside, svg, tick

HEIGHT = 380
LEFT_MARGIN, RIGHT_MARGIN = 62.0, 16.0
# Times the dense model's perplexity. A worse model is of no use, and an axis up to it would squeeze the other lines.
WORST_SHOWN = 60


@dataclass(frozen=True)
class Line:
    """A series: its name, the number of its colour, True for a dashed line, and y by x."""

    name: str
    colour: int
    dashed: bool
    points: Mapping[str, float]


@dataclass(frozen=True)
class Part:
    """A part of the plot: its x values, True to join the points by lines, and its left and right edge."""

    x_values: Sequence[str]
    joined: bool
    left: float
    right: float


def perplexity_lines(
    name: str, lines: Sequence[Line], joined: Sequence[str], single: Sequence[str], dense: float, label: str, axis: str
) -> Markup:
    """Draw perplexity on a log axis, in two parts: lines on the left, single points on the right.

    The x values are drawn at equal distances. A triangle at the upper edge is a perplexity far worse than dense.

    Args:
        name: of the figure, unique on its page.
        lines: the series.
        joined: x values of the left part.
        single: x values of the right part.
        dense: the dense model's perplexity, a dotted line.
        label: for screen readers.
        axis: title of the left x axis.
    """
    with figure_of_page(WIDTH, HEIGHT) as figure:
        values = [value for line in lines for value in line.points.values()] + [dense]
        low, high = min(values) / 1.15, min(max(values), WORST_SHOWN * dense) * 1.15
        for number, part in enumerate(_parts(joined, single)):
            margin = WIDTH - part.right
            axes = figure.add_axes(inside(figure, left=part.left, right=margin, top=12, bottom=46))
            _draw(axes, lines, part, high)
            axes.axhline(dense, color=TEXT, linewidth=1.2, linestyle=":")
            axes.set_yscale("log")
            axes.set_ylim(low, high)
            steps = (1.0,) if high / low > 100 else (1.0, 2.0, 5.0)
            axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=10))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
            axes.set_xlabel(axis if part.joined else "pattern")
            axes.grid(axis="y")
            if number:
                axes.tick_params(labelleft=False)
        if max(values) > high:
            axes.text(
                0.99, 0.94, "triangles: beyond the axis", color=TEXT, ha="right", va="top", transform=axes.transAxes
            )
        return svg(figure, name, label)


def _parts(joined: Sequence[str], single: Sequence[str]) -> list[Part]:
    """The parts that have x values, side by side; widths are by the numbers of x values."""
    columns = max(1, len(joined)) + (len(single) + 0.5 if single else 0)
    share = (max(1, len(joined)) if joined else 0) / columns
    border = LEFT_MARGIN + (WIDTH - LEFT_MARGIN - RIGHT_MARGIN) * share
    parts = [Part(joined, True, LEFT_MARGIN, border - (12 if single else 0))] if joined else []
    return parts + ([Part(single, False, border + (12 if joined else 0), WIDTH - RIGHT_MARGIN)] if single else [])


def _draw(axes: Axes, lines: Sequence[Line], part: Part, high: float) -> None:
    """Draw all series in a part of the plot; `high` is the upper limit of its axis."""
    for number, line in enumerate(lines):
        points = [(x, line.points[key]) for x, key in enumerate(part.x_values) if key in line.points]
        # Single points with the same x stand side by side.
        shift = 0.0 if part.joined else (number - (len(lines) - 1) / 2) * 0.7 / max(1, len(lines))
        axes.plot(
            [x + shift for x, _ in points],
            [value for _, value in points],
            color=SERIES[line.colour % len(SERIES)],
            linestyle=("--" if line.dashed else "-") if part.joined else "none",
            marker="o" if not line.dashed else "D",
            markersize=5 if not line.dashed else 4.5,
            markerfacecolor="none" if line.dashed else SERIES[line.colour % len(SERIES)],
            linewidth=1.8,
        )
        beyond = [x + shift for x, value in points if value > high]
        axes.plot(
            beyond,
            [high / 1.03] * len(beyond),
            color=SERIES[line.colour % len(SERIES)],
            linestyle="none",
            marker="^",
            markersize=7,
            markerfacecolor="none" if line.dashed else SERIES[line.colour % len(SERIES)],
        )
    axes.set_xticks(range(len(part.x_values)), part.x_values)
    axes.set_xlim(-0.4, len(part.x_values) - 0.6)
