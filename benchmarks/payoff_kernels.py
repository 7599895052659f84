"""Products of single linears, weights from memory: packed, PyTorch's, and a dense kernel of the same instructions."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import show
from payoff_cells import Cells, Spread
from payoff_linears import Sides, install_clock

SHAPES = "4096x4096,14336x4096,4096x14336,896x4864"
QUICK = {"shapes": "4096x4096,896x4864", "targets": "0.5", "dtypes": "bfloat16", "rows": "1,4", "rounds": 3}
SOURCES = ("native", "runtime", "checkpoint")  # folders of the package that the results depend on
CACHE = Path("/sys/devices/system/cpu/cpu0/cache")
HEADINGS = [
    "weight", "values", "pruned", "rows", "threads", "byte limit", "kernel", "PackedLinear", "read GB/s",
    "dense kernel", "PyTorch", "PackedLinear µs: minimum / median / maximum",
]  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", default=SHAPES, help="OUTxIN, separated by commas")
    parser.add_argument("--targets", default="0.5,0.6,0.7,2:4", help="sparsities and N:M patterns")
    parser.add_argument("--dtypes", default="bfloat16,float32,int8", help="of kept values; int8: of a bfloat16 weight")
    parser.add_argument("--rows", default="1,4,16", help="rows of inputs")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each side")
    parser.add_argument("--caches", type=float, default=2, help="size of all packed copies, in last-level caches")


def run(options: argparse.Namespace, folder: Path | None) -> None:
    """Measure all cells that are not kept, and print the table."""
    cells = Cells("kernels", folder, SOURCES)
    clock = install_clock()
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


def last_level_cache() -> int:
    """Bytes of the largest cache of the first processor; 32 MiB where the system does not say."""
    sizes = [path.read_text().strip() for path in CACHE.glob("index*/size")]
    return max((int(size.rstrip("KM")) << (20 if size.endswith("M") else 10) for size in sizes), default=32 << 20)


def numbers(text: str) -> list[int]:
    """Read whole numbers that commas separate."""
    return [int(part) for part in text.split(",")]
