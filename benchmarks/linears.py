"""Measure single linears, weights from memory: products with packed weights against PyTorch's, packing and unpacking.

So many copies of a weight take turns that they fill twice the last-level cache. It prints how many times as fast as
PyTorch's dense linear the packed one is, by rows of inputs, and GB of the dense weight that are packed and unpacked a
second. The fastest of several rounds counts. `LLM_BARBER_ISA=avx2` measures the path for processors without AVX-512.

    python benchmarks/linears.py
    python benchmarks/linears.py --shapes 896x4864 --dtypes float32 --threads 2
"""

import argparse
import copy
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import keep, show
from torch.nn.functional import linear

from llm_barber.checkpoint.encoding import pack, unpack
from llm_barber.masking.granularity import Granularity
from llm_barber.masking.initial import initial_mask
from llm_barber.masking.pattern import NofM, Unstructured
from llm_barber.runtime.packed_linear import PackedLinear

TARGETS = {"50 %": Unstructured(0.5), "70 %": Unstructured(0.7), "2:4": NofM(2, 4)}
ROWS = (1, 4, 16, 256)
SECONDS = 0.05  # of one measurement, about
CACHE = Path("/sys/devices/system/cpu/cpu0/cache")


def main() -> None:
    """Measure each weight and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4096x4096,4096x14336,896x4864", help="OUTxIN, separated by commas")
    parser.add_argument("--dtypes", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        rows = [
            [f"{shape.replace('x', ' × ')}, {target}", dtype, *measure(shape, target, getattr(torch, dtype), options)]
            for shape in options.shapes.split(",")
            for target in TARGETS
            for dtype in options.dtypes.split(",")
        ]
    title = f"packed against PyTorch's dense linear, {options.threads} threads"
    keep("linears", {"title": title, "rows": rows})
    headings = ["weight", "dtype", "byte limit", *(f"{count} rows" for count in ROWS), "pack, GB/s", "unpack, GB/s"]
    show(title, headings, rows)


def measure(shape: str, target: str, dtype: torch.dtype, options: argparse.Namespace) -> list[str]:
    """Cells of a weight: the ratio of bytes, speed by rows of inputs, rates of packing and unpacking."""
    height, width = map(int, shape.split("x"))
    scores = torch.randn(height, width, generator=torch.Generator().manual_seed(0))
    weight = scores.to(dtype).masked_fill(~initial_mask(scores.abs(), TARGETS[target], Granularity.OUTPUT), 0)
    packed = pack(weight)
    assert packed is not None
    module = PackedLinear(packed, None)
    size = sum(buffer.nbytes for buffer in module.buffers() if buffer is not None)
    count = max(2, -(-2 * last_level_cache() // size))
    dense = itertools.cycle([weight.clone() for _ in range(count)])
    modules = itertools.cycle([copy.deepcopy(module) for _ in range(count)])
    cells = [f"{weight.nbytes / size:.2f}"]
    for rows in ROWS:
        inputs = torch.randn(rows, width).to(dtype)
        slow, fast = in_turn(
            [lambda: linear(inputs, next(dense)), lambda: next(modules)(inputs)], options.rounds  # noqa: B023
        )  # fmt: skip
        cells.append(f"{slow / fast:.2f}")
    memory = torch.empty_like(weight)
    times = in_turn([lambda: pack(weight), lambda: unpack(packed, lambda *_: memory)], options.rounds)
    return cells + [f"{weight.nbytes / seconds / 1e9:.2f}" for seconds in times]


def in_turn(works: list[Callable[[], object]], rounds: int) -> list[float]:
    """Seconds of one call of each, the fastest round, measured in turn; a first round warms up."""
    calls = [1] * len(works)
    fastest = [float("inf")] * len(works)
    for number in range(rounds + 1):
        for index, work in enumerate(works):
            began = time.perf_counter()
            for _ in range(calls[index]):
                work()
            seconds = (time.perf_counter() - began) / calls[index]
            if number == 0:
                calls[index] = max(1, round(SECONDS / seconds))
            else:
                fastest[index] = min(fastest[index], seconds)
    return fastest


def last_level_cache() -> int:
    """Bytes of the first processor's largest cache; 32 MiB where the system does not say."""
    sizes = [path.read_text().strip() for path in CACHE.glob("index*/size")]
    return max((int(size.rstrip("KM")) << (20 if size.endswith("M") else 10) for size in sizes), default=32 << 20)


if __name__ == "__main__":
    main()
