"""Write a checkpoint shard by shard into a work folder; only the whole checkpoint gets its name.

Each shard: temporary file → fsync → rename. The index is written last, then the folder is renamed. A run that ends
early leaves at most `NAME.partial`, without an index, which no program takes for a model. It stays if it has a state
(`state.py`) from which the run can go on. Two threads write while the next layers are computed (`behind.py`).
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

from llm_barber.checkpoint.activation_writer import ActivationWriter
from llm_barber.checkpoint.activations import Activations, newest_activations
from llm_barber.checkpoint.behind import WriteBehind
from llm_barber.checkpoint.channel_order import ORDER_NAME
from llm_barber.checkpoint.durable import save_tensors, sync_file, write_durably
from llm_barber.checkpoint.host_copies import start_copies
from llm_barber.checkpoint.hub import INDEX_NAME, SINGLE_NAME
from llm_barber.checkpoint.index import index_of
from llm_barber.checkpoint.output import check_output, give_name, unwritable
from llm_barber.checkpoint.packed_configuration import CONFIGURATION, plain_configuration
from llm_barber.checkpoint.state import ACTIVATIONS_KEPT, RunState, Shard, Used, write_state
from llm_barber.checkpoint.unfinished import take_up
from llm_barber.checkpoint.work_folder import WorkFolder
from llm_barber.errors import NotFiniteError, OutputError


class CheckpointWriter:
    """An output folder in the making; a context manager, which removes it if there is nothing to resume.

    `state`: all that is finished, by this run or by the unfinished run that it goes on with. `lost`: names of the files
    that the unfinished run had finished, and that are missing or damaged.

    Args:
        output: the folder to make.
        shards: number of shards.
        overwrite: replace an existing output, at the very end, and an unfinished run at once.
        needed: bytes that the checkpoint will take, checked against the free disk space.
        key: the settings and files on which the result depends; a run goes on only with the same key.
        resume: go on with an unfinished run, if there is one.
        repeatable: the activations after a layer can be made again from its shard, and so need not be durable before
            the next layer is finished.
        activations: bytes of all files of activations that the work folder holds at once.

    Raises:
        OutputError: the folder exists, another run is writing it, or there is an unfinished run, which has another key
            or is damaged; the disk is too small or cannot be written.
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
        activations: int = 0,
    ) -> None:
        self.output = output
        self._work_folder = WorkFolder(output)
        self.folder = self._work_folder.path
        self.shards = shards
        self.overwrite = overwrite
        self.needed = needed
        self.resume = resume
        self.repeatable = repeatable
        self.activations = activations
        self.state = RunState(key=dict(key or {}))
        self.lost: list[str] = []
        self._state_lock = Lock()
        self._written: dict[str, Shard] = {}
        self._companions: dict[str, str] = {}
        self._count = 0
        self._shards, self._activations = WriteBehind(), ActivationWriter(self.folder, self._claim_activations)

    def __enter__(self) -> Self:
        check_output(self.output, self.overwrite, self.needed, self.resume, self.activations)
        self._work_folder.make(self.overwrite)
        try:
            state, self.lost = take_up(self.folder, self.state.key, self.overwrite, self.resume)
        except BaseException:
            self._work_folder.lock.release()
            raise
        if state is not None:
            self.state, self._written = state, dict(state.shards)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            try:
                self._shards.wait()
            except OSError as unwritten:
                error = error or unwritten  # the run's own error is reported
            except RuntimeError:  # a GPU's copy
                if error is None:
                    raise
            with suppress(Exception):
                self._activations.wait()
            if self.folder.exists() and (not self.resumable or isinstance(error, NotFiniteError)):
                with suppress(OSError):
                    self._work_folder.remove()
                self._work_folder.remove_parents()
        finally:  # last: whoever holds the lock may take over the files in the folder
            self._shards.when_done(partial(self._activations.when_done, self._work_folder.lock.release))
        if isinstance(error, OSError):
            raise unwritable(self.output, error, self.resumable) from error

    @property
    def resumable(self) -> bool:
        """Tell whether another run can go on from here."""
        return self.state.begun and self.folder.exists()

    def read_activations(self) -> tuple[int, dict[str, Tensor]]:
        """The newest activations that are whole, and the number of layers they have passed; 0: there are none.

        Later layers are pruned again, unless their activations can be made from their shards.
        """
        if self.state.layers and len(self._written) == self.shards:  # only the end is missing; they may be gone already
            return len(self.state.layers), {}
        reached, activations, lost = newest_activations(self.folder, self.state.activations)
        self.lost += lost
        if not self.repeatable:
            self.state = self.state.of_first_layers(reached)
            self._written = dict(self.state.shards)
        return reached, activations

    def begin_activations(self, layers: int) -> bool:
        """Tell whether to keep the activations after the first `layers` layers; if so, this must be done next.

        They must be kept where they are not repeatable; otherwise seldom enough that no layer waits for them.
        """
        return not self.repeatable or self._activations.begin_if_due(layers)

    def keep_activations(self, layers: int, streams: Mapping[str, Tensor]) -> None:
        """Begin to write the activations after the first `layers` layers; they must not change while `unwritten`."""
        self._activations.start(layers, streams, self._shards.last)
        if not self.repeatable:
            self._activations.wait()

    def _claim_activations(self, newest: Activations) -> None:
        before = (saved for saved in self.state.activations if saved.layers < newest.layers)
        activations = (*before, newest)[-ACTIVATIONS_KEPT:]
        self._update_state(activations=activations)
        for path in set(self.folder.glob("activations-*")) - {self.folder / saved.file for saved in activations}:
            path.unlink()

    @property
    def saving(self) -> bool:
        """Tell whether activations are being written."""
        return self._activations.busy

    @property
    def unwritten(self) -> tuple[Tensor, ...]:
        """Arrays that are being written, and must not change."""
        return self._activations.unwritten

    def wait_for_shards(self) -> None:
        """Wait until all shards, and the layers that were finished, are durable."""
        self._shards.wait()

    def keep_sparsities(self, sparsities: Mapping[str, float], seconds: Mapping[str, float], used: Used) -> None:
        """Begin to make an allocation durable, and the seconds so far: it can take as long as some layers."""
        changes = {"sparsities": dict(sparsities), "seconds": dict(seconds), "used": used}
        self._shards.start(lambda: self._update_state(shards=dict(self._written), **changes))

    def keep_order(self, order: bytes, seconds: Mapping[str, float], used: Used) -> None:
        """Begin to make the content of `channel-order.json` durable, and the seconds so far."""
        self._shards.start(partial(self._keep_order, order, dict(seconds), used))

    def _keep_order(self, order: bytes, seconds: dict[str, float], used: Used) -> None:
        self.write_file(ORDER_NAME, order)
        digest = hashlib.sha256(order).hexdigest()
        self._update_state(shards=dict(self._written), channel_order=digest, seconds=seconds, used=used)

    def read_order(self) -> bytes | None:
        """The content of `channel-order.json` that the unfinished run made durable.

        None: it has none, or it is missing or damaged.
        """
        path = self.folder / ORDER_NAME
        if self.state.channel_order is None:
            return None
        content = path.read_bytes() if path.is_file() else b""
        return content if hashlib.sha256(content).hexdigest() == self.state.channel_order else None

    def finish_layer(self, result: Mapping[str, Any], seconds: Mapping[str, float], used: Used) -> None:
        """Begin to make a layer durable, after its shard."""
        self._shards.start(partial(self._finish_layer, dict(result), dict(seconds), used))

    def _finish_layer(self, result: dict[str, Any], seconds: dict[str, float], used: Used) -> None:
        layers = (*self.state.layers, result)
        self._update_state(shards=dict(self._written), layers=layers, seconds=seconds, used=used)

    def _update_state(self, **changes: Any) -> None:
        with self._state_lock:  # both threads write it
            state = self.state.model_copy(update=changes)
            write_state(self.folder, state)
            self.state = state  # only now: `state` must not claim what is not durable

    @property
    def next_is_written(self) -> bool:
        """Tell whether the unfinished run has written the next shard."""
        name = self._name(self._count + 1)
        return name in self._written and name not in self.lost

    def skip_shard(self) -> None:
        """Leave the next shard as it is."""
        self._count += 1

    def read_shard(self, number: int) -> dict[str, Tensor]:
        """The tensors of a written shard, the first is 0, by their names in the checkpoint."""
        path = self.folder / self._name(number + 1)
        with safe_open(str(path), framework="pt") as handle:  # type: ignore[no-untyped-call]
            return self._tensors(handle)

    def _tensors(self, handle: Any) -> dict[str, Tensor]:
        """The tensors of an opened shard, copied, so that no file stays mapped."""
        return {name: handle.get_tensor(name).clone() for name in handle.keys()}  # noqa: SIM118 - a handle

    def _name(self, number: int) -> str:
        return f"model-{number:05d}-of-{self.shards:05d}.safetensors"

    @property
    def shard_names(self) -> list[str]:
        """The shards so far, all written."""
        self.wait_for_shards()
        return list(self._written)

    def write_shard(
        self,
        tensors: Mapping[str, Tensor],
        name: str | None = None,
        metadata: dict[str, str] | None = None,
        header: str | None = None,
    ) -> None:
        """Begin to write the next shard, once the shard before is durable.

        Args:
            tensors: by their names in the checkpoint; they must not change any more.
            name: of the file; None: by its number.
            metadata: of the file's header; None: as transformers writes it.
            header: text of the whole header, as of `save_tensors`.

        Raises:
            OSError: the shard before could not be written.
        """
        self.wait_for_shards()
        self._count += 1
        on_host, wait_for_copies = start_copies(tensors)
        self._shards.start(wait_for_copies)
        self._shards.start(partial(self._write_shard, self._count, on_host, name, metadata, header))

    def _write_shard(
        self,
        number: int,
        tensors: dict[str, Tensor],
        name: str | None,
        metadata: dict[str, str] | None,
        header: str | None,
    ) -> None:
        """Write a shard, durably."""
        name = name or self._name(number)
        temporary = self.folder / f"{name}.tmp"
        save_tensors(tensors, temporary, {"format": "pt"} if metadata is None else metadata, header)
        digest = sync_file(temporary)
        temporary.rename(self.folder / name)
        size = sum(tensor.nbytes for tensor in tensors.values())
        self._written[name] = Shard(sha256=digest, tensors=tuple(tensors), bytes=size)

    def write_file(self, name: str, content: bytes) -> None:
        """Write a small file, durably."""
        write_durably(self.folder / name, content)

    def copy(self, path: Path, folder: Path, content: bytes | None = None) -> None:
        """Copy a companion file of `folder` under its name there; with `content` in place of its own if given.

        A config.json loses the entry that says that its weights are packed.
        """
        content = path.read_bytes() if content is None else content
        name = path.relative_to(folder).as_posix()
        if path.parent != folder:
            (self.folder / name).parent.mkdir(exist_ok=True)
        if name == CONFIGURATION:
            content = plain_configuration(content)
        self.write_file(name, content)
        self._companions[name] = hashlib.sha256(content).hexdigest()

    @property
    def digests(self) -> dict[str, str]:
        """sha256 of every shard, the index and every companion; of a packed checkpoint's files as they unpack."""
        self.wait_for_shards()
        shards = {shard.file or name: shard.file_sha256 or shard.sha256 for name, shard in self._written.items()}
        index = {} if [*shards] == [SINGLE_NAME] else {INDEX_NAME: hashlib.sha256(index_of(self._written)).hexdigest()}
        return {**shards, **index, **self._companions}

    def finish(self, with_index: bool = True) -> None:
        """Write the index and give the folder its name; the state goes last, so that a kill loses nothing.

        A single shard that has the name of a whole model needs no index.

        Raises:
            OutputError: the output has come into existence meanwhile, or a shard is missing.
        """
        self.wait_for_shards()
        self._activations.stop()
        check_output(self.output, self.overwrite)
        for name in self._written:
            if not (self.folder / name).is_file():
                raise OutputError(
                    f"{name} is not in {self.folder} any more", "go on with --resume, which makes it again"
                )
        if with_index and self.shard_names != [SINGLE_NAME]:
            self.write_file(INDEX_NAME, index_of(self._written))
        for path in self.folder.glob("activations-*"):
            path.unlink()
        give_name(self.folder, self.output)
