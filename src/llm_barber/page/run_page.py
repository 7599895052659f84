"""The page of one run: what was pruned, what was swapped after that, how long it took, and how good the result is."""

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
    "allocate": "finding how much of each linear goes",
    "layers": "computing the masks",
    "read": "reading the layers",
    "write": "writing the layers",
}


def run_page(report: RunReport, evaluation: Evaluation | None = None) -> str:
    """The page of a run as one HTML text, which needs no other file, no network and no scripts.

    Takes the run's record and, if there is one, what `evaluate` found of its model. The same ones give the same text.
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
    """For each kind of block: its errors by layer, what they say in numbers, and the figure; none if not measured."""
    measured: dict[str, list[tuple[int, BlockResult]]] = {}
    for layer in report.layers:
        for block in layer.blocks:
            if block.error_before is not None or block.error_after is not None:
                measured.setdefault(block.name, []).append((layer.index, block))
    every = [error for rows in measured.values() for _, block in rows for error in _errors(block)]
    limits, changes = log_limits(every), report.error_changes()
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
    """What held-out windows said of each pass, by layer: the share of the distance that is gone; which is kept."""
    layers = [layer for layer in report.layers if layer.held_out]
    if not layers:
        return None
    passes = max(len(layer.held_out) for layer in layers) - 1  # of earlier versions' layers some ended sooner
    names = [f"pass {number + 1}" for number in range(passes)]
    shares = {
        (name, layer.index): max(0.0, 1 - error / layer.held_out[0])
        for layer in layers
        for name, error in zip(names, layer.held_out[1:], strict=False)
        if layer.held_out[0]
    }
    kept = Counter(layer.kept_pass or 0 for layer in layers)
    label = "share of the distance on held-out windows that is gone, by pass and decoder layer"
    return {
        "layers": layers,
        "passes": names,
        "concentrated": [layer for layer in layers if layer.concentration is not None],
        "kept": [(number, kept[number]) for number in sorted(kept, reverse=True)],
        "figure": _map("tuning", report, shares, label, True) if any(shares.values()) else None,
    }


def _swaps(report: RunReport) -> dict[str, Any]:
    """The share of each linear's weights that came back, and the figure, if any did."""
    shares = _by_linear_and_layer(report, lambda linear: linear.grown)
    label = "share of weights that came back, by linear and decoder layer"
    return {"shares": shares, "figure": _map("swaps", report, shares, label, True) if report.swapped else None}


def _sparsities(report: RunReport) -> dict[str, Any]:
    """The sparsity of each linear, its extremes, and the figure, unless all are the same to 0.01 %."""
    shares = _by_linear_and_layer(report, lambda linear: linear.pruned)
    low, high = min(shares.values()), max(shares.values())
    label = "sparsity by linear and decoder layer"
    figure = _map("sparsity", report, shares, label, False) if percent(low) != percent(high) else None
    return {"shares": shares, "low": low, "high": high, "figure": figure}


def _by_linear_and_layer(report: RunReport, count: Callable[[LinearResult], int]) -> dict[tuple[str, int], float]:
    """Share of the weights that are counted; experts' together."""
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
    """Stage, what it is, seconds, share of the total; longest first. What no stage covers is a stage of its own."""
    total = seconds["total"]
    stages = {stage: value for stage, value in seconds.items() if stage != "total" and value}
    rows = [(stage, STAGES.get(stage, ""), value) for stage, value in stages.items()]
    rest = total - sum(stages.values())
    if rest > 0:
        rows.append(("other", "between the stages", rest))
    rows.sort(key=lambda row: -row[2])
    return [(*row, row[2] / total if total else 0.0) for row in rows]


def _layer_seconds(report: RunReport) -> Markup | None:
    """The figure; None for one layer, of which a number says as much."""
    if len(report.layers) == 1:
        return None
    layers = [layer.index for layer in report.layers]
    seconds = [layer.seconds for layer in report.layers]
    return layer_bars("seconds", layers, seconds, "seconds", "seconds by decoder layer")
