"""Figures of a page, as inline SVG whose colours and fonts are the page's.

matplotlib draws with stand-in colours, and the page's CSS variables replace them, so that one figure serves light, dark
and print. pyplot is not used: it would keep every figure in global state. One unit of length is one CSS pixel.
"""

import html
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from typing import TypeGuard

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from llm_barber.page.environment import SPACE, SUPERSCRIPTS

UNITS_PER_INCH = 72  # of matplotlib's SVG
WIDTH = 928  # of the page's column; two panels share it
PANEL_WIDTH = 448
TEXT, RULE, BEFORE, AFTER, HEAT, BAR, PAGE = (f"#0102{number:02x}" for number in range(7))
SERIES = [f"#0103{number:02x}" for number in range(12)]  # a colour for each method
CSS_COLOURS = {
    **{stand_in: f"var(--series-{number})" for number, stand_in in enumerate(SERIES)},
    TEXT: "currentColor",
    RULE: "var(--rule)",
    BEFORE: "var(--before)",
    AFTER: "var(--after)",
    HEAT: "var(--heat)",
    BAR: "var(--bar)",
    PAGE: "var(--page)",
}
# A ramp of opacity, not of colour: it starts at the page's background, whether that is light or dark. From 50 steps on
# matplotlib would draw the colour bar as a picture, which cannot follow the page's colours.
OPACITY = LinearSegmentedColormap.from_list("opacity", [to_rgba(HEAT, 0.0), to_rgba(HEAT, 1.0)], N=48)
STEPS = [1, 2, 2.5, 5, 10]  # between the numbers along an axis, times a power of ten
STYLE = {
    "svg.fonttype": "none",  # letters stay letters: small, searchable, in the page's font
    "svg.hashsalt": "llm-barber",
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],  # for matplotlib's measurements; it comes with matplotlib
    "font.monospace": ["DejaVu Sans Mono"],
    "font.size": 12,
    "text.color": TEXT,
    "axes.edgecolor": RULE,
    "axes.facecolor": "none",
    "axes.labelcolor": TEXT,
    "axes.labelsize": 12,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "grid.color": RULE,
    "grid.linewidth": 1,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": TEXT,
    "ytick.labelcolor": TEXT,
    "ytick.major.size": 0,
}


def error_panel(
    name: str,
    block: str,
    layers: Sequence[int],
    before: Sequence[float | None],
    after: Sequence[float | None],
    limits: tuple[float, float],
) -> Markup:
    """Draw the reconstruction error of each layer, before and after, on a log axis.

    Args:
        name: of the figure, unique on its page.
        block: kind of the blocks.
        layers: indices of the decoder layers.
        before: error of each layer; an error that is missing, zero or not finite leaves a gap.
        after: likewise.
        limits: of the axis, from `log_limits`; panels that are compared share them.
    """
    with figure_of_page(PANEL_WIDTH, 250) as figure:
        axes = figure.add_axes(inside(figure, left=62, right=8, top=12, bottom=44))
        marker = "o" if len(layers) <= 40 else None  # more markers would run into each other
        size = 7 if len(layers) < 4 else 4
        for values, colour, dashes in ((before, BEFORE, (4, 2)), (after, AFTER, ())):
            drawn = [value if drawable(value) else math.nan for value in values]
            axes.plot(layers, drawn, color=colour, dashes=dashes, marker=marker, markersize=size, linewidth=1.8)
        axes.set_yscale("log")
        axes.set_ylim(*limits)
        steps = (1.0,) if limits[1] / limits[0] > 100 else (1.0, 2.0, 5.0)
        axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=8))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
        axes.grid(axis="y")
        _layer_axis(axes, layers)
        return svg(figure, name, f"{block}: reconstruction error before and after, by decoder layer")


def log_limits(values: Sequence[float | None]) -> tuple[float, float] | None:
    """Limits of a log axis around all values that it can show; None: it can show no value."""
    shown = [value for value in values if drawable(value)]
    if not shown:
        return None
    low, high = min(shown) / 1.4, max(shown) * 1.4
    widen = max(1.0, math.sqrt(10 * low / high))  # at least a decade: less would make noise look like a result
    return low / widen, high * widen


def drawable(value: float | None) -> TypeGuard[float]:
    """True if a log axis can show the value."""
    return value is not None and math.isfinite(value) and value > 0


def heat_map(
    name: str,
    rows: Sequence[str],
    layers: Sequence[int],
    values: Mapping[tuple[str, int], float],
    label: str,
    from_zero: bool,
) -> Markup:
    """Draw shares (0…1) of linears (rows) by layer (columns), with a colour bar.

    Args:
        name: of the figure, unique on its page.
        rows: names of the linears.
        layers: indices of the decoder layers.
        values: by (row, layer); the cell of a linear that a layer lacks stays empty.
        label: for screen readers.
        from_zero: begin the scale at zero; else at the smallest value.
    """
    left = 16 + round(7.3 * max(len(row) for row in rows))  # 7.3: width of a letter of the 12 unit monospaced font
    cell = min(48.0, max(5.0, (WIDTH - left - 100) / len(layers)))
    with figure_of_page(left + round(cell * len(layers)) + 100, 24 * len(rows) + 56) as figure:
        axes = figure.add_axes(inside(figure, left=left, right=100, top=8, bottom=48))
        grid = np.ma.masked_invalid([[values.get((row, layer), math.nan) for layer in layers] for row in rows])
        edges = np.arange(len(layers) + 1) - 0.5
        mesh = axes.pcolormesh(
            edges, np.arange(len(rows) + 1) - 0.5, grid, cmap=OPACITY, vmin=0 if from_zero else None,
            edgecolors=PAGE, linewidth=1 if cell > 10 else 0.4,
        )  # fmt: skip
        axes.invert_yaxis()
        axes.set_yticks(range(len(rows)), rows, family="monospace", parse_math=False)
        axes.spines[:].set_visible(True)
        _layer_axis(axes, layers, positions=range(len(layers)))
        scale = figure.add_axes(inside(figure, left=figure.bbox.width - 84, right=70, top=8, bottom=48))
        steps = min(4, 3 * len(rows) // 2)  # labels of a low bar would overlap
        bar = figure.colorbar(mesh, cax=scale, ticks=MaxNLocator(steps, steps=STEPS))
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}{SPACE}%"))
        bar.outline.set_edgecolor(RULE)
        return svg(figure, name, label)


def layer_bars(name: str, layers: Sequence[int], values: Sequence[float], unit: str, label: str) -> Markup:
    """Draw a bar for each layer, from zero; the figure's `name` is unique on its page."""
    with figure_of_page(min(WIDTH, 120 + 40 * len(layers)), 180) as figure:
        axes = figure.add_axes(inside(figure, left=62, right=8, top=12, bottom=44))
        axes.bar(layers, values, width=0.75, color=BAR)
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=STEPS))
        axes.set_ylabel(unit)
        axes.grid(axis="y")
        _layer_axis(axes, layers)
        return svg(figure, name, label)


def _layer_axis(axes: Axes, layers: Sequence[int], positions: Sequence[int] | None = None) -> None:
    """Set ticks at whole layers.

    `positions`: x of each layer; None: its index.
    """
    positions = layers if positions is None else positions
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500) if len(layers) / step <= 16)
    ticks = [(x, layer) for x, layer in zip(positions, layers, strict=True) if layer % step == 0]
    axes.set_xticks([x for x, _ in ticks], [str(layer) for _, layer in ticks])
    axes.set_xlim(min(positions) - 0.5, max(positions) + 0.5)
    axes.set_xlabel("decoder layer")


def tick(value: float) -> str:
    """Format a number at a log axis."""
    if 1e-4 <= value < 1e4:
        return f"{value:g}"
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{'' if mantissa == '1' else mantissa + '·'}10{str(int(exponent)).translate(SUPERSCRIPTS)}"


@contextmanager
def figure_of_page(width: float, height: float) -> Iterator[Figure]:
    """Make a figure in the page's style, whatever the user's matplotlib settings are, and restore these."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield Figure(figsize=(width / UNITS_PER_INCH, height / UNITS_PER_INCH), dpi=UNITS_PER_INCH)


def inside(figure: Figure, left: float, right: float, top: float, bottom: float) -> tuple[float, float, float, float]:
    """Rectangle for `add_axes` that leaves these margins."""
    width, height = figure.bbox.width, figure.bbox.height
    return left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height


def svg(figure: Figure, name: str, label: str) -> Markup:
    """Write a figure as an `<svg>` element.

    Its ids begin with `name`; screen readers say `label`.
    """
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = file.getvalue()
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)  # the style would apply to the whole page
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda match: f' id="{name}-{match[1]}"' if match[1] in used else "", body)
    body = re.sub(r'(xlink:href="|url\()#', lambda match: f"{match[1].removeprefix('xlink:')}#{name}-", body)
    for stand_in, css in CSS_COLOURS.items():
        body = body.replace(stand_in, css)
    body = re.sub(r"'DejaVu Sans Mono'[^;\"]*", "var(--monospaced)", body)
    body = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", body)
    body = re.sub(r' transform="rotate\(-?0 [^)]*\)"', "", body)
    body = re.sub(r"\s*\n\s*", " ", body)
    width, height = figure.bbox.width, figure.bbox.height
    return Markup(
        f'<svg role="img" aria-label="{html.escape(label)}" viewBox="0 0 {width:g} {height:g}" '
        f'style="--natural: {width:g}px">{body}'
    )


def standalone(figure: Markup, key: Sequence[tuple[str, int | None, bool]]) -> str:
    """Make an SVG file of a page's figure: the page's light colours on white, and a key below.

    Args:
        figure: an `<svg>` element from `svg`.
        key: the entries: words, number of the colour (None: the text's), and True for a dashed line.
    """
    style = (resources.files("llm_barber.page") / "templates" / "base.html.j2").read_text(encoding="utf-8")
    root = style[style.index(":root {") :]
    colours = root[: root.index("}") + 1]
    opening, _, body = str(figure).partition(">")
    view_box = re.search(r'viewBox="0 0 (\d+) (\d+)"', opening)
    assert view_box is not None
    width, height = int(view_box[1]), int(view_box[2])
    columns = 3
    entries = []
    for number, (words, colour, dashed) in enumerate(key):
        x, y = 62 + number % columns * (width - 70) // columns, height + 20 + number // columns * 22
        stroke = "currentColor" if colour is None else f"var(--series-{colour})"
        dashes = ' stroke-dasharray="1.5 3"' if colour is None else ' stroke-dasharray="6 3"' if dashed else ""
        entries.append(
            f'<line x1="{x}" x2="{x + 28}" y1="{y - 4}" y2="{y - 4}" stroke="{stroke}" stroke-width="2"{dashes}/>'
            f'<text x="{x + 36}" y="{y}" font-size="12" fill="currentColor">{html.escape(words)}</text>'
        )
    total = height + 30 + (len(key) - 1) // columns * 22
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{total}" viewBox="0 0 {width} {total}">'
        f"<style>{colours} svg {{ color: var(--ink); font-family: var(--sans); }}</style>"
        f'<rect width="{width}" height="{total}" fill="var(--page)"/>'
        f"{body.rstrip().removesuffix('</svg>')}{''.join(entries)}</svg>\n"
    )
