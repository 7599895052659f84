"""Rehearse a run: a real `prune` of a model of few layers with random weights, on few windows.

`shortened` gives the configuration of that model. `rehearse` measures the run, each time in a process of its own, so
that memory is that of a fresh process. `extended_seconds` extends the time to all layers and windows.
"""

import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedConfig

from llm_barber.errors import BarberError
from llm_barber.model.empty import auto_class
from llm_barber.settings.prune import PruneConfig
from llm_barber.usage import peak_device_memory, peak_memory, reset_peak_memory

OTHER = "embed, copy and write the rest"  # the stage of all that is no pass over the layers
CHILD = "import sys; from llm_barber.planning.rehearsal import measure; measure(sys.argv[1])"


class RehearsalError(BarberError):
    """A rehearsal that ended without a result."""


@dataclass
class Pass:
    """A pass over the decoder layers: seconds of its steps, and peak bytes on host and device."""

    title: str
    steps: list[float] = field(default_factory=list)
    host: int = 0
    device: int = 0


@dataclass
class Rehearsal:
    """Measurements of a run: its passes, and the seconds of all of it. The first pass, `OTHER`, has no steps."""

    passes: list[Pass]
    seconds: float


class Stopwatch:
    """Progress of a run that notes how long each step takes, and the peak memory of each pass."""

    def __init__(self) -> None:
        self.passes = [Pass(OTHER)]
        self._since = 0.0
        reset_peak_memory()

    def stage(self, title: str) -> None:
        """Stages of unknown length are timed as part of the whole run."""

    def warn(self, message: str) -> None:
        """Warnings about few windows or layers say nothing about the run that is planned."""

    def start(self, title: str, total: int, finished: int = 0) -> None:
        """Begin a pass."""
        self.end_pass()
        self.passes.append(Pass(title))
        self._since = time.perf_counter()

    def advance(self, detail: str) -> None:
        """End a step."""
        now = time.perf_counter()
        self.passes[-1].steps.append(now - self._since)
        self._since = now

    def end_pass(self) -> None:
        """Note the peak memory since the pass began."""
        self.passes[-1].host = peak_memory()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            self.passes[-1].device = peak_device_memory(torch.device("cuda", torch.cuda.current_device())) or 0
        reset_peak_memory()


def rehearsed_layers(layers: Sequence[nn.Module]) -> tuple[int, int]:
    """Choose how many first layers to rehearse, (first, all): those after `first` stand for the further layers.

    The first layers have every kind of layer, by names and shapes of parameters. The following ones have every kind
    of the rest of the model.

    Example: kinds a a b b b b -> (3, 4).
    """
    kinds = [tuple((name, parameter.shape) for name, parameter in layer.named_parameters()) for layer in layers]
    first = _until_all_are_met(kinds, 0)
    return first, _until_all_are_met(kinds, first)


def _until_all_are_met(kinds: Sequence[Any], start: int) -> int:
    """Smallest end of `kinds[start:end]` that has all kinds of `kinds[start:]`."""
    return max((kinds.index(kind, start) + 1 for kind in set(kinds[start:])), default=start)


def shortened(config: PreTrainedConfig, count: int, layers: int) -> PreTrainedConfig:
    """The configuration of the first `layers` of a model's `count` layers: lists with an entry for each are cut."""
    content, text = config.to_dict(), config.get_text_config()
    part = content
    if text is not config:
        key = next(name for name in content if getattr(config, name, None) is text)
        part = content[key] = text.to_dict()
    for name, value in part.items():
        # A pair of numbers is an interval (`time_step_limit`), whatever the number of layers.
        if isinstance(value, list) and len(value) == count and not (count == 2 and isinstance(value[0], float)):
            part[name] = value[:layers]
    part[text.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = layers
    return type(config).from_dict(content)


def rehearse(
    model: PreTrainedConfig, dtype: torch.dtype, config: PruneConfig, windows: Sequence[int]
) -> list[Rehearsal]:
    """Write a model with random weights into a folder for temporary files, and prune it on each number of windows.

    Args:
        model: configuration of the model.
        dtype: of its weights in the files.
        config: settings of the runs; without model, output and calibration text.
        windows: numbers of windows of random tokens.

    Raises:
        BarberError: as `prune`; or the process was killed.
    """
    vocabulary = model.get_text_config().vocab_size
    with tempfile.TemporaryDirectory(prefix="llm-barber-plan-") as name:
        folder = Path(name)
        auto_class(model).from_config(model, dtype=dtype).save_pretrained(folder / "model")
        rehearsals = []
        for count in windows:
            tokens = torch.randint(vocabulary, (count, config.seqlen), generator=torch.Generator().manual_seed(0))
            save_file({"input_ids": tokens}, folder / "tokens.safetensors")
            changes = {
                "model": str(folder / "model"), "output": folder / "pruned", "revision": None, "samples": count,
                "calibration": str(folder / "tokens.safetensors"), "overwrite": True, "resume": False, "report": False,
            }  # fmt: skip
            rehearsals.append(_in_child(config.model_copy(update=changes), folder))
    return rehearsals


def _in_child(config: PruneConfig, folder: Path) -> Rehearsal:
    """Measure a run in a process of its own."""
    (folder / "settings").write_bytes(pickle.dumps(config))
    child = subprocess.run([sys.executable, "-c", CHILD, str(folder)], capture_output=True, text=True)
    if child.returncode:
        last_line = (child.stderr.strip().splitlines() or [f"code {child.returncode}"])[-1]
        reason = f"signal {-child.returncode}" if child.returncode < 0 else last_line
        raise RehearsalError(
            f"the rehearsal ended with {reason}",
            "a layer may need more memory than there is: free some, take a shorter --seqlen, or plan for a machine "
            "with --tflops and --gbps, without a rehearsal",
        )
    result = pickle.loads((folder / "result").read_bytes())
    if isinstance(result, BarberError):
        raise result
    assert isinstance(result, Rehearsal)
    return result


def measure(folder: str) -> None:
    """Measure the run whose settings are in a folder, and write the measurements there: the child's part."""
    from llm_barber.run.commands import prune

    stopwatch = Stopwatch()
    result: Rehearsal | BarberError
    try:
        report = prune(pickle.loads((Path(folder) / "settings").read_bytes()), stopwatch)
        stopwatch.end_pass()
        result = Rehearsal(stopwatch.passes, report.seconds["total"])
    except BarberError as error:
        result = error
    (Path(folder) / "result").write_bytes(pickle.dumps(result))


def extended_seconds(
    rehearsals: Sequence[Rehearsal], windows: Sequence[int], layers: tuple[int, int], wanted: tuple[int, int]
) -> dict[str, float]:
    """Seconds of a run by stage, extended from rehearsals.

    Each step grows linearly with the windows. A pass makes its steps layer by layer, perhaps several times. Further
    layers take as long as the mean of the steps that stand for them.

    Args:
        rehearsals: with fewest and with most windows; or one.
        windows: of each rehearsal.
        layers: as `rehearsed_layers` gives them.
        wanted: windows and layers of the run.
    """
    few, many = rehearsals[0], rehearsals[-1]
    distance = windows[-1] - windows[0]

    def grown(first: float, last: float) -> float:
        slope = max(0.0, last - first) / distance if distance else 0.0
        return last + slope * (wanted[0] - windows[-1])

    others = [rehearsal.seconds - sum(sum(part.steps) for part in rehearsal.passes) for rehearsal in rehearsals]
    seconds = {OTHER: grown(others[0], others[-1])}
    for first, last in zip(few.passes[1:], many.passes[1:], strict=True):
        steps = [grown(*pair) for pair in zip(first.steps, last.steps, strict=True)]
        seconds[last.title] = _with_further_layers(steps, layers, wanted[1])
    return seconds


def _with_further_layers(steps: Sequence[float], layers: tuple[int, int], wanted: int) -> float:
    """Seconds of a pass over `wanted` layers; `steps`: seconds of its steps over the rehearsed layers."""
    first, rehearsed = layers
    total = sum(steps)
    for start in range(0, len(steps) - rehearsed + 1, rehearsed):  # further steps, of the output head, happen once
        alike = steps[start + first : start + rehearsed]
        total += (wanted - rehearsed) * sum(alike) / max(1, len(alike))
    return total
