"""The writer's counterpart in the processes of a run that write nothing."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from llm_barber.checkpoint.durable import is_full
from llm_barber.checkpoint.state import RunState, Used
from llm_barber.errors import OutputError


class Follower:
    """A writer that writes nothing; `state` comes from the process that writes."""

    next_is_written = True
    resumable = False
    saving = False
    unwritten: tuple[Tensor, ...] = ()

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = RunState(key={})
        self.digests: dict[str, str] = {}
        self.lost: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Explain a full disk; there is nothing to clean up.

        Raises:
            OutputError: the disk is too small for activations that do not fit the memory.
        """
        if isinstance(error, OSError) and is_full(error):
            raise OutputError(
                f"the disk of {error.filename} is full; activations that do not fit into --memory go there",
                "free some space there, and go on with --resume",
            ) from error

    def read_activations(self) -> tuple[int, dict[str, Tensor]]:
        """Return no activations: the process that writes hands them out."""
        return 0, {}

    def read_shard(self, number: int) -> dict[str, Tensor]:
        """Return no tensors: the process that writes hands them out."""
        return {}

    def skip_shard(self) -> None:
        """Do nothing."""

    def write_shard(self, tensors: Mapping[str, Tensor]) -> None:
        """Do nothing."""

    def keep_sparsities(self, sparsities: Mapping[str, float], seconds: Mapping[str, float], used: Used) -> None:
        """Do nothing."""

    def keep_order(self, order: bytes, seconds: Mapping[str, float], used: Used) -> None:
        """Do nothing."""

    def read_order(self) -> None:
        """Return nothing: the process that writes hands it out."""

    def finish_layer(self, result: Mapping[str, Any], seconds: Mapping[str, float], used: Used) -> None:
        """Do nothing."""

    def begin_activations(self, layers: int) -> bool:
        """Return False: the process that writes decides."""
        return False

    def keep_activations(self, layers: int, streams: Mapping[str, Tensor]) -> None:
        """Do nothing."""

    def wait_for_shards(self) -> None:
        """Do nothing."""

    def copy(self, path: Path, folder: Path, content: bytes | None = None) -> None:
        """Do nothing."""

    def write_file(self, name: str, content: bytes) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""
