"""Draw the README's figure, `docs/figures/perplexity.svg`, from kept cells.

The cells are those of SmolLM2-135M with 64 × 1024 tokens. It needs no model and no data.

    python benchmarks/readme_figure.py
"""

import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
CELLS = ROOT / "benchmarks" / "results" / "smollm2-135m-64x1024" / "cells"
FIGURE = ROOT / "docs" / "figures" / "perplexity.svg"
TASK_EXAMPLES = 300  # of the cells that the tables have; cells with more are second runs
SPARSITIES = ("0.5", "0.6", "0.7")
METHODS = {  # name in the files, name on the page, colour, dashes
    "magnitude": ("magnitude", "#8c8c8c", "-"),
    "paper": ("paper: Wanda, rebuilt", "#b3541e", "--"),
    "wanda": ("Wanda", "#e69f00", "-"),
    "sparsegpt-updates": ("SparseGPT, its weights", "#009e73", "-"),
    "mask": ("mask (default)", "#0072b2", "-"),
    "best": ("best", "#5b2a86", "-"),
}
HIGHEST = 2000  # perplexity; worse is beyond the axis
NUDGED = {"paper: Wanda, rebuilt": 1.02, "Wanda": 0.95, "mask (default)": 1.05, "best": 0.95}  # labels, apart


def main() -> None:
    matplotlib.rcParams.update({"font.size": 10, "svg.hashsalt": "llm-barber"})
    figure = Figure(figsize=(7.2, 3.9), facecolor="white")
    axes = figure.add_axes((0.105, 0.13, 0.6, 0.82))
    ends = []
    for method, (title, colour, dashes) in METHODS.items():
        values = [perplexity(f"{method}-{sparsity}-seed0-*.json") for sparsity in SPARSITIES]
        axes.plot(range(3), values, dashes, color=colour, marker="o", markersize=4.5, linewidth=1.9)
        ends.append((values[-1], title, colour))
    dense = perplexity("dense-*.json")
    axes.axhline(dense, color="#333333", linewidth=1.2, linestyle=":")
    ends.append((dense, "dense", "#333333"))
    axes.set_yscale("log")
    axes.set_ylim(20, HIGHEST)
    axes.set_xlim(-0.1, 2.1)
    axes.set_xticks(range(3), [f"{float(sparsity):.0%}".replace("%", " %") for sparsity in SPARSITIES])
    axes.set_yticks((ticks := [25, 50, 100, 200, 500, 1000]), [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("sparsity")
    axes.set_ylabel("perplexity on WikiText-2")
    axes.grid(axis="y", color="#e5e5e5")
    axes.spines[["top", "right"]].set_visible(False)
    for value, title, colour in ends:
        height = min(value, HIGHEST) * NUDGED.get(title, 1)
        number = f"{value:,.0f}" if value > 99.5 else f"{value:.3g}" if title != "dense" else f"{value:.4g}"
        label = f"{title}: {number}{' ↑' * (value > HIGHEST)}"
        axes.annotate(label, (2.13, height), color=colour, va="center", annotation_clip=False)
    figure.savefig(FIGURE, metadata={"Date": None, "Creator": None})


def perplexity(pattern: str) -> float:
    """Perplexity on the first text of the cells of a pattern: that of the newest revision, with the tables' tasks."""
    cells: list[dict[str, Any]] = [json.loads(path.read_text()) for path in sorted(CELLS.glob(pattern))]
    shown = [cell for cell in cells if all(task[2] <= TASK_EXAMPLES for task in cell["key"].get("tasks") or [])]
    newest = max(shown, key=lambda cell: cell["key"].get("revision", 1))
    return float(newest["evaluation"]["texts"][0]["perplexity"])


if __name__ == "__main__":
    main()
