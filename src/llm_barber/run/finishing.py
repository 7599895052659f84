"""Finish an output: companion files, record, model card and page; warnings about results."""

import json
from pathlib import Path

from llm_barber.checkpoint.channel_order import ORDER_NAME
from llm_barber.checkpoint.companions import CARD_NAME, PAGE_NAME, RECORD_NAME
from llm_barber.checkpoint.packed_format import CONFIGURATION, plain_configuration
from llm_barber.messages import ranges
from llm_barber.method.few_tokens import FEW_TOKENS
from llm_barber.model.empty import auto_class
from llm_barber.progress import Progress
from llm_barber.record.card import model_card
from llm_barber.record.layers import LayerResult
from llm_barber.record.report import CalibrationResult, RunReport
from llm_barber.run.output import RunOutput
from llm_barber.run.prepared_run import PreparedRun, kept_weights
from llm_barber.run.same_settings import recorded_settings
from llm_barber.settings.base import absolute_if_there
from llm_barber.usage import versions

LEAST_TOKENS_WITH_SINKS = 32  # in a window: in shorter ones the largest token's share says nothing


def finish_output(output: RunOutput) -> RunReport:
    """Write companion files, record, model card and page; give the complete output its name."""
    prepared, writer, order = output.prepared, output.writer, output.job.source.order
    if writer is None:  # another process writes
        return _report(output, {})
    folder = output.job.source.folder
    for path in output.job.source.companions():
        if path.name == ORDER_NAME:  # the dense model's own: what follows is that of this run
            continue
        untied = output.job.prunes_head and path.name == CONFIGURATION
        writer.copy(path, folder, _untied(path) if untied else None)
    if order is not None:
        writer.copy(Path(ORDER_NAME), Path(), order.to_json())
    report = _report(output, writer.digests)
    writer.write_file(RECORD_NAME, report.to_json().encode())
    writer.write_file(CARD_NAME, model_card(report).encode())
    if prepared.config.report:
        from llm_barber.page.run_page import run_page  # matplotlib takes a second to import

        writer.write_file(PAGE_NAME, run_page(report).encode())
    writer.finish()
    return report


def _report(output: RunOutput, digests: dict[str, str]) -> RunReport:
    """The record of a run; `digests`: sha256 of each file of the output, by name."""
    prepared, job, used = output.prepared, output.job, output.used
    rebuilt, refined = prepared.rebuild_settings, prepared.refine_settings
    sequences, seqlen = job.tokens.input_ids.shape
    return RunReport(
        command=prepared.command,
        model=absolute_if_there(prepared.model),
        output=str(prepared.config.output),
        settings=recorded_settings(prepared.config),
        resolved=prepared.resolved,
        initial=prepared.method,
        method=prepared.label,
        pattern=_common_pattern(output.results),
        granularity=rebuilt.granularity if rebuilt else None,
        rebuild_ratio=rebuilt.ratio if rebuilt else None,
        refinement=prepared.refinement,
        held_out=refined.held_out if refined else 0,
        allocation=prepared.allocation,
        kept_weights=kept_weights(prepared.config),
        loaded_by=auto_class(job.skeleton.model.config).__name__,
        calibration=CalibrationResult(
            source=job.tokens.source,
            sequences=sequences,
            tokens=seqlen,
            first_token=job.tokens.first_token,
            sha256=job.tokens.digest,
        ),
        device=str(job.skeleton.device),
        dtype=str(job.skeleton.dtype).removeprefix("torch."),
        versions=versions(),
        processes=job.ranks.count,
        layers=tuple(output.results),
        seconds=output.clock.seconds,
        peak_memory=used.peak_memory,
        peak_device_memory=used.peak_device_memory,
        files=digests,
        source=prepared.source_files,
        pruned_source=prepared.pruned_files,
    )


def warn_of_results(prepared: PreparedRun, report: RunReport, progress: Progress) -> None:
    """Warn of results that a user would not expect."""
    if sinks := layers_ruled_by_one_token(report):
        layers = "layer" if len(sinks) == 1 else "layers"
        page = f"; {PAGE_NAME} has its share by layer" if prepared.config.report else ""
        progress.warn(
            "after tuning, one token of each window has more than half of the remaining distance in "
            f"{len(sinks)} {layers} of {len(report.layers)} ({ranges(sinks)}). Nothing has to be done: mostly it is "
            "an attention sink, the first token with huge states, and tuning does not let it outvote the other tokens "
            f"(docs/method/tuning.md, attention sinks){page}"
        )
    idle_experts = {
        (layer.index, linear.name.rpartition(".")[0])
        for layer in report.layers
        for linear in layer.linears
        if linear.few_tokens
    }
    if idle_experts:
        masks = "those of magnitude" if prepared.command == "prune" else "left as they were"
        progress.warn(
            f"{len(idle_experts)} experts were given fewer than {FEW_TOKENS} calibration tokens: their masks are "
            f"{masks}; more --samples reach more of them"
        )
    if prepared.rebuild_settings is not None and report.swapped == 0:
        progress.warn(
            "the rebuild swapped nothing: in comparison groups of this size, ratio "
            f"{prepared.rebuild_settings.ratio:g} of the beneficial pairs is less than one; try --rebuild-ratio 0.1"
        )


def layers_ruled_by_one_token(report: RunReport) -> list[int]:
    """Tuned layers where one token of each held-out window has most of the remaining distance.

    In windows of a few tokens that is nothing special: the list is empty then.
    """
    if report.calibration.tokens < LEAST_TOKENS_WITH_SINKS:
        return []
    return [layer.index for layer in report.layers if layer.concentration and layer.concentration.token_after > 0.5]


def _untied(path: Path) -> bytes:
    """Content of a configuration whose output head no longer shares the embedding's weights."""
    content = json.loads(plain_configuration(path.read_bytes()))
    return (json.dumps({**content, "tie_word_embeddings": False}, indent=2, ensure_ascii=False) + "\n").encode()


def _common_pattern(layers: list[LayerResult]) -> str:
    """N:M of all pruned linears, "unstructured" (also if nothing was pruned), or "mixed"."""
    patterns = {linear.pattern or "unstructured" for layer in layers for linear in layer.linears if linear.pruned}
    return "mixed" if len(patterns) > 1 else next(iter(patterns), "unstructured")
