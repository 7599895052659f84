"""Measure how fast weights are packed and unpacked, against the rate of copying memory.

Rates are in bytes of the dense weight. Goal: a quarter of the copy rate. The memory written to is allocated before,
since fresh memory costs page faults, too. It prints GB/s for each shape, target and dtype.

    python benchmarks/packing.py
    python benchmarks/packing.py --shapes 4096x4096,4096x14336 --threads 4
"""

import argparse
import time
from collections.abc import Callable

import torch
from common import show

from llm_barber import native
from llm_barber.checkpoint.encoding import Packed, pack, unpack
from llm_barber.masking.granularity import Granularity
from llm_barber.masking.initial import initial_mask
from llm_barber.masking.pattern import NofM, Pattern, Unstructured
from llm_barber.masking.selection import apply_mask

TARGETS: dict[str, Pattern] = {"50 %": Unstructured(0.5), "70 %": Unstructured(0.7), "2:4": NofM(2, 4)}


def fastest(work: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of several calls."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def unpack_into(packed: Packed, memory: torch.Tensor) -> torch.Tensor:
    """Unpack a weight into memory, (out · in,), that exists already."""
    return unpack(packed, lambda shape, _: memory.view(shape))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4096x4096,4096x14336", help="OUTxIN, separated by commas")
    parser.add_argument("--repeats", type=int, default=5, help="the fastest counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--without-c", action="store_true", help="as where the C extension was not built")
    options = parser.parse_args()
    if options.without_c:
        native.library = lambda: None
    torch.set_num_threads(options.threads)
    rows = []
    for shape in options.shapes.split(","):
        height, width = map(int, shape.split("x"))
        scores = torch.randn(height, width)
        for name, target in TARGETS.items():
            keep = initial_mask(scores.abs(), target, Granularity.OUTPUT)
            for dtype in (torch.bfloat16, torch.float32):
                weight = apply_mask(scores.to(dtype), keep)
                size = weight.numel() * weight.element_size() / 1e9
                packed = pack(weight)
                assert packed is not None
                memory = torch.empty(weight.numel(), dtype=dtype)
                assert torch.equal(unpack_into(packed, memory), weight)
                copying = size / fastest(lambda: memory.copy_(weight.view(-1)), options.repeats)  # noqa: B023
                packing = size / fastest(lambda: pack(weight), options.repeats)  # noqa: B023
                unpacking = size / fastest(lambda: unpack_into(packed, memory), options.repeats)  # noqa: B023
                rows.append(
                    [f"{height} × {width}, {name}", str(dtype).removeprefix("torch."), packed.encoding.value,
                     f"{copying:.1f}", f"{packing:.2f}", f"{packing / copying:.0%}", f"{unpacking:.2f}",
                     f"{unpacking / copying:.0%}"]
                )  # fmt: skip
    show(
        f"GB of dense weights per second, {'in C' if native.library() else 'with NumPy'}",
        ["weight", "dtype", "encoding", "copy", "pack", "of copy", "unpack", "of copy"],
        rows,
    )


if __name__ == "__main__":
    main()
