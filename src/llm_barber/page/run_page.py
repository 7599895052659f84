"""The page of one run: pruned and swapped weights, reconstruction errors, seconds, and the evaluation."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from markupsafe import Markup

from llm_barber.evaluation.result import Evaluation
from llm_barber.page.environment import environment, model_name, percent
from llm_barber.page.figures import BlockErrors, drawable, error_panels, heat_map, picture
from llm_barber.record.layers import BlockResult, LinearResult
from llm_barber.record.report import RunReport

Shares = Mapping[tuple[str, int], float]
STAGES = {
    "embed": "embedding, copying the rest",
    "reorder": "finding an order of channels",
    "allocate": "finding how much of each linear goes",
    "layers": "computing the masks",
    "read": "reading the layers",
    "write": "waiting for files to be written",
}


def run_page(report: RunReport, evaluation: Evaluation | None = None) -> str:
    """The page of a run, as one HTML text that needs no other file, no network and no scripts.

    The same record and evaluation give the same text.
    """
    sparsities, swaps = (_by_linear_and_layer(report, count) for count in (_pruned, _grown))
    low, high = min(sparsities.values()), max(sparsities.values())
    uneven = percent(low) != percent(high)
    return (
        environment()
        .get_template("run.html.j2")
        .render(
            report=report,
            evaluation=evaluation,
            name=model_name(report.model),
            errors=_errors(report),
            tuning=_tuning(report),
            swaps=swaps,
            swaps_figure=_map(report, swaps, "weights that came back", True) if report.swapped else None,
            sparsities=sparsities,
            sparsities_figure=_map(report, sparsities, "sparsity", False) if uneven else None,
            low=low,
            high=high,
            linears=list(dict.fromkeys(linear.kind for linear in report.linears)),
            totals=report.by_linear(),
            stages=_stages(report.seconds),
        )
    )


def _errors(report: RunReport) -> dict[str, Any]:
    """Errors of each kind of block by layer, and their figure; only kinds that were measured."""
    measured: dict[str, list[tuple[int, BlockResult]]] = {}
    for layer in report.layers:
        for block in layer.blocks:
            if block.error_before is not None:
                measured.setdefault(block.name, []).append((layer.index, block))
    panels = [
        BlockErrors(
            name,
            [index for index, _ in rows],
            [block.error_before for _, block in rows],
            [block.error_after for _, block in rows],
        )
        for name, rows in measured.items()
    ]
    figure = error_panels(panels)
    return {
        "blocks": measured,
        "changes": report.error_changes(),
        "hidden": sum(not drawable(error) for panel in panels for error in (*panel.before, *panel.after)),
        "figure": figure and picture(figure, "reconstruction error before and after, by block and decoder layer"),
    }


def _tuning(report: RunReport) -> dict[str, Any] | None:
    """Share of the held-out distance that each pass removed, by layer, and the passes that are kept.

    None: no layer was tuned with held-out windows.
    """
    layers = [layer for layer in report.layers if layer.held_out]
    if not layers:
        return None
    passes = max(len(layer.held_out) for layer in layers) - 1  # earlier versions stopped early in some layers
    names = [f"pass {number + 1}" for number in range(passes)]
    shares = {
        (name, layer.index): max(0.0, 1 - error / layer.held_out[0])
        for layer in layers
        for name, error in zip(names, layer.held_out[1:], strict=False)
        if layer.held_out[0]
    }
    layers_by_pass = Counter(layer.kept_pass or 0 for layer in layers)
    gained = any(shares.values())
    return {
        "layers": layers,
        "passes": names,
        "concentrated": [layer for layer in layers if layer.concentration is not None],
        "layers_by_pass": sorted(layers_by_pass.items(), reverse=True),
        "figure": _map(report, shares, "distance on held-out windows that is gone", True) if gained else None,
    }


def _pruned(linear: LinearResult) -> int:
    return linear.pruned


def _grown(linear: LinearResult) -> int:
    return linear.grown


def _by_linear_and_layer(report: RunReport, count: Callable[[LinearResult], int]) -> Shares:
    """Share of each linear's weights that `count` counts, by (linear, layer); all experts together."""
    counted: Counter[tuple[str, int]] = Counter()
    weights: Counter[tuple[str, int]] = Counter()
    for layer in report.layers:
        for linear in layer.linears:
            counted[linear.kind, layer.index] += count(linear)
            weights[linear.kind, layer.index] += linear.weights
    return {key: counted[key] / weights[key] for key in weights}


def _map(report: RunReport, shares: Shares, label: str, from_zero: bool) -> Markup:
    rows = list(dict.fromkeys(row for row, _ in shares))
    figure = heat_map(rows, [layer.index for layer in report.layers], shares, from_zero)
    return picture(figure, f"{label}, by row and decoder layer")


def _stages(seconds: Mapping[str, float]) -> list[tuple[str, str, float, float]]:
    """Stages, longest first: name, description, seconds, share of the total.

    The time that no stage covers is a stage, too.
    """
    total = seconds["total"]
    stages = {stage: value for stage, value in seconds.items() if stage != "total" and value}
    rows = [(stage, STAGES.get(stage, ""), value) for stage, value in stages.items()]
    rest = total - sum(stages.values())
    if rest > 0:
        rows.append(("other", "between the stages", rest))
    rows.sort(key=lambda row: -row[2])
    return [(*row, row[2] / total if total else 0.0) for row in rows]
