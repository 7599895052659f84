"""Write a checkpoint shard by shard into a work folder; only the whole checkpoint gets its name.

Each shard: temporary file → fsync → rename. The index is written last, then the folder is renamed. A run that ends
early leaves at most `NAME.partial`, without an index, which no program takes for a model. It stays if it has a state
(`state.py`) from which the run can go on. One thread writes while the next layer is computed.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors.torch import load_file
from torch import Tensor

from llm_barber.checkpoint.channel_order import ORDER_NAME
from llm_barber.checkpoint.durable import save_tensors, sync_file, write_durably
from llm_barber.checkpoint.hub import INDEX_NAME, SINGLE_NAME
from llm_barber.checkpoint.output import WorkFolder, check_output, give_name, unwritable
from llm_barber.checkpoint.packed import Packing, read_tensor
from llm_barber.checkpoint.packed_format import (
    CONFIGURATION,
    PACKED_INDEX,
    TABLE_KEY,
    Table,
    packed_configuration,
    packed_index,
    packed_name,
    plain_configuration,
)
from llm_barber.checkpoint.shards import ShardFile
from llm_barber.checkpoint.state import RunState, Shard, updated_name, write_state
from llm_barber.checkpoint.unfinished import take_up
from llm_barber.errors import NotFiniteError, OutputError


class CheckpointWriter:
    """An output folder in the making; a context manager, which removes it if there is nothing to resume.

    `state`: all that is durable, by this run or by the unfinished run that it goes on with. `lost`: names of the files
    that the unfinished run had finished, and that are missing or damaged.

    Args:
        output: the folder to make.
        shards: number of shards.
        overwrite: replace an existing output, at the very end, and an unfinished run at once.
        needed: bytes that the work folder will take, checked against the free disk space.
        key: the settings and files on which the result depends; a run goes on only with the same key.
        resume: go on with an unfinished run, if there is one.
        packing: packs each shard that is written; None: shards are plain.

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
        packing: Packing | None = None,
    ) -> None:
        self.output = output
        self._work_folder = WorkFolder(output)
        self.folder = self._work_folder.path
        self.shards = shards
        self.overwrite = overwrite
        self.needed = needed
        self.resume = resume
        self.packing = packing
        self.state = RunState(key=dict(key or {}))
        self.lost: list[str] = []
        self._written: dict[str, Shard] = {}
        self._companions: dict[str, str] = {}
        self._count = 0
        self._pool = ThreadPoolExecutor(1, "write behind")
        self._writing: Future[None] | None = None

    def __enter__(self) -> Self:
        check_output(self.output, self.overwrite, self.needed)
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
                self.wait_for_shards()
            except Exception as unwritten:
                error = error or unwritten  # the run's own error is reported
            if self.folder.exists() and (not self.resumable or isinstance(error, NotFiniteError)):
                self._work_folder.remove()
        finally:  # last: whoever holds the lock may take over the files in the folder
            self._pool.shutdown(wait=False)
            if self._writing is None:
                self._work_folder.lock.release()
            else:  # a second interruption may have left something that is still being written
                self._writing.add_done_callback(lambda _: self._work_folder.lock.release())
        if isinstance(error, OSError):
            raise unwritable(self.output, error, self.resumable) from error
        if error is not None and kind is None:
            raise error

    @property
    def resumable(self) -> bool:
        """True if another run can go on from here."""
        return self.state.begun and self.folder.exists()

    def wait_for_shards(self) -> None:
        """Wait until all that was begun is durable. An interruption ends the waiting, and not the writing.

        Raises:
            OSError: it could not be written.
        """
        if self._writing is not None:
            self._writing.result()

    def _begin(self, write: Callable[[], None]) -> None:
        """Begin to write, once all that was begun before is durable: memory holds one shard that is written."""
        self.wait_for_shards()
        self._writing = self._pool.submit(write)

    def _update_state(self, **changes: Any) -> None:
        state = self.state.model_copy(update={"shards": dict(self._written), **changes})
        write_state(self.folder, state)
        self.state = state  # only now: `state` must not claim what is not durable

    def keep(self, **changes: Any) -> None:
        """Make fields of the state durable that were found before the first layer is pruned.

        Raises:
            OSError: the state cannot be written.
        """
        self.wait_for_shards()
        self._update_state(**changes)

    def keep_order(self, order: bytes, **changes: Any) -> None:
        """Make the content of `channel-order.json` durable, and other fields of the state.

        Raises:
            OSError: a file cannot be written.
        """
        self.write_file(ORDER_NAME, order)
        self.keep(channel_order=hashlib.sha256(order).hexdigest(), **changes)

    def read_order(self) -> bytes | None:
        """The content of `channel-order.json` that the unfinished run made durable.

        None: it has none, or it is missing or damaged.
        """
        path = self.folder / ORDER_NAME
        if self.state.channel_order is None:
            return None
        content = path.read_bytes() if path.is_file() else b""
        return content if hashlib.sha256(content).hexdigest() == self.state.channel_order else None

    @property
    def next_is_written(self) -> bool:
        """True if the unfinished run has written the next shard."""
        name = self._name(self._count + 1)
        return name in self._written and name not in self.lost

    def skip_shard(self) -> None:
        """Leave the next shard as it is."""
        self._count += 1

    def read_shard(self, number: int) -> dict[str, Tensor]:
        """The tensors of a written shard, the first is 0, by their names in the checkpoint."""
        shard = ShardFile(self.folder / self._name(number + 1))
        if self.packing is None:
            return {name: shard.read(name).clone() for name in shard.stored}
        table = Table.model_validate_json(shard.metadata[TABLE_KEY])
        plain = (name for name in shard.stored if not name.endswith(table.suffixes))
        return {name: read_tensor(name, table, shard) for name in (*plain, *table.packed)}

    def read_updated(self, index: int) -> dict[str, Tensor]:
        """The updated weights of a finished layer, by linear; empty: they are the weights that were written."""
        name = updated_name(index)
        return load_file(self.folder / name) if name in self.state.updated else {}

    def _name(self, number: int) -> str:
        """Name of the file of a shard, the first is 1."""
        return self._plain_name(number) if self.packing is None else packed_name(self._plain_name(number))

    def _plain_name(self, number: int) -> str:
        return f"model-{number:05d}-of-{self.shards:05d}.safetensors"

    @property
    def shard_names(self) -> list[str]:
        """The shards so far, all written."""
        self.wait_for_shards()
        return list(self._written)

    def write_shard(
        self, tensors: Mapping[str, Tensor], name: str | None = None, metadata: dict[str, str] | None = None
    ) -> None:
        """Begin to write the next shard, once the shard before is durable.

        Args:
            tensors: by their names in the checkpoint; they must not change any more.
            name: of the file, before it is packed; None: by its number.
            metadata: of the file's header; None: as transformers writes it.

        Raises:
            OSError: the shard before could not be written.
        """
        self._count += 1
        self._begin(partial(self._write_shard, name or self._plain_name(self._count), _on_host(tensors), metadata))

    def finish_layer(
        self, number: int, tensors: Mapping[str, Tensor], updated: Mapping[str, Tensor], changes: Mapping[str, Any]
    ) -> None:
        """Begin to write a layer: its shard, its updated weights if there are any, then the state that names them.

        Args:
            number: of the shard, the first is 0.
            tensors: of the shard, by their names in the checkpoint; they must not change any more.
            updated: weights, by linear, that the activations went through in place of those in the shard.
            changes: fields of the state, with this layer's record in `layers`.

        Raises:
            OSError: what was begun before could not be written.
        """
        self._begin(partial(self._finish_layer, number + 1, _on_host(tensors), _on_host(updated), changes))

    def _finish_layer(
        self, number: int, tensors: dict[str, Tensor], updated: dict[str, Tensor], changes: Mapping[str, Any]
    ) -> None:
        digests = dict(self.state.updated)
        if updated:
            name = updated_name(len(self.state.layers))
            digests[name] = self._save(updated, name, None)
        self._write_shard(self._plain_name(number), tensors, None)
        self._update_state(updated=digests, **changes)

    def _write_shard(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None) -> None:
        """Write a shard, durably; `name`: of the file before it is packed."""
        file, stored, metadata = name, tensors, {"format": "pt"} if metadata is None else metadata
        if self.packing is not None:
            file, stored, metadata = self.packing.pack(file, tensors, metadata)
        digest = self._save(stored, file, metadata)
        size = sum(tensor.nbytes for tensor in tensors.values())
        self._written[file] = Shard(sha256=digest, tensors=tuple(tensors), bytes=size)

    def _save(self, tensors: dict[str, Tensor], name: str, metadata: dict[str, str] | None) -> str:
        """Write a file of tensors, durably; returns its sha256."""
        temporary = self.folder / f"{name}.tmp"
        save_tensors(tensors, temporary, metadata)
        digest = sync_file(temporary)
        temporary.rename(self.folder / name)
        return digest

    def write_file(self, name: str, content: bytes) -> None:
        """Write a small file, durably."""
        write_durably(self.folder / name, content)

    def copy(self, path: Path, folder: Path, content: bytes | None = None) -> None:
        """Copy a companion file of `folder` under its name there; with `content` in place of its own if given.

        A config.json says that the weights are packed, or does not say so, whatever it said before.

        Raises:
            OSError: a shard could not be written, or the file.
        """
        content = path.read_bytes() if content is None else content
        name = path.relative_to(folder).as_posix()
        if path.parent != folder:
            (self.folder / name).parent.mkdir(exist_ok=True)
        if name == CONFIGURATION:
            packed = self.packing is not None
            content = packed_configuration(content, self.shard_names) if packed else plain_configuration(content)
        self.write_file(name, content)
        self._companions[name] = hashlib.sha256(content).hexdigest()

    @property
    def digests(self) -> dict[str, str]:
        """sha256 of every shard, the index and every companion."""
        shards = {name: self._written[name].sha256 for name in self.shard_names}
        index = {name: hashlib.sha256(content).hexdigest() for name, content in self._index.items()}
        return {**shards, **index, **self._companions}

    @property
    def _index(self) -> dict[str, bytes]:
        """Name and content of the index; empty: a single shard that has the name of a whole model needs none."""
        weight_map = {tensor: name for name in self.shard_names for tensor in self._written[name].tensors}
        if self.packing is not None:
            return {PACKED_INDEX: packed_index(weight_map, self.packing.version)}
        if [*self._written] == [SINGLE_NAME]:
            return {}
        size = sum(shard.bytes for shard in self._written.values())
        content = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        return {INDEX_NAME: (json.dumps(content, indent=2) + "\n").encode()}

    def finish(self) -> None:
        """Write the index and give the folder its name; the state goes last, so that a kill loses nothing.

        Raises:
            OutputError: the output has come into existence meanwhile, or a shard is missing.
        """
        self.wait_for_shards()
        check_output(self.output, self.overwrite)
        for name in self._written:
            if not (self.folder / name).is_file():
                raise OutputError(
                    f"{name} is not in {self.folder} any more", "go on with --resume, which makes it again"
                )
        for name, content in self._index.items():
            self.write_file(name, content)
        if updated := self.state.updated:
            self._update_state(updated={})  # first: a run that resumes now must not miss the files
            for name in updated:
                (self.folder / name).unlink()
        give_name(self.folder, self.output)


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors in host memory, by name; those that are there already are not copied."""
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
