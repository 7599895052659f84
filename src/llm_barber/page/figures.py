"""Figures of a page, drawn by matplotlib as SVG.

A figure is transparent and drawn for a light page; the style sheet inverts it on a dark page. pyplot is not used: it
would keep every figure in global state.
"""

import base64
import html
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib
import matplotlib.style
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

WIDTH = 928  # units, a CSS pixel each, of the page's column
UNITS_PER_INCH = 72  # of matplotlib's SVG
# Times the dense model's perplexity. A worse model is of no use, and an axis up to it would squeeze the other lines.
WORST_SHOWN = 60
COLOURS = (*matplotlib.color_sequences["tab10"], "black", "goldenrod")
STYLE = {
    "svg.fonttype": "none",  # letters stay letters: small, searchable
    "svg.hashsalt": "llm-barber",
    "font.size": 12,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Line:
    """A series: its name, the number of its colour, True for a dashed line, and y by x."""

    name: str
    colour: int
    dashed: bool
    points: Mapping[str, float]


@dataclass(frozen=True)
class BlockErrors:
    """Reconstruction errors of a kind of block, before and after, in some decoder layers.

    An error that is missing, zero or not finite leaves a gap.
    """

    name: str
    layers: Sequence[int]
    before: Sequence[float | None]
    after: Sequence[float | None]


def error_panels(blocks: Sequence[BlockErrors]) -> Figure | None:
    """Draw the reconstruction errors of each kind of block by layer, on a common log axis; None: it can show none."""
    if not any(map(drawable, (error for block in blocks for error in (*block.before, *block.after)))):
        return None
    with new_figure(WIDTH, 250) as figure:
        panels = figure.subplots(1, len(blocks), sharey=True, squeeze=False)[0]
        for axes, block in zip(panels, blocks, strict=True):
            for values, style, label in (
                (block.before, "o--", "with the initial mask"),
                (block.after, "o-", "with the final mask and weights"),
            ):
                shown = [value if drawable(value) else math.nan for value in values]
                axes.plot(block.layers, shown, style, markersize=4, label=label)
            axes.set_yscale("log")
            axes.set_title(block.name, parse_math=False)
            axes.set_xlabel("decoder layer")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            _label_log_axis(axes)
        panels[0].legend()
    return figure


def drawable(value: float | None) -> bool:
    """True if a log axis can show the value."""
    return value is not None and math.isfinite(value) and value > 0


def heat_map(
    rows: Sequence[str], layers: Sequence[int], values: Mapping[tuple[str, int], float], from_zero: bool
) -> Figure:
    """Draw shares (0…1) of linears (rows) by layer (columns), with a colour bar.

    Args:
        rows: names of the linears.
        layers: indices of the decoder layers.
        values: by (row, layer); the cell of a linear that a layer lacks stays empty.
        from_zero: begin the scale at zero; else at the smallest value.
    """
    with new_figure(WIDTH, 24 * len(rows) + 80) as figure:
        axes = figure.add_subplot()
        grid = np.ma.masked_invalid([[values.get((row, layer), math.nan) for layer in layers] for row in rows])
        mesh = axes.pcolormesh(
            np.arange(len(layers) + 1) + layers[0] - 0.5, np.arange(len(rows) + 1) - 0.5, grid,
            cmap="Blues", vmin=0 if from_zero else None, edgecolors="white", linewidth=0.4,
        )  # fmt: skip
        axes.invert_yaxis()
        axes.set_yticks(range(len(rows)), rows, family="monospace", parse_math=False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("decoder layer")
        figure.colorbar(mesh, ax=axes, format=PercentFormatter(1), ticks=MaxNLocator(4))
    return figure


def perplexity_lines(lines: Sequence[Line], x_values: Sequence[str], dense: float) -> Figure:
    """Draw perplexity on a log axis by sparsity and N:M pattern, at equal distances.

    The points of sparsities are joined. A triangle at the upper edge is a perplexity far worse than dense.

    Args:
        lines: the series, by x value.
        x_values: sparsities and patterns.
        dense: the dense model's perplexity, a dotted line.
    """
    highest = max(value for line in lines for value in line.points.values())
    edge = min(highest, WORST_SHOWN * dense)
    with new_figure(WIDTH, 400 + 8 * len(lines)) as figure:
        axes = figure.add_subplot()
        for number, line in enumerate(lines):
            shift = (number / len(lines) - 0.5) * 0.5  # single points with the same x stand side by side
            style = {"color": COLOURS[line.colour % len(COLOURS)], "markerfacecolor": "none" if line.dashed else None}
            joined = {x: line.points[key] for x, key in enumerate(x_values) if key in line.points and ":" not in key}
            single = {
                x + shift: line.points[key] for x, key in enumerate(x_values) if key in line.points and ":" in key
            }
            for points, form in ((joined, "D--" if line.dashed else "o-"), (single, "D" if line.dashed else "o")):
                label = line.name if points is joined or not joined else None
                axes.plot(
                    list(points), [min(y, edge) for y in points.values()], form, label=label, markersize=5, **style
                )
                beyond = [x for x, y in points.items() if y > edge]
                axes.plot(beyond, [edge] * len(beyond), "^", markersize=9, **style)
        axes.axhline(dense, color="black", linestyle=":", label="dense")
        axes.set_yscale("log")
        axes.set_xticks(range(len(x_values)), x_values)
        axes.set_ylabel("perplexity" + (" (triangles: beyond the axis)" if highest > edge else ""))
        _label_log_axis(axes)
        figure.legend(loc="outside lower center", ncols=3)
    return figure


def _label_log_axis(axes: Axes) -> None:
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 100 else (1.0, 2.0, 5.0), numticks=10))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(axis="y")


@contextmanager
def new_figure(width: float, height: float) -> Iterator[Figure]:
    """Make a figure in the page's style, whatever the user's matplotlib settings are, and restore these."""
    with matplotlib.style.context(["default", STYLE]):
        size = (width / UNITS_PER_INCH, height / UNITS_PER_INCH)
        yield Figure(figsize=size, dpi=UNITS_PER_INCH, layout="constrained")


def svg(figure: Figure) -> str:
    """The content of an SVG file of a figure; the same figure gives the same content."""
    file = io.StringIO()
    with matplotlib.style.context(["default", STYLE]):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def picture(figure: Figure, label: str) -> Markup:
    """An `<img>` element with the whole figure; screen readers say `label`."""
    content = base64.b64encode(svg(figure).encode()).decode()
    return Markup(f'<img alt="{html.escape(label)}" src="data:image/svg+xml;base64,{content}">')
