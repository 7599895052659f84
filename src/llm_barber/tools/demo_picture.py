"""The picture of the demonstration: a bar of perplexity for each model."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

WIDTH, BAR_HEIGHT, MARGINS = 7.2, 0.42, 1.3  # inches
PIXELS_PER_INCH = 150
DENSE, PRUNED, BEST = "#8a8f98", "#7aa6d8", "#1f5fa8"


def draw_perplexities(names: Sequence[str], perplexities: Sequence[float], path: Path) -> None:
    """Write a PNG file with a bar for each model on a log axis; the best pruned model is darker.

    Args:
        names: of the models, the dense model first.
        perplexities: of the models.
        path: of the file.
    """
    best = min(perplexities[1:], default=None)
    colours = [DENSE, *(BEST if value == best else PRUNED for value in perplexities[1:])]
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = Figure(figsize=(WIDTH, MARGINS + BAR_HEIGHT * len(names)), dpi=PIXELS_PER_INCH, layout="constrained")
        axes = figure.add_subplot()
        left = min(perplexities) / 1.5
        axes.barh(range(len(names)), [value - left for value in perplexities], left=left, color=colours, height=0.7)
        for row, value in enumerate(perplexities):
            axes.annotate(f"{value:.1f}", (value, row), xytext=(5, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlim(left, max(perplexities) * 1.4)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("perplexity on WikiText-2 (lower is better, log axis)")
        axes.set_title("The same model, half of its weights removed", loc="left")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        figure.savefig(path)
