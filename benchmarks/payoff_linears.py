"""The sides of a single linear: copies of its weight, dense and packed, and the clocks that time them."""

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from typing import Any

import payoff_native
import torch
from payoff_cells import Spread, in_turn, timed
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from llm_barber import native
from llm_barber.checkpoint.encoding import pack
from llm_barber.checkpoint.rounding import pack_rounded
from llm_barber.masking.granularity import Granularity
from llm_barber.masking.initial import initial_mask
from llm_barber.masking.pattern import NofM, Pattern, Unstructured
from llm_barber.masking.selection import apply_mask
from llm_barber.native import weight as native_weight
from llm_barber.runtime.packed_linear import PackedLinear

INT8 = "int8"  # kept values are rounded
SECONDS = 0.05  # of one measurement, about


class TimedLibrary:
    """The C extension, with a clock around its functions: seconds within C since `seconds` was set to 0."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self.seconds = 0.0

    def __getattr__(self, name: str) -> "TimedFunction":
        function = TimedFunction(getattr(self._library, name), self)
        setattr(self, name, function)
        return function


class TimedFunction:
    """A function of the C extension; attributes such as `argtypes` are the function's own."""

    def __init__(self, function: Any, clock: TimedLibrary) -> None:
        self.__dict__.update(function=function, clock=clock)

    def __call__(self, *arguments: Any) -> Any:
        start = time.perf_counter()
        result = self.function(*arguments)
        self.clock.seconds += time.perf_counter() - start
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self.function, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.function, name, value)


def install_clock() -> TimedLibrary | None:
    """Let all callers of the C extension go through a clock; None: the extension was not built."""
    library = native.library()
    if library is None:
        return None
    clock = TimedLibrary(library)
    native.library = lambda: clock  # every caller looks the library up by this name
    forget_functions()
    return clock


def forget_functions() -> None:
    """Let the package look up C's functions anew, from what `native.library` returns."""
    native_weight._functions.cache_clear()


class Products(TorchDispatchMode):
    """Sees whether PyTorch multiplies matrices: a packed linear that does has unpacked its weight."""

    seen = False

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        self.seen |= any(part in function.name() for part in ("mm", "linear", "matmul"))
        return function(*arguments, **(keywords or {}))


class Rotation:
    """Copies of something in memory, used in turn, so that each use finds its copy out of the cache."""

    def __init__(self, copies: list[Any]) -> None:
        self._copies = copies
        self._next = 0

    def next(self) -> Any:
        """The copy that was used longest ago."""
        copy = self._copies[self._next]
        self._next = (self._next + 1) % len(self._copies)
        return copy


class Sides:
    """Copies of a weight, dense and packed, and what is done with them."""

    def __init__(self, shape: str, dtype: str, target: str, packed_size: int, clock: TimedLibrary | None) -> None:
        height, width = map(int, shape.split("x"))
        generator = torch.Generator().manual_seed(0)
        scores = torch.randn(height, width, generator=generator)
        exact = torch.bfloat16 if dtype == INT8 else getattr(torch, dtype)
        weight = apply_mask(scores.to(exact), initial_mask(scores.abs(), pattern_of(target), Granularity.OUTPUT))
        linear = packed_linear(weight, dtype == INT8)
        self.size, self.packed_size = weight.nbytes, packed_bytes(linear)
        count = max(2, -(-packed_size // self.packed_size))
        self._dense = Rotation([weight.clone() for _ in range(count)])
        self._packed = Rotation([deepcopy(linear) for _ in range(count)])
        self._weight, self._copies, self._clock = weight, count, clock

    def measure(self, rows: int, threads: int, rounds: int) -> dict[str, Any]:
        """Seconds of each side with some rows of inputs, and what describes the sides."""
        torch.set_num_threads(threads)
        weight, width = self._weight, self._weight.shape[1]
        inputs = torch.randn(rows, width, generator=torch.Generator().manual_seed(1)).to(weight.dtype)
        outputs, sums = torch.empty(rows, weight.shape[0]), torch.empty(weight.shape[0])
        with Products() as products:
            packed_outputs = self._packed.next()(inputs)
        check(packed_outputs, inputs, weight)
        sides: dict[str, Callable[[], object]] = {
            "pytorch": lambda: torch.nn.functional.linear(inputs, self._dense.next()),
            "packed": lambda: self._packed.next()(inputs),
        }
        if payoff_native.can_multiply(weight, rows):
            payoff_native.product(weight, inputs, outputs, threads)
            check(outputs, inputs, weight)
            sides["dense"] = lambda: payoff_native.product(self._dense.next(), inputs, outputs, threads)
        if payoff_native.library() is not None:
            sides["read"] = lambda: payoff_native.read(self._dense.next(), sums, threads)
        kernel: list[float] = []
        works = {name: self._repeated(work, kernel if name == "packed" else None) for name, work in sides.items()}
        seconds = in_turn(works, rounds)
        del kernel[0]  # it warmed up
        if self._clock is not None and not products.seen:
            seconds["kernel"] = asdict(Spread.of(kernel))
        return {
            "seconds": seconds,
            "multiplied": not products.seen,
            "bytes": self.size,
            "packed_bytes": self.packed_size,
            "copies": self._copies,
            "calls": works["packed"].calls,
        }

    def _repeated(self, work: Callable[[], object], kernel: list[float] | None) -> "Repeated":
        return Repeated(work, max(1, round(SECONDS / min(timed(work)() for _ in range(3)))), self._clock, kernel)


class Repeated:
    """Seconds of one call, from several calls.

    Args:
        work: the call.
        calls: their number.
        clock: of the C extension.
        kernel: None, or where each measurement's seconds of one call within C are appended.
    """

    def __init__(
        self, work: Callable[[], object], calls: int, clock: TimedLibrary | None, kernel: list[float] | None
    ) -> None:
        self._work, self.calls, self._clock, self._kernel = work, calls, clock, kernel

    def __call__(self) -> float:
        if self._clock is not None:
            self._clock.seconds = 0.0
        start = time.perf_counter()
        for _ in range(self.calls):
            self._work()
        seconds = (time.perf_counter() - start) / self.calls
        if self._clock is not None and self._kernel is not None:
            self._kernel.append(self._clock.seconds / self.calls)
        return seconds


def packed_linear(weight: Tensor, rounded: bool) -> nn.Module:
    """Pack a weight, with its kept values as they are or rounded to int8."""
    if rounded:
        packed_to_int8 = pack_rounded(weight)
        assert packed_to_int8 is not None
        return PackedLinear(packed_to_int8, None)
    packed = pack(weight)
    assert packed is not None
    return PackedLinear(packed, None)


def packed_bytes(linear: nn.Module) -> int:
    """Bytes that a product reads of a packed linear."""
    return sum(buffer.nbytes for buffer in linear.buffers() if buffer is not None)


def check(outputs: Tensor, inputs: Tensor, weight: Tensor) -> None:
    """Refuse to time a wrong product."""
    expected = inputs.float() @ weight.float().t()
    if not torch.allclose(outputs.float(), expected, rtol=0.02, atol=0.02 * expected.abs().max().item()):
        raise SystemExit("the product is wrong")


def pattern_of(target: str) -> Pattern:
    """Pattern of a sparsity or of N:M.

    Example: "0.5" -> 50 %, "2:4" -> 2 of 4.
    """
    if ":" not in target:
        return Unstructured(float(target))
    kept, of = map(int, target.split(":"))
    return NofM(kept, of)
