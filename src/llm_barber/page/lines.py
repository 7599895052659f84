"""The plots of comparisons, as inline SVG: a line a method, solid without and dashed with rebuild."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from llm_barber.page.figures import SERIES, TEXT, WIDTH, figure_of_page, inside, svg, tick

HEIGHT = 380
BEYOND = 60  # times the dense model's perplexity: there a model is gone, and an axis up to it would hide the others


@dataclass(frozen=True)
class Line:
    """A series: its name, its colour's number, whether it is dashed, and y by x."""

    name: str
    colour: int
    dashed: bool
    points: Mapping[str, float]


def perplexity_lines(
    name: str, lines: Sequence[Line], joined: Sequence[str], single: Sequence[str], dense: float, label: str, axis: str
) -> Markup:
    """Perplexity on a log axis: `joined` x values, by lines on the left; `single` ones, by points on the right.

    Takes the figure's `name`, unique on its page; x values as the points have them, which are drawn at equal distances;
    the dense model's perplexity, which is a dotted line; what a screen reader says; the title of the left x axis. What
    is far worse than dense is a triangle at the upper edge.
    """
    columns = max(1, len(joined)) + (len(single) + 0.5 if single else 0)
    with figure_of_page(WIDTH, HEIGHT) as figure:
        room = WIDTH - 62 - 16
        share = (max(1, len(joined)) if joined else 0) / columns
        parts = [(joined, True, 62.0, 62 + room * share - (12 if single else 0))] if joined else []
        parts += [(single, False, 62 + room * share + (12 if joined else 0), WIDTH - 16.0)] if single else []
        values = [value for line in lines for value in line.points.values()] + [dense]
        low, high = min(values) / 1.15, min(max(values), BEYOND * dense) * 1.15
        for number, (places, is_joined, left, right) in enumerate(parts):
            axes = figure.add_axes(inside(figure, left=left, right=WIDTH - right, top=12, bottom=46))
            _draw(axes, lines, places, is_joined, high)
            axes.axhline(dense, color=TEXT, linewidth=1.2, linestyle=":")
            axes.set_yscale("log")
            axes.set_ylim(low, high)
            steps = (1.0,) if high / low > 100 else (1.0, 2.0, 5.0)
            axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=10))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
            axes.set_xlabel(axis if is_joined else "pattern")
            axes.grid(axis="y")
            if number:
                axes.tick_params(labelleft=False)
        if max(values) > high:
            axes.text(
                0.99, 0.94, "triangles: beyond the axis", color=TEXT, ha="right", va="top", transform=axes.transAxes
            )
        return svg(figure, name, label)


def _draw(axes: Axes, lines: Sequence[Line], places: Sequence[str], joined: bool, high: float) -> None:
    for number, line in enumerate(lines):
        shown = [(place, line.points[key]) for place, key in enumerate(places) if key in line.points]
        # Points that share a place stand side by side.
        shift = 0.0 if joined else (number - (len(lines) - 1) / 2) * 0.7 / max(1, len(lines))
        axes.plot(
            [place + shift for place, _ in shown],
            [value for _, value in shown],
            color=SERIES[line.colour % len(SERIES)],
            linestyle=("--" if line.dashed else "-") if joined else "none",
            marker="o" if not line.dashed else "D",
            markersize=5 if not line.dashed else 4.5,
            markerfacecolor="none" if line.dashed else SERIES[line.colour % len(SERIES)],
            linewidth=1.8,
        )
        beyond = [place + shift for place, value in shown if value > high]
        axes.plot(
            beyond,
            [high / 1.03] * len(beyond),
            color=SERIES[line.colour % len(SERIES)],
            linestyle="none",
            marker="^",
            markersize=7,
            markerfacecolor="none" if line.dashed else SERIES[line.colour % len(SERIES)],
        )
    axes.set_xticks(range(len(places)), places)
    axes.set_xlim(-0.4, len(places) - 0.6)
