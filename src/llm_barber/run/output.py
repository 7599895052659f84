"""The output of a run in the making: what is finished, and what becomes durable next.

The first process writes; the other processes have no writer, and get what the first one has read.
"""

import hashlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace

from pydantic import ValidationError
from torch import Tensor

from llm_barber.checkpoint.channel_order import ORDER_NAME
from llm_barber.checkpoint.output import unwritable
from llm_barber.checkpoint.packed import Packing
from llm_barber.checkpoint.state import START_AGAIN, STATE_NAME, RunState, Used
from llm_barber.checkpoint.writer import CheckpointWriter
from llm_barber.errors import NotFiniteError, UnfinishedRunError
from llm_barber.method.layer import PrunedLayer
from llm_barber.progress import Progress
from llm_barber.record.layers import LayerResult
from llm_barber.run.prepared_run import PreparedRun
from llm_barber.run.resume_key import resume_key
from llm_barber.settings.base import Format
from llm_barber.usage import machine, peak_device_memory, peak_memory

STAGES = ("embed", "reorder", "allocate", "layers", "read", "write")


class Clock:
    """Seconds of a run by stage, with those of the unfinished run that it goes on with."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._stages = dict.fromkeys(STAGES, 0.0)

    def go_on(self, seconds: Mapping[str, float]) -> None:
        """Count from the seconds of the unfinished run."""
        self._began -= seconds.get("total", 0.0)
        self._stages |= {stage: seconds[stage] for stage in STAGES if stage in seconds}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the seconds within the context for a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._stages[name] += time.perf_counter() - start

    @property
    def total(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self._began

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each stage so far, and in total."""
        return {**self._stages, "total": self.total}


class RunOutput:
    """What a run has finished, on every process, and the writer of the process that writes.

    `prepared`: the run, with the batch size of the unfinished run, so that results are rounded alike. `state`: of the
    unfinished run. `lost`: its files that are missing or damaged. `results`: of all finished layers.

    Args:
        prepared: the run.
        writer: None on all processes but the first.
        clock: of the run.

    Raises:
        UnfinishedRunError: the state of the unfinished run is damaged.
    """

    def __init__(self, prepared: PreparedRun, writer: CheckpointWriter | None, clock: Clock) -> None:
        self.writer, self.clock = writer, clock
        unfinished = (writer.state, writer.lost) if writer else (RunState(key={}), [])
        self.state, self.lost = prepared.job.ranks.from_first(unfinished)
        try:
            self.results = [LayerResult.model_validate(layer) for layer in self.state.layers]
        except ValidationError as error:
            raise UnfinishedRunError(f"{STATE_NAME} of the unfinished run is damaged", START_AGAIN) from error
        self._records = list(self.state.layers)
        batch_size = self.state.used.batch_size
        if batch_size is not None and prepared.config.batch_size is None:
            prepared = replace(prepared, job=replace(prepared.job, batch_size=batch_size))
        self.prepared, self.job = prepared, prepared.job
        clock.go_on(self.state.seconds)

    @property
    def used(self) -> Used:
        """Memory, machine and batch size of this run and of the run that it goes on with."""
        device, before = self.job.skeleton.device, self.state.used
        device_peaks = [peak for peak in (peak_device_memory(device), before.peak_device_memory) if peak is not None]
        return Used(
            peak_memory=max(peak_memory(), before.peak_memory),
            peak_device_memory=max(device_peaks, default=None),
            batch_size=self.job.batch_size,
            machine=machine(device),
            written=self.job.source.written,
        )

    def write_outside(self, tensors: Mapping[str, Tensor]) -> None:
        """Begin to write the next shard of tensors outside the layers, unless it is there."""
        if self.writer is None:
            return
        if self.writer.next_is_written:
            self.writer.skip_shard()
        else:
            self.writer.write_shard(tensors)

    def keep_sparsities(self, sparsities: Mapping[str, float]) -> Mapping[str, float]:
        """Make the first process's allocation durable; returns it."""
        sparsities = self.job.ranks.from_first(sparsities)  # devices may round otherwise
        if self.writer is not None:
            self.writer.keep(sparsities=dict(sparsities), seconds=self.clock.seconds, used=self.used)
        return sparsities

    def read_order(self) -> bytes | None:
        """The content of `channel-order.json` that the unfinished run found; None: none that is whole."""
        content: bytes | None = self.job.ranks.from_first(self.writer.read_order() if self.writer else None)
        return content

    def keep_order(self, order: bytes) -> bytes:
        """Make the first process's content of `channel-order.json` durable; returns it.

        Raises:
            UnfinishedRunError: layers are finished with another order, which is lost.
        """
        order = self.job.ranks.from_first(order)  # devices may round otherwise
        if self.results and self.state.channel_order != hashlib.sha256(order).hexdigest():
            raise UnfinishedRunError(f"{ORDER_NAME} of the unfinished run is lost or damaged", START_AGAIN)
        if self.writer is not None:
            self.writer.keep_order(order, seconds=self.clock.seconds, used=self.used)
        return order

    def read_layer(self, index: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A finished layer by the checkpoint's names, and the updated weights that it ran with, by linear."""
        layer, updated = {}, {}
        if self.writer is not None:
            layer = self.writer.read_shard(len(self.job.outside_shards) + index)
            updated = self.writer.read_updated(index)
        ranks = self.job.ranks
        return ranks.tensors_from_first(layer), ranks.tensors_from_first(updated)

    def finish_layer(self, tensors: Mapping[str, Tensor], pruned: PrunedLayer, seconds: float) -> LayerResult:
        """Begin to make a pruned layer durable; it was read and computed in `seconds`."""
        result = LayerResult(
            index=len(self.results),
            seconds=seconds,
            held_out=pruned.held_out,
            concentration=pruned.concentration,
            blocks=tuple(pruned.blocks),
        )
        self.results.append(result)
        self._records.append(result.model_dump(mode="json"))
        if self.writer is not None:
            changes = {"layers": tuple(self._records), "seconds": self.clock.seconds, "used": self.used}
            number = len(self.job.outside_shards) + result.index
            self.writer.finish_layer(number, {**tensors, **pruned.weights}, pruned.updated, changes)
        return result

    def wait(self) -> None:
        """Wait until all that was begun is durable."""
        if self.writer is not None:
            self.writer.wait_for_shards()


@contextmanager
def open_output(prepared: PreparedRun, progress: Progress) -> Iterator[RunOutput]:
    """Open a run's output, and take up what an unfinished run left; when an error ends the run, say what is kept.

    Raises:
        OutputError: the output cannot be written, or the unfinished run is another one.
    """
    config, job, clock = prepared.config, prepared.job, Clock()
    if config.resume:
        progress.stage("checking what is finished")
    if not job.ranks.is_first:
        try:
            yield RunOutput(prepared, None, clock)
        except OSError as error:
            raise unwritable(config.output, error, resumable=True) from error
        return
    key, packing = resume_key(prepared), Packing() if config.format is Format.PACKED else None
    shards, needed = len(job.outside_shards) + len(job.steps), job.bytes + prepared.updated_bytes
    with CheckpointWriter(config.output, shards, config.overwrite, needed, key, config.resume, packing) as writer:
        try:
            yield RunOutput(prepared, writer, clock)
        except BaseException as error:
            with suppress(Exception):  # the run's own error is reported
                writer.wait_for_shards()
            if writer.resumable and not isinstance(error, NotFiniteError):
                _hint_at_resuming(writer, config.resume, progress)
            raise


def _hint_at_resuming(writer: CheckpointWriter, resumes: bool, progress: Progress) -> None:
    """Say what is kept, and how to go on; `resumes`: the same command does."""
    count = len(writer.state.layers)
    kept = f"{count} finished layer{'s are' if count > 1 else ' is'}"
    if not count:
        recorded = "order of channels" if writer.state.channel_order else "sparsity of each linear"
        kept = f"the {recorded} is"
    command = "the same command" if resumes else "the same command with --resume"
    progress.warn(f"{kept} kept in {writer.folder}: {command} goes on")
