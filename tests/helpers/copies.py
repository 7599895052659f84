"""A copier to the device and back whose copies arrive as late as a GPU's may."""

from typing import Any

import pytest
from torch import Tensor

from llm_barber.model.copies import Copied, Copies
from llm_barber.model.streams import ActivationStreams


class LateCopier:
    """Copies to the device at the start, and back at the wait.

    Values that are written after the start are not in a copy to the device. Copies back hold no values of their own: a
    caller that changes them before the wait is found out.
    """

    def __init__(self) -> None:
        self.started, self.waited, self.waited_back = 0, 0, 0
        self._leaving: list[tuple[Tensor, Tensor]] = []

    def start(self, values: Tensor) -> Copied:
        """Copy to the device."""
        self.started += 1
        return values.clone(), None

    def wait(self, copied: Copied) -> Tensor:
        """Return a copy on the device."""
        self.waited += 1
        return copied[0]

    def start_back(self, values: Tensor, target: Tensor) -> None:
        """Note a copy from the device, to be made at the wait."""
        self._leaving.append((values, target))

    def wait_back(self) -> None:
        """Make the copies from the device."""
        self.waited_back += 1
        for values, target in self._leaving:
            target.copy_(values)
        self._leaving.clear()


def use_copier(copier: LateCopier, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs copy their batches as on a GPU."""
    init = ActivationStreams.__init__

    def init_with_copies(streams: ActivationStreams, *arguments: Any, **keywords: Any) -> None:
        init(streams, *arguments, **keywords)
        streams._copies = Copies(copier)

    monkeypatch.setattr(ActivationStreams, "__init__", init_with_copies)
