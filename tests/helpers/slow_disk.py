"""A disk that is as slow as a test wants: files are complete when enough layers have begun to be computed."""

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from llm_barber.checkpoint import activation_writer
from llm_barber.checkpoint.activations import Activations, StoppedError
from llm_barber.run import stream as run_module

LONGEST = 60.0  # seconds until a layer that waits for a file, which waits for a later layer, is a failure


class LayerClock:
    """Counts the layers that begin to be computed, as the clock of a slow disk.

    Args:
        monkeypatch: patches the run.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._begun: dict[int, threading.Event] = defaultdict(threading.Event)
        prune_layer = run_module.prune_layer

        def noted(job: Any, index: int, *rest: Any) -> Any:
            self._begun[index].set()
            return prune_layer(job, index, *rest)

        monkeypatch.setattr(run_module, "prune_layer", noted)

    def wait(self, index: int, stop: threading.Event | None = None) -> None:
        """Wait until a layer begins, the first is 0.

        Raises:
            StoppedError: `stop` was set meanwhile.
        """
        for _ in range(round(LONGEST / 0.01)):
            if self._begun[index].wait(0.01):
                return
            if stop is not None and stop.is_set():
                raise StoppedError
        raise AssertionError(f"layer {index} waits for a file that is written before it is computed")


def slow_activations(monkeypatch: pytest.MonkeyPatch, layers_per_file: int) -> dict[int, bytes]:
    """Let a file of activations take as long as a number of layers, for runs from now on.

    Returns:
        The files' contents by the number of layers that they have passed; it fills as files are written.
    """
    clock, kept = LayerClock(monkeypatch), {}
    save: Callable[..., Activations] = activation_writer.save_activations

    def slow(folder: Path, layers: int, streams: Mapping[str, Tensor], stop: threading.Event) -> Activations:
        clock.wait(layers + layers_per_file, stop)
        saved = save(folder, layers, streams, stop)
        kept[layers] = (folder / saved.file).read_bytes()
        return saved

    monkeypatch.setattr(activation_writer, "save_activations", slow)
    return kept
