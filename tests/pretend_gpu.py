"""A pretend GPU: tensors that claim to be on another device, and are computed on the CPU.

It refuses what CUDA refuses: operations on tensors of both devices, numpy arrays of the device's memory. Copies between
the devices are made as early, or arrive as late, as they could (`tests/model/test_copies.py`). PyTorch calls the
interface below experimental: the pretend GPU is a process of its own, started by `tests/test_pretend_gpu.py`.

    python -m tests.pretend_gpu SETTINGS…

Each SETTINGS is JSON of `PruneConfig` or `EvaluateConfig`; the program prints how far its results are from the CPU's.
With `room` in it, so many bytes of activations stay on the device, until its memory runs out after a layer. With
`interrupted`, the run stops after its first layer, loses that layer's output, and goes on.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from llm_barber import EvaluateConfig, PruneConfig, evaluate, prune
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


FAILING = 4  # number of the block whose result does not fit: the second block of the second layer


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
    def __torch_dispatch__(cls, function: Any, _: Any, given: tuple[Any, ...] = (), named: Any = None) -> Any:
        named = dict(named or {})
        name = function._schema.name
        if name == "aten::_fused_sdp_choice":
            return SDPBackend.MATH.value
        tensors = [one for one in tree_leaves((given, named)) if isinstance(one, torch.Tensor)]
        beside = [one for one in tensors if not isinstance(one, OnDevice) and one.dim()]
        if beside and name not in COPY and not (name in PLACES and isinstance(given[0], OnDevice)):
            raise RuntimeError(f"{name}: tensors on two devices, shapes {[tuple(one.shape) for one in tensors]}")
        device = named.pop("device", None)
        named.pop("pin_memory", None)
        given, named = tree_map_only(OnDevice, lambda one: one.inner, (given, named))
        if device is not None and torch.device(device).type == "meta":
            return function(*given, **named, device=device)
        found = function(*given, **named)
        if device is not None and torch.device(device).type == "cpu":
            return found
        known = {id(one.inner) if isinstance(one, OnDevice) else id(one): one for one in tensors}  # written in place
        return tree_map_only(torch.Tensor, lambda one: known[id(one)] if id(one) in known else OnDevice(one), found)


class PretendGpu(TorchFunctionMode):
    """While it is active, tensors can be created on the device and copied to and from it."""

    def __torch_function__(self, function: Any, _: Any, given: tuple[Any, ...] = (), named: Any = None) -> Any:
        named = dict(named or {})
        on_device = bool(given) and isinstance(given[0], OnDevice)
        if function is torch.Tensor.to:
            return _to(*given, **named)
        if on_device and function is torch.Tensor.cpu:
            return given[0].inner.clone()
        if on_device and function is torch.Tensor.tolist:
            return given[0].inner.tolist()
        if on_device and function is torch.Tensor.numpy:
            raise TypeError("this tensor is on another device")
        if function == torch.Tensor.data.__set__ and isinstance(given[1], OnDevice):
            assert on_device
            assert given[0].shape == given[1].shape
            given[0].inner = given[1].inner
            return None
        named.pop("pin_memory", None)
        if named.get("device") is not None and torch.device(named["device"]) == DEVICE:
            return OnDevice(function(*given, **{**named, "device": "cpu"}))
        return function(*given, **named)


def _to(values: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
    """`Tensor.to` with any of its arguments."""
    device, others = None, []
    for one in given:
        if isinstance(one, torch.dtype):
            others.append(one)
        elif isinstance(one, torch.Tensor):
            device = one.device
            others.append(one.dtype)
        elif one is not None:
            device = torch.device(one)
    device = torch.device(named.pop("device", None) or device or values.device)
    named.pop("non_blocking", None)
    if device.type == "meta":
        return values.to(device, *others, **named)
    with torch._C.DisableTorchFunctionSubclass():
        cast = torch.Tensor.to(values, *others, **named) if others or named else values
    if (device == DEVICE) is isinstance(cast, OnDevice):
        return cast
    return cast.inner.clone() if isinstance(cast, OnDevice) else OnDevice(cast.clone() if cast is values else cast)


class WorstCopies(LateCopier):
    """Between the host and the device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def start(self, values: torch.Tensor) -> Copied:
        return super().start(values)[0].to(self._device), None


def _copy(values: torch.Tensor, place: torch.Tensor, _: bool = False) -> torch.Tensor:
    inner = [one.inner if isinstance(one, OnDevice) else one for one in (place, values)]
    inner[0].copy_(inner[1])
    return place


def _register(library: torch.library.Library) -> None:
    """Tell PyTorch how its own operations make tensors there, as long as the library lives."""
    operations: dict[str, Callable[..., torch.Tensor]] = {
        "empty.memory_format": lambda size, dtype=None, **_: OnDevice(torch.empty(size, dtype=dtype)),
        "empty_strided": lambda *shape, dtype=None, **_: OnDevice(torch.empty_strided(*shape, dtype=dtype)),
        "_copy_from": _copy,
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
        patch("torch.Tensor.pin_memory", lambda values: values),
    ):
        yield


@contextmanager
def with_room(room: int) -> Iterator[None]:
    """So many bytes of activations stay on the device, until at the end of the second layer its memory is too small."""
    memory, result_of = ArrayMemory(DEVICE, room), layer_module.block_result
    left: list[int | None] = []  # room, whenever a block's result is wanted

    def short(*given: Any) -> Any:
        left.append(memory.room)
        if len(left) == FAILING:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result_of(*given)

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

    def stop(job: Any, index: int, *given: Any) -> Any:
        if index:
            raise KeyboardInterrupt
        return prune_layer(job, index, *given)

    with patch("llm_barber.run.stream.prune_layer", stop), suppress(KeyboardInterrupt):
        prune(config)
    (lost,) = config.output.with_name(f"{config.output.name}.partial").glob("activations-*")
    lost.unlink()


def difference(folder: Path, settings: dict[str, Any]) -> float:
    """The largest between what a run on the device and one on the CPU leave of a weight; inf, if a mask differs."""
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
    for name, one in here.items():
        assert (there[name].shape, there[name].dtype) == (one.shape, one.dtype)
    if any(not torch.equal(there[name] == 0, here[name] == 0) for name in here):
        return math.inf
    differences = torch.stack([(there[name].float() - here[name].float()).abs().max() for name in here])
    return differences.max().item()  # NaN if one is


def difference_of_measures(settings: dict[str, Any]) -> float:
    """The largest between perplexities and divergences that are measured on the device and on the CPU."""
    with sdpa_kernel(SDPBackend.MATH):
        here = evaluate(EvaluateConfig(device="cpu", **settings)).texts[0]
        with on_device():
            found = evaluate(EvaluateConfig(**settings))
    assert found.device == str(DEVICE)
    there = found.texts[0]
    assert here.against
    assert there.against
    return max(abs(here.perplexity - there.perplexity), abs(here.against.divergence - there.against.divergence))


def main() -> None:
    library = torch.library.Library("aten", "IMPL")
    _register(library)
    with TemporaryDirectory() as folder:
        for given in sys.argv[1:]:
            settings = json.loads(given)
            found = difference_of_measures(settings) if "text" in settings else difference(Path(folder), settings)
            print(found, flush=True)


if __name__ == "__main__":
    main()
