"""In a run of several processes, what stands in the place of the writer where nothing is written."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from llm_barber.checkpoint.state import RunState, Used, is_full
from llm_barber.errors import OutputError


class Follower:
    """Answers as a writer does, and keeps nothing; `state` comes from the process that writes."""

    next_is_written = True
    resumable = False
    saving = False

    def __init__(self, work: Path) -> None:
        self.work = work
        self.state = RunState(key={})
        self.digests: dict[str, str] = {}
        self.lost: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to clean up.

        Raises:
            OutputError: there is no room for activations that do not fit the memory.
        """
        if isinstance(error, OSError) and is_full(error):
            raise OutputError(
                f"the disk of {error.filename} is full, where activations go that --memory leaves no place for",
                "free some space there, and go on with --resume",
            ) from error

    def read_activations(self) -> tuple[int, dict[str, Tensor]]:
        """None; the process that writes hands them out."""
        return 0, {}

    def read_shard(self, number: int) -> dict[str, Tensor]:
        """None; the process that writes hands them out."""
        return {}

    def skip_shard(self) -> None:
        """Nothing."""

    def write_shard(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing."""

    def keep_sparsities(self, sparsities: Mapping[str, float], seconds: Mapping[str, float], used: Used) -> None:
        """Nothing."""

    def finish_layer(self, result: Mapping[str, Any], seconds: Mapping[str, float], used: Used) -> None:
        """Nothing."""

    def keep_activations(self, layers: int, streams: Mapping[str, Tensor]) -> None:
        """Nothing."""

    def wait_for_activations(self) -> None:
        """Nothing."""

    def copy(self, path: Path, folder: Path, content: bytes | None = None) -> None:
        """Nothing."""

    def write_file(self, name: str, content: bytes) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""
