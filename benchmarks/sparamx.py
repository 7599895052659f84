"""Compare the product of a packed linear with SparAMX's (arXiv 2502.12444), one row of inputs, weights from memory.

    git clone https://github.com/IntelLabs/Hardware-Aware-Automated-Machine-Learning
    git -C Hardware-Aware-Automated-Machine-Learning checkout fc29bc7    # the commit that was measured
    pip install ninja sympy
    python benchmarks/sparamx.py --sparamx Hardware-Aware-Automated-Machine-Learning/SparAMX

SparAMX's kernel without AMX is built for this processor, which needs AVX-512 with VBMI2 and BF16.
"""

import argparse
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from common import show
from payoff_cells import Spread, in_turn, timed
from payoff_kernels import last_level_cache, numbers
from payoff_linears import Repeated, Rotation, check, packed_bytes, packed_linear, pattern_of
from torch import Tensor, nn
from torch.utils import cpp_extension

from llm_barber.masking.granularity import Granularity
from llm_barber.masking.initial import initial_mask
from llm_barber.masking.selection import apply_mask

SHAPES = "4096x4096,14336x4096,4096x14336"  # SparAMX's layout wants rows in multiples of 512 a thread
SOURCE, LAYER = "csrc/avx_sparse_linear.cpp", "layer/avx_sparse_linear.py"
SECONDS = 0.05  # of one measurement, about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparamx", type=Path, required=True, help="SparAMX's folder")
    parser.add_argument("--work", type=Path, default=Path("build/sparamx"), help="folder for the built kernels")
    parser.add_argument("--shapes", default=SHAPES, help="OUTxIN, separated by commas")
    parser.add_argument("--targets", default="0.5,0.7", help="sparsities and N:M patterns")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each side")
    options = parser.parse_args()
    kernel = build(options.sparamx, options.work)
    rows = []
    with torch.inference_mode():
        for shape in options.shapes.split(","):
            for target in options.targets.split(","):
                for threads in numbers(options.threads):
                    print(f"{shape} {target} threads {threads} …", flush=True)
                    rows.append([shape.replace("x", " × "), target, str(threads), *measure(shape, target, threads,
                                 kernel, options.rounds)])  # fmt: skip
    show(
        f"One row of inputs, bfloat16, weights from memory; µs, minimum / median / maximum of {options.rounds}",
        ["weight", "pruned", "threads", "PyTorch, dense", "SparAMX", "PackedLinear", "SparAMX / ours"],
        rows,
    )


def build(sparamx: Path, work: Path) -> type[Any]:
    """Build SparAMX's kernel, and return its class of linears."""
    work.mkdir(parents=True, exist_ok=True)
    extension = cpp_extension.load(
        "sparamx_kernel", [str(sparamx / SOURCE)], extra_cflags=["-O3", "-fopenmp", "-DNDEBUG", "-march=native"],
        build_directory=str(work),
    )  # fmt: skip
    package, layer = ModuleType("sparamx"), ModuleType("sparamx_layer")
    vars(package)["avx_sparse_linear"] = extension
    sys.modules["sparamx"] = package  # SparAMX's layer imports its kernel from there
    exec(compile((sparamx / LAYER).read_text(encoding="utf-8"), LAYER, "exec"), vars(layer))
    linear: type[Any] = layer.AvxSparseLinear
    return linear


def measure(shape: str, target: str, threads: int, kernel: type[Any], rounds: int) -> list[str]:
    """Microseconds of each side, and the ratio of SparAMX's to ours."""
    torch.set_num_threads(threads)
    height, width = map(int, shape.split("x"))
    scores = torch.randn(height, width, generator=torch.Generator().manual_seed(0))
    weight = apply_mask(scores.bfloat16(), initial_mask(scores.abs(), pattern_of(target), Granularity.OUTPUT))
    inputs = torch.randn(1, 1, width, generator=torch.Generator().manual_seed(1)).bfloat16()
    linear = packed_linear(weight, False)
    count = max(2, -(-2 * last_level_cache() // packed_bytes(linear)))
    sparamx = kernel.from_weights(weight, num_threads=threads)
    dense, theirs, ours = (Rotation([deepcopy(each) for _ in range(count)]) for each in (weight, sparamx, linear))
    sides: dict[str, Callable[[], Tensor]] = {
        "PyTorch": lambda: nn.functional.linear(inputs, dense.next()),
        "SparAMX": lambda: theirs.next()(inputs),
        "ours": lambda: ours.next()(inputs),
    }
    works = {}
    for name, work in sides.items():
        check(work()[0], inputs[0], weight)
        works[name] = Repeated(work, max(1, round(SECONDS / min(timed(work)() for _ in range(3)))), None, None)
    spreads = {name: Spread(**seconds) for name, seconds in in_turn(works, rounds).items()}
    ratio = spreads["SparAMX"].minimum / spreads["ours"].minimum
    return [*(spread.shown(1e6) for spread in spreads.values()), f"{ratio:.2f}"]


if __name__ == "__main__":
    main()
