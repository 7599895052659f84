"""A pretend GPU: tensors that claim to be on another device, and are computed on the CPU.

It refuses what CUDA refuses: operations on tensors of both devices, numpy arrays of the device's memory. Copies between
the devices are made as early, or arrive as late, as they could (`tests/model/test_copies.py`). PyTorch calls the
interface below experimental: the pretend GPU is a process of its own, started by `tests/test_pretend_gpu.py`.

    python -m tests.helpers.pretend_gpu SETTINGS…

Each SETTINGS is JSON of `PruneConfig` or `EvaluateConfig`; the program prints how far its results are from the CPU's.
With `room` in it, so many bytes of activations stay on the device, until its memory runs out after a layer. With
`interrupted`, the run stops after its first layer, loses that layer's output, and goes on. With `counted`, it prints
how often the host waits for the device, by line of the program: in a `step` of tuning, or in the whole `run`.
"""

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import pairwise
from linecache import getline
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import llm_barber
from llm_barber import EvaluateConfig, PruneConfig, evaluate, prune
from llm_barber.checkpoint.memory import ordinary_memory
from llm_barber.method import layer as layer_module
from llm_barber.method.layer import prune_layer
from llm_barber.model.array_memory import ArrayMemory
from llm_barber.model.copies import Copied
from tests.conftest import read_folder
from tests.helpers.copies import LateCopier

_setup_privateuseone_for_python_backend("pretend")
DEVICE = torch.device("pretend:0")
# CUDA's copies take tensors of the CPU, too; its index operations take indices on the CPU.
COPY, PLACES = ("aten::copy_", "aten::_to_copy"), ("aten::index", "aten::index_put_", "aten::index_put")


WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")  # the host reads their result
PACKAGE = Path(llm_barber.__file__).parent
waits: Counter[str] = Counter()  # times that the host has waited for the device, by file and line's text


def note_wait() -> None:
    """Count a wait for the program's innermost line that is being run."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
        frame = frame.f_back
    if frame is None:
        waits["outside of the program"] += 1
        return
    path = Path(frame.f_code.co_filename)
    waits[f"{path.relative_to(PACKAGE)}: {getline(str(path), frame.f_lineno).strip()}"] += 1


def rms_norm(
    hidden: torch.Tensor, shape: list[int], weight: torch.Tensor | None, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What CUDA's kernel computes: the normalised states, and the root that their gradient needs."""
    root = hidden.float().pow(2).mean(-1, keepdim=True).add(epsilon).rsqrt()
    return torch.nn.functional.rms_norm(hidden, shape, weight, epsilon), root


def rms_norm_backward(
    gradient: torch.Tensor,
    hidden: torch.Tensor,
    shape: list[int],
    root: torch.Tensor,
    weight: torch.Tensor | None,
    mask: list[bool],
) -> tuple[torch.Tensor, None]:
    """Gradient by the input, the only one that a run needs, in the order of autograd's operations on a CPU."""
    assert mask == [True, False]
    wide = hidden.float()
    of_normalised = (gradient if weight is None else gradient * weight).float()
    of_mean = (of_normalised * wide).sum(-1, keepdim=True) * root.pow(3) * -0.5 / shape[-1]
    return (of_normalised * root + of_mean * (wide * 2)).to(hidden.dtype), None


NORMS = {"aten::_fused_rms_norm": rms_norm, "aten::_fused_rms_norm_backward": rms_norm_backward}
FAILING = 4  # number of the block whose result does not fit: the second block of the second layer


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """Tensors among an operation's arguments or results; PyTorch's own functions for trees take twice as long."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, dict):
        yield from tensors_in(tuple(values.values()))


def mapped(function: Callable[[torch.Tensor], torch.Tensor], values: Any) -> Any:
    """Such arguments or results, with each tensor replaced."""
    if isinstance(values, torch.Tensor):
        return function(values)
    if isinstance(values, tuple | list):
        return type(values)([mapped(function, value) for value in values])
    if isinstance(values, dict):
        return {name: mapped(function, value) for name, value in values.items()}
    return values


def inner_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU with the values of a tensor of either device."""
    return tensor.inner if isinstance(tensor, OnDevice) else tensor


class OnDevice(torch.Tensor):
    """A tensor on the device; `inner`, on the CPU, has its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "OnDevice":
        wrapper: OnDevice = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=DEVICE
        )
        wrapper.inner = inner.detach().resolve_conj()  # a wrapper cannot be marked as conjugated
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, function: Any, _: Any, arguments: tuple[Any, ...] = (), named: Any = None) -> Any:
        named = dict(named or {})
        name = function._schema.name
        if name in WAITING:
            note_wait()
        if name == "aten::_fused_sdp_choice":
            return SDPBackend.MATH.value
        tensors = list(tensors_in((arguments, named)))
        beside = [tensor for tensor in tensors if not isinstance(tensor, OnDevice) and tensor.dim()]
        if beside and name not in COPY and not (name in PLACES and isinstance(arguments[0], OnDevice)):
            raise RuntimeError(f"{name}: tensors on two devices, shapes {[tuple(tensor.shape) for tensor in tensors]}")
        device = named.pop("device", None)
        named.pop("pin_memory", None)
        arguments, named = mapped(inner_of, arguments), mapped(inner_of, named)
        if device is not None and torch.device(device).type == "meta":
            return function(*arguments, **named, device=device)
        kernel = NORMS.get(name, function)
        result = kernel(*arguments, **named)
        if device is not None and torch.device(device).type == "cpu":
            return result
        # A tensor that was written in place is returned as the wrapper that came in.
        known = {id(inner_of(tensor)): tensor for tensor in tensors}
        return mapped(lambda tensor: known[id(tensor)] if id(tensor) in known else OnDevice(tensor), result)


class PretendGpu(TorchFunctionMode):
    """While it is active, tensors can be created on the device and copied to and from it."""

    def __torch_function__(self, function: Any, _: Any, arguments: tuple[Any, ...] = (), named: Any = None) -> Any:
        named = dict(named or {})
        on_device = bool(arguments) and isinstance(arguments[0], OnDevice)
        if function is torch.Tensor.to:
            return _to(*arguments, **named)
        if on_device and function in (torch.Tensor.cpu, torch.Tensor.tolist):
            note_wait()
        if on_device and function is torch.Tensor.cpu:
            return arguments[0].inner.clone()
        if on_device and function is torch.Tensor.tolist:
            return arguments[0].inner.tolist()
        if on_device and function is torch.Tensor.numpy:
            raise TypeError("this tensor is on another device")
        if function == torch.Tensor.data.__set__ and isinstance(arguments[1], OnDevice):
            assert on_device
            assert arguments[0].shape == arguments[1].shape
            arguments[0].inner = arguments[1].inner
            return None
        named.pop("pin_memory", None)
        if named.get("device") is not None and torch.device(named["device"]) == DEVICE:
            if function in (torch.tensor, torch.as_tensor):  # of values of the host
                note_wait()
            return OnDevice(function(*arguments, **{**named, "device": "cpu"}))
        return function(*arguments, **named)


def _to(values: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
    """`Tensor.to` with any of its arguments."""
    device, others = None, []
    for argument in arguments:
        if isinstance(argument, torch.dtype):
            others.append(argument)
        elif isinstance(argument, torch.Tensor):
            device = argument.device
            others.append(argument.dtype)
        elif argument is not None:
            device = torch.device(argument)
    device = torch.device(named.pop("device", None) or device or values.device)
    non_blocking = named.pop("non_blocking", False)
    if device.type == "meta":
        return values.to(device, *others, **named)
    if device == DEVICE and not isinstance(values, OnDevice) and not non_blocking:
        note_wait()  # until the copy is complete
    with torch._C.DisableTorchFunctionSubclass():
        cast = torch.Tensor.to(values, *others, **named) if others or named else values
    if (device == DEVICE) is isinstance(cast, OnDevice):
        return cast
    return cast.inner.clone() if isinstance(cast, OnDevice) else OnDevice(cast.clone() if cast is values else cast)


class WorstCopies(LateCopier):
    """Copies between the host and the device, as late as a GPU's may be."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def start(self, values: torch.Tensor) -> Copied:
        return super().start(values)[0].to(self._device, non_blocking=True), None


def _copy(values: torch.Tensor, place: torch.Tensor, _: bool = False) -> torch.Tensor:
    inner_of(place).copy_(inner_of(values))
    return place


def _register(library: torch.library.Library) -> None:
    """Tell PyTorch how its own operations make tensors there, as long as the library lives."""
    operations: dict[str, Callable[..., Any]] = {
        "empty.memory_format": lambda size, dtype=None, **_: OnDevice(torch.empty(size, dtype=dtype)),
        "empty_strided": lambda *shape, dtype=None, **_: OnDevice(torch.empty_strided(*shape, dtype=dtype)),
        "_copy_from": _copy,
        # Never called, since `OnDevice` comes first: as CUDA, the device has a kernel of its own for these.
        "_fused_rms_norm": rms_norm,
        "_fused_rms_norm_backward": rms_norm_backward,
    }
    for name, operation in operations.items():
        library.impl(name, operation, "PrivateUse1")


@contextmanager
def on_device() -> Iterator[None]:
    """Let every run take the device."""
    with (
        PretendGpu(),
        patch("llm_barber.loading.preparing.resolve_device", lambda _: DEVICE),
        patch("llm_barber.evaluation.evaluate.resolve_device", lambda _: DEVICE),
        patch("llm_barber.model.streams.SideStreams", WorstCopies),
        patch("llm_barber.checkpoint.ahead.pinned_memory", ordinary_memory),
    ):
        yield


@contextmanager
def with_room(room: int) -> Iterator[None]:
    """So many bytes of activations stay on the device, until at the end of the second layer its memory is too small."""
    memory, result_of = ArrayMemory(DEVICE, room), layer_module.block_result
    left: list[int | None] = []  # room, whenever a block's result is wanted

    def short(*arguments: Any) -> Any:
        left.append(memory.room)
        if len(left) == FAILING:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result_of(*arguments)

    with (
        patch("llm_barber.run.stream.activation_memory", lambda *_: memory),
        patch("llm_barber.method.layer.block_result", short),
    ):
        yield
    failed = left[FAILING - 1]
    assert failed is not None
    assert 0 <= failed < room
    assert memory.room is None


def interrupted(config: PruneConfig) -> None:
    """Run until the second layer, and forget the first one's output."""

    def stop(job: Any, index: int, *arguments: Any) -> Any:
        if index:
            raise KeyboardInterrupt
        return prune_layer(job, index, *arguments)

    with patch("llm_barber.run.stream.prune_layer", stop), suppress(KeyboardInterrupt):
        prune(config)
    (lost,) = config.output.with_name(f"{config.output.name}.partial").glob("activations-*")
    lost.unlink()


def difference(folder: Path, settings: dict[str, Any]) -> float:
    """Largest difference of a weight after a run on the device and one on the CPU; inf, if a mask differs."""
    room, stops = settings.pop("room", 0), settings.pop("interrupted", False)
    with sdpa_kernel(SDPBackend.MATH):
        prune(PruneConfig(output=folder / "cpu", device="cpu", overwrite=True, report=False, **settings))
        with on_device(), with_room(room) if room else nullcontext():
            config = PruneConfig(output=folder / "device", overwrite=True, resume=stops, report=False, **settings)
            if stops:
                interrupted(config)
            report = prune(config)
    assert report.device == str(DEVICE)
    there, here = read_folder(folder / "device"), read_folder(folder / "cpu")
    assert there.keys() == here.keys()
    for name, tensor in here.items():
        assert (there[name].shape, there[name].dtype) == (tensor.shape, tensor.dtype)
    if any(not torch.equal(there[name] == 0, here[name] == 0) for name in here):
        return math.inf
    differences = torch.stack([(there[name].float() - here[name].float()).abs().max() for name in here])
    return differences.max().item()  # NaN if one is


def waits_by_line(folder: Path, settings: dict[str, Any], counted: str) -> dict[str, int]:
    """Number of times that the host waits for the device, by file and line.

    `counted`: between two of Adam's steps where they are fewest, `step`, or in the whole `run`.
    """
    counts: list[Counter[str]] = []
    step = torch.optim.Adam.step
    waits.clear()

    def noted(*arguments: Any) -> Any:
        counts.append(waits.copy())
        return step(*arguments)

    with sdpa_kernel(SDPBackend.MATH), on_device(), patch("torch.optim.Adam.step", noted):
        prune(PruneConfig(output=folder / "counted", overwrite=True, report=False, **settings))
    if counted == "run":
        return dict(waits)
    return dict(min((after - before for before, after in pairwise(counts)), key=lambda between: between.total()))


def difference_of_measures(settings: dict[str, Any]) -> float:
    """Largest difference of perplexities and divergences that are measured on the device and on the CPU."""
    with sdpa_kernel(SDPBackend.MATH):
        here = evaluate(EvaluateConfig(device="cpu", **settings)).texts[0]
        with on_device():
            evaluation = evaluate(EvaluateConfig(**settings))
    assert evaluation.device == str(DEVICE)
    there = evaluation.texts[0]
    assert here.against
    assert there.against
    return max(abs(here.perplexity - there.perplexity), abs(here.against.divergence - there.against.divergence))


def main() -> None:
    library = torch.library.Library("aten", "IMPL")
    _register(library)
    with TemporaryDirectory() as folder:
        for argument in sys.argv[1:]:
            settings = json.loads(argument)
            if counted := settings.pop("counted", ""):
                result: float | dict[str, int] = waits_by_line(Path(folder), settings, counted)
            elif "text" in settings:
                result = difference_of_measures(settings)
            else:
                result = difference(Path(folder), settings)
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
