"""Bytes between the host and the pretend GPU, launches, and bytes of its memory, by stage of a run.

    python -m tests.helpers.device_budgets SETTINGS…

Each SETTINGS is JSON of `PruneConfig`; the program prints a line of JSON for each: for each stage the bytes `to_device`
and `to_host`, the `launches`, and the bytes `moved` in the device's memory. Stages are those of a run's record, `layer`
for the decoder layer that has the most, and `other`. With `room` in it, so many bytes of activations stay on the
device.

A launch is an operation on tensors of the device, as PyTorch dispatches it below autograd, that is neither a view nor
an allocation: on CUDA it is one kernel or a few. Tensors that are created on the device are not counted. A launch moves
the tensors that it reads or writes, once each; matrix products, and sorts, are left out, as plans count them apart.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from llm_barber import PruneConfig, prune
from llm_barber.gpu.kernels import DTYPES
from llm_barber.model.array_memory import ArrayMemory
from llm_barber.run import stream
from tests.helpers import pretend_gpu
from tests.helpers.pretend_gpu import DEVICE, OnDevice, on_device, tensors_in

STAGES = {"_embed": "embed", "_allocate": "allocate", "_prune_step": "layer"}  # by the functions of `run/stream.py`
KINDS = ("to_device", "to_host", "launches", "moved")
# Operations that start nothing on the device, though they are no views.
NO_LAUNCH = (
    "aten::empty", "aten::new_empty", "aten::_unsafe_view", "aten::_local_scalar_dense", "aten::_fused_sdp_choice",
    "aten::lift_fresh", "aten::set_", "aten::resize_", "aten::record_stream", "aten::equal",
)  # fmt: skip

WRITTEN = ("aten::zero_", "aten::copy_", "aten::fill_")  # they do not read what they write to
# Operations that plans count in other ways than by bytes moved.
NOT_MOVED = ("aten::mm", "aten::bmm", "aten::addmm", "aten::addmm_", "aten::baddbmm", "aten::baddbmm_", "aten::sort")
READS = {"aten::kthvalue": 8}  # times that an operation reads its input, where it is not once; see `SELECTING`


class Counts:
    """Counts of each stage, and of each decoder layer."""

    def __init__(self) -> None:
        self.stage = "other"
        self.by_stage: dict[str, Counter[str]] = {}
        self.layers: list[Counter[str]] = []

    def add(self, kind: str, amount: int = 1) -> None:
        """Count something of the present stage."""
        counter = self.layers[-1] if self.stage == "layer" else self.by_stage.setdefault(self.stage, Counter())
        counter[kind] += amount

    @contextmanager
    def within(self, stage: str) -> Iterator[None]:
        """Count for a stage within the context."""
        before, self.stage = self.stage, stage
        if stage == "layer":
            self.layers.append(Counter())
        try:
            yield
        finally:
            self.stage = before

    def result(self) -> dict[str, dict[str, int]]:
        """Counts of each stage; `layer`: of each kind the most that a layer has."""
        most = Counter({kind: max(counts[kind] for counts in self.layers) for kind in KINDS})
        stages = {**self.by_stage, "layer": most}
        return {stage: {kind: counts[kind] for kind in KINDS} for stage, counts in stages.items()}


def is_launch(function: Any) -> bool:
    """Test whether an operation starts a kernel: it is neither a view nor an allocation."""
    schema = function._schema
    views = any(value.alias_info is not None and not value.alias_info.is_write for value in schema.returns)
    return not views and not schema.name.startswith(NO_LAUNCH)


def is_of_attention(function: Any, arguments: Any) -> bool:
    """Test for an operation on heads: attention is several operations here, and one kernel on a GPU."""
    return function._schema.name != "llm_barber::rotate" and any(part.dim() > 3 for part in on_the_device(arguments))


def size(values: torch.Tensor) -> int:
    return values.numel() * values.element_size()


def moved(function: Any, arguments: Any, named: Any, result: Any) -> int:
    """Bytes of the tensors that an operation reads and writes."""
    schema = function._schema
    if schema.name in NOT_MOVED or is_of_attention(function, arguments):
        return 0
    read, written = {}, {id(tensor): tensor for tensor in on_the_device(result)}
    for number, argument in enumerate(schema.arguments):
        given = arguments[number] if number < len(arguments) else (named or {}).get(argument.name)
        changed = argument.alias_info is not None and argument.alias_info.is_write
        for tensor in on_the_device(given):
            if changed:
                written[id(tensor)] = tensor
            if not changed or not (argument.kwarg_only or schema.name in WRITTEN):
                read[id(tensor)] = tensor
    return READS.get(schema.name, 1) * sum(map(size, read.values())) + sum(map(size, written.values()))


def on_the_device(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tensors_in(values) if isinstance(leaf, OnDevice)]


@contextmanager
def counted(counts: Counts) -> Iterator[None]:
    """Count what the pretend GPU does within the context."""
    dispatch, to = OnDevice.__torch_dispatch__.__func__, pretend_gpu._to  # type: ignore[attr-defined]

    def note_dispatch(kind: type, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        name = function._schema.name
        between = name == "aten::copy_" and isinstance(arguments[0], OnDevice) is not isinstance(arguments[1], OnDevice)
        if between:
            counts.add("to_device" if isinstance(arguments[0], OnDevice) else "to_host", size(arguments[1]))
        elif name == "aten::_local_scalar_dense":
            counts.add("to_host", size(arguments[0]))
        result = dispatch(kind, function, types, arguments, named)
        if not between and is_launch(function):
            counts.add("launches")
            counts.add("moved", moved(function, arguments, named, result))
        return result

    def note_to(values: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        result = to(values, *arguments, **named)
        if isinstance(result, OnDevice) is not isinstance(values, OnDevice) and not result.is_meta:
            counts.add("to_device" if isinstance(result, OnDevice) else "to_host", size(values))
        return result

    def note_cpu(mode: Any, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if arguments and isinstance(arguments[0], OnDevice) and function in (torch.Tensor.cpu, torch.Tensor.tolist):
            counts.add("to_host", size(arguments[0]))
        return original(mode, function, types, arguments, named)

    original = pretend_gpu.PretendGpu.__torch_function__
    with ExitStack() as stack:
        stack.enter_context(patch.object(OnDevice, "__torch_dispatch__", classmethod(note_dispatch)))
        stack.enter_context(patch.object(pretend_gpu, "_to", note_to))
        stack.enter_context(patch.object(pretend_gpu.PretendGpu, "__torch_function__", note_cpu))
        for name, stage in STAGES.items():
            stack.enter_context(patch.object(stream, name, staged(counts, stage, getattr(stream, name))))
        yield


def staged(counts: Counts, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function's work count for a stage."""

    def run(*arguments: Any) -> Any:
        with counts.within(stage):
            return function(*arguments)

    return run


def count(folder: Path, settings: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Counts of a run on the device."""
    memory, counts = ArrayMemory(DEVICE, settings.pop("room", None)), Counts()
    with (
        sdpa_kernel(SDPBackend.MATH),
        on_device(),
        patch("llm_barber.run.stream.activation_memory", lambda *_: memory),
        # A GPU with Triton's kernels gathers gradients; here their operators are computed by PyTorch's operations.
        patch("llm_barber.method.gradient_sums.has_kernels", lambda _, dtype: dtype in DTYPES),
        counted(counts),
    ):
        prune(PruneConfig(output=folder / "out", overwrite=True, report=False, **settings))
    return counts.result()


def main() -> None:
    library = torch.library.Library("aten", "IMPL")
    pretend_gpu._register(library)
    with TemporaryDirectory() as folder:
        for argument in sys.argv[1:]:
            print(json.dumps(count(Path(folder), json.loads(argument))), flush=True)


if __name__ == "__main__":
    main()
