"""Write a checkpoint shard by shard into a work folder beside the output, which appears under its name only when whole.

Each shard: temporary file → fsync → rename. The index is written last, then the folder is renamed. A run that ends
early leaves at most `NAME.partial`, without an index, which no program takes for a model; once a layer is finished it
stays, with the state (`state.py`) from which the run can go on. Activations are written while the next layer is
computed.
"""

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Self

from safetensors import safe_open
from torch import Tensor

from llm_barber.checkpoint.behind import WriteBehind
from llm_barber.checkpoint.companions import LOCK_NAME
from llm_barber.checkpoint.folder import make_locked
from llm_barber.checkpoint.hub import INDEX_NAME, SINGLE_NAME
from llm_barber.checkpoint.index import dense_index
from llm_barber.checkpoint.output import (
    check_output,
    clear,
    put_in_place,
    remove_work_folder,
    work_folder,
)
from llm_barber.checkpoint.state import (
    ACTIVATIONS_KEPT,
    STATE_BEFORE,
    STATE_NAME,
    RunState,
    Shard,
    Used,
    is_full,
    load_activations,
    mend_state,
    save_activations,
    save_tensors,
    sync_file,
    undamaged,
    unfinished_run,
    write_durably,
    write_state,
)
from llm_barber.errors import NotFiniteError, OutputError


class CheckpointWriter:
    """An output folder in the making; a context manager that cleans up when an error leaves it before its first layer.

    `state` is what is finished: of an earlier run, if this one goes on with it.

    Args:
        output: the folder to make.
        shards: how many there will be.
        overwrite: replace a folder that is there, at the very end, and an unfinished run now.
        needed: bytes that the checkpoint will take, checked against the free disk space.
        key: what the result depends on; a run goes on only with the same.
        resume: go on with an unfinished run, if there is one.
        repeatable: what the next layer starts from can be made again from what is written, and so need not be durable
            before a layer is finished.

    Raises:
        OutputError: the folder exists, another run is writing it, an unfinished one is there, or differs, or is
            damaged; the disk is too small or cannot be written.
    """

    def __init__(
        self,
        output: Path,
        shards: int,
        overwrite: bool,
        needed: int,
        key: Mapping[str, Any] | None = None,
        resume: bool = False,
        repeatable: bool = True,
    ) -> None:
        self.output = output
        self.work = work_folder(output)
        self.shards = shards
        self.overwrite = overwrite
        self.needed = needed
        self.resume = resume
        self.repeatable = repeatable
        self._companions: dict[str, str] = {}
        self.state = RunState(key=dict(key or {}))
        self._written: dict[str, Shard] = {}
        self.lost: list[str] = []  # what an unfinished run had finished, and is damaged
        self._count = 0
        self._behind = WriteBehind()
        self._updating = Lock()  # the state

    def __enter__(self) -> Self:
        check_output(self.output, self.overwrite, self.needed, self.resume)
        self._made_parents = [folder for folder in self.work.parents if not folder.exists()]
        try:
            self._lock = make_locked(self.work, LOCK_NAME, self.output)
        except OutputError:
            self._remove_parents()
            raise
        try:
            self._check_again()
            self._take_up()
        except BaseException:
            self._lock.close()
            raise
        return self

    def _check_again(self) -> None:
        """Another run may have finished the output before the lock was had.

        Raises:
            OutputError: it has.
        """
        try:
            check_output(self.output, self.overwrite)
        except OutputError:
            if [path.name for path in self.work.iterdir()] == [LOCK_NAME]:
                remove_work_folder(self.work)
            raise

    def _take_up(self) -> None:
        """Go on with what is in the work folder, refuse it, or clear it away."""
        left = unfinished_run(self.work, self.state.key, self.overwrite, self.resume)
        kept = {LOCK_NAME}
        if left is None and self.resume and any(self.work.glob("*.safetensors")):
            self.lost.append(STATE_NAME)
        if left is not None and self.resume:
            mend_state(self.work)
            whole, self.lost = undamaged(self.work, left)
            if whole.begun:  # otherwise all is made again
                self.state, self._written = whole, dict(whole.shards)
                kept |= {STATE_NAME, STATE_BEFORE, *whole.shards, *(one.file for one in whole.activations)}
        clear(self.work, {name for name in kept if (self.work / name).is_file()})

    @property
    def resumable(self) -> bool:
        """Could another run go on from here?"""
        return self.state.begun and self.work.exists()

    def read_activations(self) -> tuple[int, dict[str, Tensor]]:
        """What the streams held after the most finished layers, and after how many; 0: no file of them is whole.

        Later layers, if what they gave cannot be made again, are pruned again.
        """
        if self.state.layers and len(self._written) == self.shards:  # only to finish; they may be gone already
            return len(self.state.layers), {}
        reached, found = self._newest_activations()
        if not self.repeatable:
            self.state = self.state.of_first_layers(reached)
            self._written = dict(self.state.shards)
        return reached, found

    def _newest_activations(self) -> tuple[int, dict[str, Tensor]]:
        for kept in reversed(self.state.activations):
            found = load_activations(self.work, kept)
            if found is not None:
                return kept.layers, found
            self.lost.append(kept.file)
        return 0, {}

    def read_shard(self, number: int) -> dict[str, Tensor]:
        """The tensors of a shard that is written, the first is 0, by their names in the checkpoint."""
        path = self.work / self._name(number + 1)
        with safe_open(str(path), framework="pt") as handle:  # type: ignore[no-untyped-call]
            return self._tensors(handle)

    def _tensors(self, handle: Any) -> dict[str, Tensor]:
        """Those of an opened shard, as copies: no file stays mapped."""
        return {name: handle.get_tensor(name).clone() for name in handle.keys()}  # noqa: SIM118 - a handle

    def keep_sparsities(self, sparsities: Mapping[str, float], seconds: Mapping[str, float], used: Used) -> None:
        """Make an allocation durable, and the seconds so far: it can take as long as some layers."""
        changes = {"sparsities": dict(sparsities), "seconds": dict(seconds)}
        self._update_state(shards=dict(self._written), used=used, **changes)

    def finish_layer(self, result: Mapping[str, Any], seconds: Mapping[str, float], used: Used) -> None:
        """Make a layer durable whose shard is written."""
        layers = (*self.state.layers, dict(result))
        self._update_state(shards=dict(self._written), layers=layers, seconds=dict(seconds), used=used)

    def keep_activations(self, layers: int, streams: Mapping[str, Tensor]) -> None:
        """Make durable what the layer after so many starts from: meanwhile, if it could be made again.

        The arrays must not change until `wait_for_activations`.
        """
        self._behind.start(partial(self._save, layers, streams))
        if not self.repeatable:
            self.wait_for_activations()

    def _save(self, layers: int, streams: Mapping[str, Tensor]) -> None:
        saved = save_activations(self.work, layers, streams)
        before = (one for one in self.state.activations if one.layers < layers)
        kept = (*before, saved)[-ACTIVATIONS_KEPT:]
        self._update_state(activations=kept)
        for path in set(self.work.glob("activations-*")) - {self.work / one.file for one in kept}:
            path.unlink()

    @property
    def saving(self) -> bool:
        """Are activations being written?"""
        return self._behind.busy

    def wait_for_activations(self) -> None:
        """Until those that are being written are durable.

        Raises:
            OSError: they could not be.
        """
        self._behind.wait()

    def _update_state(self, **changes: Any) -> None:
        with self._updating:
            state = self.state.model_copy(update=changes)
            write_state(self.work, state)
            self.state = state  # what is told to be kept is

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with suppress(Exception):  # that of the run is told
                self.wait_for_activations()
            if self.work.exists() and (not self.resumable or isinstance(error, NotFiniteError)):
                with suppress(OSError):
                    remove_work_folder(self.work)
                self._remove_parents()
        finally:  # last: who has the lock may take what is in the folder for its own
            self._behind.when_done(self._lock.close)
        if isinstance(error, OSError):
            full = is_full(error)
            again = "go on with --resume" if self.resumable else "start again; nothing half-written was left"
            raise OutputError(
                f"the disk of {self.output} is full" if full else f"cannot write {self.output}: {error}",
                f"{'free some space' if full else 'check the disk'} and {again}",
            ) from error

    @property
    def next_is_written(self) -> bool:
        """Has the run that this one goes on with written the next shard?"""
        name = self._name(self._count + 1)
        return name in self._written and name not in self.lost

    def skip_shard(self) -> None:
        """Leave the next shard as it is."""
        self._count += 1

    def _name(self, number: int) -> str:
        return f"model-{number:05d}-of-{self.shards:05d}.safetensors"

    @property
    def shard_names(self) -> list[str]:
        """Files written so far."""
        return list(self._written)

    def write_shard(
        self, tensors: Mapping[str, Tensor], name: str | None = None, metadata: dict[str, str] | None = None
    ) -> None:
        """Write the next shard; tensors go by their names in the checkpoint, the file by its number, unless named.

        Raises:
            OSError: the disk is full.
        """
        self._count += 1
        name = name or self._name(self._count)
        temporary = self.work / f"{name}.tmp"
        save_tensors(
            {key: tensor.cpu().contiguous() for key, tensor in tensors.items()},
            temporary,
            {"format": "pt"} if metadata is None else metadata,
        )
        digest = sync_file(temporary)
        temporary.rename(self.work / name)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        self._written[name] = Shard(sha256=digest, tensors=tuple(tensors), bytes=size)

    def write_file(self, name: str, content: bytes) -> None:
        """Write a small file, durably."""
        write_durably(self.work / name, content)

    def copy(self, path: Path, folder: Path, content: bytes | None = None) -> None:
        """Copy a companion file of a folder under its name there; `content`: what it holds now, if not that."""
        content = path.read_bytes() if content is None else content
        name = path.relative_to(folder).as_posix()
        if path.parent != folder:
            (self.work / name).parent.mkdir(exist_ok=True)
        self.write_file(name, content)
        self._companions[name] = hashlib.sha256(content).hexdigest()

    @property
    def digests(self) -> dict[str, str]:
        """sha256 of every shard, of the index and of every companion; of a packed checkpoint as it is unpacked."""
        shards = {shard.file or name: shard.file_sha256 or shard.sha256 for name, shard in self._written.items()}
        index = {} if [*shards] == [SINGLE_NAME] else {INDEX_NAME: hashlib.sha256(self._index).hexdigest()}
        return {**shards, **index, **self._companions}

    @property
    def _index(self) -> bytes:
        """Content of the index; of a packed checkpoint as it is unpacked."""
        shards = self._written.items()
        weight_map = {tensor: shard.file or name for name, shard in shards for tensor in shard.tensors}
        return dense_index(weight_map, sum(shard.bytes for _, shard in shards))

    def finish(self, with_index: bool = True) -> None:
        """Write the index and give the folder its name; the state goes last, so that a kill loses nothing.

        A single shard that has the name of a whole model needs no index.

        Raises:
            OutputError: something else has come to be in the output's place meanwhile, or a shard is gone.
        """
        with suppress(Exception):  # the layer that started from them is finished
            self.wait_for_activations()
        check_output(self.output, self.overwrite)
        for name in self._written:
            if not (self.work / name).is_file():
                raise OutputError(f"{name} is not in {self.work} any more", "go on with --resume, which makes it again")
        if with_index and self.shard_names != [SINGLE_NAME]:
            self.write_file(INDEX_NAME, self._index)
        for path in self.work.glob("activations-*"):
            path.unlink()
        put_in_place(self.work, self.output)

    def _remove_parents(self) -> None:
        """Remove the folders that were made for the work folder, as far as they are empty."""
        with suppress(OSError):
            for folder in self._made_parents:
                folder.rmdir()
