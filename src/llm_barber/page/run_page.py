"""The page of one run: pruned and swapped weights, reconstruction errors, seconds, and the evaluation."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from markupsafe import Markup

from llm_barber.evaluation.result import Evaluation
from llm_barber.page.environment import environment, model_name, percent
from llm_barber.page.figures import drawable, error_panel, heat_map, layer_bars, log_limits
from llm_barber.record.layers import BlockResult, LinearResult
from llm_barber.record.report import RunReport

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
    return (
        environment()
        .get_template("run.html.j2")
        .render(
            report=report,
            evaluation=evaluation,
            name=model_name(report.model),
            blocks=_blocks(report),
            tuning=_tuning(report),
            swaps=_swaps(report),
            sparsities=_sparsities(report),
            linears=list(dict.fromkeys(linear.kind for linear in report.linears)),
            totals=[(total, _dropped(report, total.name)) for total in report.by_linear()],
            stages=_stages(report.seconds),
            layer_seconds=_layer_seconds(report),
        )
    )


def _blocks(report: RunReport) -> list[dict[str, Any]]:
    """Errors of each kind of block by layer, in numbers and as a figure; only kinds that were measured."""
    measured: dict[str, list[tuple[int, BlockResult]]] = {}
    for layer in report.layers:
        for block in layer.blocks:
            if block.error_before is not None or block.error_after is not None:
                measured.setdefault(block.name, []).append((layer.index, block))
    errors = [error for rows in measured.values() for _, block in rows for error in _errors(block)]
    limits, changes = log_limits(errors), report.error_changes()
    return [
        {
            "name": name,
            "rows": rows,
            "changes": changes.get(name),
            "hidden": sum(not drawable(error) for _, block in rows for error in _errors(block)),
            "figure": limits
            and error_panel(
                f"error-{position}",
                name,
                [index for index, _ in rows],
                [block.error_before for _, block in rows],
                [block.error_after for _, block in rows],
                limits,
            ),
        }
        for position, (name, rows) in enumerate(measured.items())
    ]


def _errors(block: BlockResult) -> tuple[float | None, float | None]:
    return block.error_before, block.error_after


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
    label = "share of the distance on held-out windows that is gone, by pass and decoder layer"
    return {
        "layers": layers,
        "passes": names,
        "concentrated": [layer for layer in layers if layer.concentration is not None],
        "layers_by_pass": sorted(layers_by_pass.items(), reverse=True),
        "figure": _map("tuning", report, shares, label, True) if any(shares.values()) else None,
    }


def _swaps(report: RunReport) -> dict[str, Any]:
    """Share of each linear's weights that came back, and the figure, if any did."""
    shares = _by_linear_and_layer(report, lambda linear: linear.grown)
    label = "share of weights that came back, by linear and decoder layer"
    return {"shares": shares, "figure": _map("swaps", report, shares, label, True) if report.swapped else None}


def _sparsities(report: RunReport) -> dict[str, Any]:
    """Sparsity of each linear, the extremes, and the figure, unless all sparsities are equal to 0.01 %."""
    shares = _by_linear_and_layer(report, lambda linear: linear.pruned)
    low, high = min(shares.values()), max(shares.values())
    label = "sparsity by linear and decoder layer"
    figure = _map("sparsity", report, shares, label, False) if percent(low) != percent(high) else None
    return {"shares": shares, "low": low, "high": high, "figure": figure}


def _by_linear_and_layer(report: RunReport, count: Callable[[LinearResult], int]) -> dict[tuple[str, int], float]:
    """Share of each linear's weights that `count` counts, by (linear, layer); all experts together."""
    counted: dict[tuple[str, int], int] = {}
    weights: dict[tuple[str, int], int] = {}
    for layer in report.layers:
        for linear in layer.linears:
            key = (linear.kind, layer.index)
            counted[key] = counted.get(key, 0) + count(linear)
            weights[key] = weights.get(key, 0) + linear.weights
    return {key: counted[key] / weights[key] for key in counted}


def _map(name: str, report: RunReport, shares: Mapping[tuple[str, int], float], label: str, from_zero: bool) -> Markup:
    rows = list(dict.fromkeys(linear for linear, _ in shares))
    layers = [layer.index for layer in report.layers]
    return heat_map(name, rows, layers, shares, label, from_zero)


def _dropped(report: RunReport, name: str) -> int:
    return sum(linear.dropped for linear in report.linears if linear.kind == name)


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


def _layer_seconds(report: RunReport) -> Markup | None:
    """Figure of the seconds of each layer; None for a single layer, whose number says as much."""
    if len(report.layers) == 1:
        return None
    layers = [layer.index for layer in report.layers]
    seconds = [layer.seconds for layer in report.layers]
    return layer_bars("seconds", layers, seconds, "seconds", "seconds by decoder layer")
