"""The option `--dry-run`: check and describe a run without running it."""

from contextlib import nullcontext
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from llm_barber.checkpoint.companions import LOCK_NAME
from llm_barber.checkpoint.folder import locked
from llm_barber.checkpoint.output import check_output, work_folder
from llm_barber.checkpoint.unfinished import unfinished_run
from llm_barber.messages import counted
from llm_barber.model.device import current_gpu_kept
from llm_barber.parallel.ranks import Ranks
from llm_barber.progress import Progress, Silent
from llm_barber.run.activation_memory import least_memory, left_for_activations
from llm_barber.run.commands import PREPARE
from llm_barber.run.finished import finished_run, tell_of_finished
from llm_barber.run.prepared_run import PreparedRun
from llm_barber.run.resume_key import resume_key
from llm_barber.settings.prune import PruneConfig, RebuildConfig
from llm_barber.settings.refining import RefineSettings
from llm_barber.usage import readable_bytes


class DryRun(BaseModel):
    """A checked run.

    `output_bytes`: of the checkpoint. `activation_file_bytes`: of updated weights that the work folder keeps.
    `stream_bytes`: of all calibration activations. `least_memory`: bound of the host memory that the run takes besides.
    `finished_layers`: of the unfinished run that this run would resume.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    output: str
    architecture: str
    layers: int
    linears: int
    weights: int
    method: str
    pattern: str
    granularity: str | None
    rebuild_ratio: float | None
    allocation: str
    reorders: bool
    refinement: str | None
    calibration: str
    sequences: int
    tokens: int
    batch_size: int
    device: str
    dtype: str
    output_bytes: int
    activation_file_bytes: int
    stream_bytes: int
    least_memory: int
    finished_layers: int

    def to_json(self) -> str:
        """Indented JSON with a final newline."""
        return self.model_dump_json(indent=1) + "\n"

    def rows(self) -> list[tuple[str, str]]:
        """Rows of the table that is shown: names and values."""
        finished = self.finished_layers
        rebuilt = f"within each {self.granularity}, ratio {self.rebuild_ratio:g}" if self.granularity else "no"
        return [
            ("model", f"{self.model} ({self.architecture}, {self.layers} decoder layers)"),
            ("to prune", f"{self.linears} linears with {self.weights:,} weights, {self.pattern}"),
            ("initial mask", self.method),
            ("sparsity of linears", "the same" if self.allocation == "uniform" else f"by {self.allocation}"),
            ("order of channels", "chosen for N:M" if self.reorders else "the dense model's"),
            ("rebuild", rebuilt),
            ("refining", self.refinement or "no"),
            ("calibration", f"{self.calibration}: {self.sequences} windows of {self.tokens} tokens"),
            ("compute", f"{self.dtype} on {self.device}, {counted(self.batch_size, 'window')} at a time"),
            ("output", readable_bytes(self.output_bytes)),
            ("disk during the run", readable_bytes(self.output_bytes + self.activation_file_bytes)),
            ("calibration activations", readable_bytes(self.stream_bytes)),
            ("memory beside them", f"at most {readable_bytes(self.least_memory, 1024)}"),
            *([("goes on", f"after {finished} of {self.layers} layers, if their files are whole")] if finished else []),
        ]


def dry_run(config: PruneConfig | RebuildConfig, progress: Progress | None = None) -> DryRun:
    """Check everything that `prune` or `rebuild` checks before its first layer; writes nothing.

    Raises:
        BarberError: as `prune` and `rebuild`.
    """
    progress = progress or Silent()
    complete = finished_run(config, progress)
    if complete is not None:
        tell_of_finished(config, complete, progress)
        config = config.model_copy(update={"overwrite": True})  # or the complete output would be in the way
    with current_gpu_kept():
        prepared = PREPARE[config.command](config, progress, Ranks())
    prepared.warn_of_settings(progress)
    job, rebuilt = prepared.job, prepared.rebuild_settings
    check_output(config.output, config.overwrite, job.bytes + prepared.updated_bytes)
    if config.memory is not None:
        left_for_activations(prepared, config.memory)
    lock = work_folder(config.output) / LOCK_NAME
    with locked(lock) if lock.is_file() else nullcontext():  # refuses a folder that another run is writing
        key, resumes = resume_key(prepared), config.resume and complete is None
        unfinished = unfinished_run(lock.parent, key, config.overwrite, resumes)
    finished_layers = 0 if unfinished is None else min(len(unfinished.layers), job.layer_count)
    shapes = _pruned_shapes(prepared)
    sequences, tokens = job.tokens.input_ids.shape
    arrays = RefineSettings.arrays(prepared.refine_settings)
    return DryRun(
        model=prepared.model,
        output=str(Path(config.output)),
        architecture=job.source.model_type,
        layers=job.layer_count,
        linears=len(shapes),
        weights=sum(rows * columns for rows, columns in shapes),
        method=prepared.label,
        pattern=prepared.initial_masks.target_words,
        granularity=rebuilt.granularity if rebuilt else None,
        rebuild_ratio=rebuilt.ratio if rebuilt else None,
        allocation=prepared.allocation,
        reorders=prepared.reorders,
        refinement=prepared.refinement,
        calibration=job.tokens.source,
        sequences=sequences,
        tokens=tokens,
        batch_size=job.batch_size,
        device=str(job.skeleton.device),
        dtype=str(job.skeleton.dtype).removeprefix("torch."),
        output_bytes=job.bytes,
        activation_file_bytes=prepared.updated_bytes,
        stream_bytes=arrays * prepared.array_bytes,
        least_memory=least_memory(prepared),
        finished_layers=finished_layers if complete is None else job.layer_count,
    )


def _pruned_shapes(prepared: PreparedRun) -> list[tuple[int, ...]]:
    """Shapes, (out, in), of all linears that the run may prune."""
    job, shapes = prepared.job, prepared.job.linear_shapes(prepared.job.source)
    pruned = [
        shapes[f"{job.linear_name(index, name)}.weight"]
        for index in range(job.layer_count)
        for name in prepared.initial_masks.linears(index)
    ]
    return [*pruned, tuple(job.skeleton.head.weight.shape)] if job.prunes_head else pruned
