"""The writer as the run sees it: the first process writes the output, other processes nothing."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from torch import Tensor

from llm_barber.checkpoint.state import RunState, Used


class Writer(Protocol):
    """An output in the making.

    `CheckpointWriter` or `PackedWriter` on the first process, `Follower` on other processes.

    `state`: what is finished. `lost`: files of an unfinished run that are damaged or missing.
    """

    folder: Path
    state: RunState
    lost: list[str]

    def __enter__(self) -> Self:
        """Take over what an unfinished run left in the work folder, or clear it."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Keep finished layers for a run that resumes this one, or remove the work folder."""
        ...

    @property
    def resumable(self) -> bool:
        """True if another run could resume from here."""
        ...

    @property
    def saving(self) -> bool:
        """True while activations are being written."""
        ...

    @property
    def unwritten(self) -> tuple[Tensor, ...]:
        """Arrays of activations that are being written, and must not change."""
        ...

    @property
    def digests(self) -> dict[str, str]:
        """sha256 of each file of the output, by name."""
        ...

    @property
    def next_is_written(self) -> bool:
        """True if the run that this one resumes has written the next shard."""
        ...

    def read_activations(self) -> tuple[int, dict[str, Tensor]]:
        """Activations after the last layer for which they are whole, and the number of layers before them."""
        ...

    def read_shard(self, number: int) -> dict[str, Tensor]:
        """Tensors of a written shard (counted from 0), by their names in the checkpoint."""
        ...

    def skip_shard(self) -> None:
        """Leave the next shard as it is."""
        ...

    def write_shard(self, tensors: Mapping[str, Tensor]) -> None:
        """Begin to write the next shard; the tensors must not change any more. Waits for the shard before."""
        ...

    def keep_sparsities(self, sparsities: Mapping[str, float], seconds: Mapping[str, float], used: Used) -> None:
        """Begin to make an allocation durable."""
        ...

    def keep_order(self, order: bytes, seconds: Mapping[str, float], used: Used) -> None:
        """Begin to make the content of `channel-order.json` durable."""
        ...

    def read_order(self) -> bytes | None:
        """The content of `channel-order.json` that the run that this one resumes found; None: none that is whole."""
        ...

    def finish_layer(self, result: Mapping[str, Any], seconds: Mapping[str, float], used: Used) -> None:
        """Begin to make a layer durable, after its shard."""
        ...

    def begin_activations(self, layers: int) -> bool:
        """Decide whether to keep the activations after `layers` layers; if True, call `keep_activations` next."""
        ...

    def keep_activations(self, layers: int, streams: Mapping[str, Tensor]) -> None:
        """Begin to write the activations after `layers` layers, which must not change while they are `unwritten`."""
        ...

    def wait_for_shards(self) -> None:
        """Wait until all shards and all finished layers are durable."""
        ...

    def copy(self, path: Path, folder: Path, content: bytes | None = None) -> None:
        """Copy a companion file of `folder`; `content` replaces what it holds."""
        ...

    def write_file(self, name: str, content: bytes) -> None:
        """Write a small file, durably."""
        ...

    def finish(self) -> None:
        """Write the index and give the folder its name."""
        ...
