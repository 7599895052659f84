"""Products of single linears, weights from memory: packed, PyTorch's, and a dense kernel of the same instructions."""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import payoff_native
import torch
from common import show
from payoff_cells import Cells, Spread, in_turn, timed
from torch import Tensor

from llm_barber import native
from llm_barber.checkpoint.encoding import pack
from llm_barber.masking.granularity import Granularity
from llm_barber.masking.initial import initial_mask
from llm_barber.masking.pattern import NofM, Pattern, Unstructured
from llm_barber.masking.selection import apply_mask
from llm_barber.runtime.packed_linear import PackedLinear, use_native

SHAPES = "4096x4096,14336x4096,4096x14336,896x4864"
QUICK = {"shapes": "4096x4096,896x4864", "targets": "0.5", "dtypes": "bfloat16", "rows": "1,4", "rounds": 3}
SOURCES = ("native", "runtime", "checkpoint")  # folders of the package that the results depend on
CACHE = Path("/sys/devices/system/cpu/cpu0/cache")
SECONDS = 0.05  # of one measurement, about
HEADINGS = [
    "weight", "values", "pruned", "rows", "threads", "byte limit", "kernel", "PackedLinear", "read GB/s",
    "dense kernel", "PyTorch", "PackedLinear µs: minimum / median / maximum",
]  # fmt: skip


class TimedLibrary:
    """The C extension, with a clock around its functions: seconds within C since `seconds` was set to 0."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._library, name)

        def call(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments)
            self.seconds += time.perf_counter() - start
            return result

        return call


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


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", default=SHAPES, help="OUTxIN, separated by commas")
    parser.add_argument("--targets", default="0.5,0.6,0.7,2:4", help="sparsities and N:M patterns")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--rows", default="1,4,16", help="rows of inputs")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each side")
    parser.add_argument("--caches", type=float, default=2, help="size of all packed copies, in last-level caches")


def run(options: argparse.Namespace, folder: Path | None) -> None:
    """Measure all cells that are not kept, and print the table."""
    cells = Cells("kernels", folder, SOURCES)
    library = native.library()
    clock = TimedLibrary(library) if library is not None else None
    if clock is not None:
        native.library = lambda: clock  # every caller looks the library up by this name
    cache = last_level_cache()
    rows = []
    with torch.inference_mode():
        for shape, dtype, target in every_weight(options):
            sides = None
            for count in numbers(options.rows):
                for threads in numbers(options.threads):
                    name = f"{shape} {dtype} {target} rows {count} threads {threads}"
                    settings = {"rounds": options.rounds, "caches": options.caches, "last_level_cache": cache}
                    print(f"{name} …", flush=True)

                    def measure() -> dict[str, Any]:
                        nonlocal sides
                        sides = sides or Sides(shape, dtype, target, int(options.caches * cache), clock)  # noqa: B023
                        return sides.measure(count, threads, options.rounds)  # noqa: B023

                    rows.append(table_row(name, cells.result(name, settings, measure)))
    show(
        f"Products, weights from memory, fastest of {options.rounds}; packed copies fill {options.caches:g} × "
        f"{cache >> 20} MiB\nkernel: against the dense kernel; PackedLinear: against PyTorch; brackets: share of read",
        HEADINGS,
        rows,
    )


def every_weight(options: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """Shape, dtype and target of each weight."""
    for shape in options.shapes.split(","):
        for dtype in options.dtypes.split(","):
            for target in options.targets.split(","):
                yield shape, dtype, target


class Sides:
    """Copies of a weight, dense and packed, and what is done with them."""

    def __init__(self, shape: str, dtype: str, target: str, packed_size: int, clock: TimedLibrary | None) -> None:
        height, width = map(int, shape.split("x"))
        generator = torch.Generator().manual_seed(0)
        scores = torch.randn(height, width, generator=generator)
        weight = apply_mask(
            scores.to(getattr(torch, dtype)), initial_mask(scores.abs(), pattern_of(target), Granularity.OUTPUT)
        )
        packed = pack(weight)
        assert packed is not None
        linear = PackedLinear(packed, None)
        self.size, self.packed_size = weight.nbytes, packed_bytes(linear)
        count = max(2, -(-packed_size // self.packed_size))
        self._dense = Rotation([weight.clone() for _ in range(count)])
        self._packed = Rotation([copy_of(linear) for _ in range(count)])
        self._weight, self._copies, self._clock = weight, count, clock

    def measure(self, rows: int, threads: int, rounds: int) -> dict[str, Any]:
        """Seconds of each side with some rows of inputs, and what describes the sides."""
        torch.set_num_threads(threads)
        weight, width = self._weight, self._weight.shape[1]
        inputs = torch.randn(rows, width, generator=torch.Generator().manual_seed(1)).to(weight.dtype)
        outputs, sums = torch.empty(rows, weight.shape[0]), torch.empty(weight.shape[0])
        check(self._packed.next()(inputs), inputs, weight)
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
        multiplied = use_native(self._packed.next().values, weight.dtype, width, rows, False)
        in_c = self._clock is not None and multiplied and (threads == 1 or native.instructions() > 0)
        if in_c:
            seconds["kernel"] = asdict(Spread.of(kernel))
        return {
            "seconds": seconds,
            "multiplied": multiplied,
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


def table_row(name: str, result: dict[str, Any]) -> list[str]:
    """Cells of the table; speeds are ratios of the fastest measurements, and GB of the dense weight per second."""
    shape, dtype, target, _, rows, _, threads = name.split(" ")
    fastest = {side: seconds["minimum"] for side, seconds in result["seconds"].items()}
    dense, kernel = fastest.get("dense"), fastest.get("kernel")

    def rate(side: str) -> str:
        return f"{result['bytes'] / fastest[side] / 1e9:.1f}" if side in fastest else "–"

    of_read = f" ({fastest['read'] / dense:.0%})" if dense and "read" in fastest else ""
    return [
        shape.replace("x", " × "), dtype, target, rows, threads,
        f"{byte_limit(result['bytes'], result['packed_bytes']):.2f}",
        f"{dense / kernel:.2f}" if dense and kernel else "–",
        f"{fastest['pytorch'] / fastest['packed']:.2f}" + ("" if result["multiplied"] else " (unpacked)"),
        rate("read"), rate("dense") + of_read, rate("pytorch"),
        Spread(**result["seconds"]["packed"]).shown(1e6),
    ]  # fmt: skip


def byte_limit(dense: int, packed: int) -> float:
    """Ratio that a product which only waits for memory cannot exceed.

    Example: 32 MiB dense, 18 MiB packed -> 1.78.
    """
    return dense / packed


def packed_bytes(linear: PackedLinear) -> int:
    """Bytes that a product reads of a packed linear."""
    return sum(buffer.nbytes for buffer in linear.buffers() if buffer is not None)


def copy_of(linear: PackedLinear) -> PackedLinear:
    """A linear with buffers of its own."""
    copied = PackedLinear.__new__(PackedLinear)
    torch.nn.Module.__init__(copied)
    copied.__dict__.update({name: value for name, value in linear.__dict__.items() if name != "_buffers"})
    copied._buffers = {name: None if buffer is None else buffer.clone() for name, buffer in linear._buffers.items()}
    return copied


def check(outputs: Tensor, inputs: Tensor, weight: Tensor) -> None:
    """Refuse to time a wrong product."""
    expected = inputs.float() @ weight.float().t()
    if not torch.allclose(outputs.float(), expected, rtol=0.02, atol=0.02 * expected.abs().max().item()):
        raise SystemExit("the product is wrong")


def last_level_cache() -> int:
    """Bytes of the largest cache of the first processor; 32 MiB where the system does not say."""
    sizes = [path.read_text().strip() for path in CACHE.glob("index*/size")]
    return max((int(size.rstrip("KM")) << (20 if size.endswith("M") else 10) for size in sizes), default=32 << 20)


def pattern_of(target: str) -> Pattern:
    """Pattern of a sparsity or of N:M.

    Example: "0.5" -> 50 %, "2:4" -> 2 of 4.
    """
    if ":" not in target:
        return Unstructured(float(target))
    kept, of = map(int, target.split(":"))
    return NofM(kept, of)


def numbers(text: str) -> list[int]:
    """Read whole numbers that commas separate."""
    return [int(part) for part in text.split(",")]
