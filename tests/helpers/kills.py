"""Kill a run, as by kill -9, at a chosen point of what makes a layer durable."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llm_barber.checkpoint import activation_writer, state
from llm_barber.checkpoint import writer as writer_module
from llm_barber.checkpoint.activation_writer import ActivationWriter
from llm_barber.checkpoint.writer import CheckpointWriter
from llm_barber.run import stream as run_module
from tests.helpers.runs import run
from tests.soak.children import KILLED

OUTSIDE = 1  # shards before the first layer's


def die_in_shard(layer: int) -> None:
    """Leave the first half of a layer's shard."""
    sync_file = writer_module.sync_file

    def dying(path: Path) -> str:
        if f"-{OUTSIDE + layer + 1:05d}-of-" in path.name:
            _leave_half(path)
        return sync_file(path)

    writer_module.sync_file = dying


def die_before_state(layer: int) -> None:
    """Leave a layer's shard, of which the state knows nothing."""
    finish = CheckpointWriter._finish_layer

    def dying(self: CheckpointWriter, *values: Any) -> None:
        if len(self.state.layers) == layer:
            os._exit(KILLED)
        finish(self, *values)

    CheckpointWriter._finish_layer = dying  # type: ignore[method-assign]


def die_in_state(layer: int) -> None:
    """Leave the first half of the state that has a layer, beside the state before."""
    write_state = writer_module.write_state

    def dying(folder: Path, new: state.RunState) -> None:
        if len(new.layers) <= layer:
            write_state(folder, new)
            return
        if (folder / state.STATE_NAME).exists():
            (folder / state.STATE_NAME).rename(folder / state.STATE_BEFORE)
        (folder / f"{state.STATE_NAME}.tmp").write_text(new.model_dump_json()[:99])
        os._exit(KILLED)

    writer_module.write_state = dying


def die_before_activations(layer: int) -> None:
    """Leave a layer's shard and, unless this waits for the activations, the state; no activations after the layer."""
    save = ActivationWriter._save

    def dying(self: ActivationWriter, layers: int, after: Any) -> None:
        if layers == layer + 1:
            after.result()
            os._exit(KILLED)
        save(self, layers, after)

    ActivationWriter._save = dying  # type: ignore[method-assign]


def die_in_activations(layer: int) -> None:
    """Leave the first half of the activations after a layer, and else as much of the layer as before them."""
    save = ActivationWriter._save

    def dying(self: ActivationWriter, layers: int, after: Any) -> None:
        if layers == layer + 1:
            after.result()
            saved = activation_writer.save_activations(self._folder, layers, self._streams, self._unneeded)
            path = self._folder / saved.file
            _leave_half(path.rename(path.with_name(f"{path.name}.tmp")))
        save(self, layers, after)

    ActivationWriter._save = dying  # type: ignore[method-assign]


def die_before_claim(layer: int) -> None:
    """Leave the activations after a layer, of which the state knows nothing."""
    claim = CheckpointWriter._claim_activations

    def dying(self: CheckpointWriter, newest: Any) -> None:
        if newest.layers == layer + 1:
            os._exit(KILLED)
        claim(self, newest)

    CheckpointWriter._claim_activations = dying  # type: ignore[method-assign]


def die_in_next_layer(layer: int) -> None:
    """Leave whatever is written of a layer when the next layer begins."""
    prune_layer = run_module.prune_layer

    def dying(job: Any, index: int, *rest: Any) -> Any:
        if index == layer + 1:
            os._exit(KILLED)
        return prune_layer(job, index, *rest)

    run_module.prune_layer = dying


def _leave_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)
    os._exit(KILLED)


def run_killed(die: Callable[[int], None], layer: int, *arguments: Any, **settings: Any) -> None:
    """Run in a process that dies where `die` says of a layer; the input of every layer is kept, or begun to be."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)

        def begin(self: CheckpointWriter, _: int) -> bool:
            self._activations.wait()
            return True

        CheckpointWriter.begin_activations = begin  # type: ignore[method-assign]
        die(layer)
        try:
            run(*arguments, **settings)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == KILLED
