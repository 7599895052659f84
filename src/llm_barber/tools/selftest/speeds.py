"""Speed of products with packed and with dense weights on a GPU."""

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from llm_barber.checkpoint.encoding import pack
from llm_barber.planning.measured_rates import Stopwatch
from llm_barber.runtime.on_gpu import has_kernels
from llm_barber.runtime.packed_linear import PackedLinear
from llm_barber.tools.selftest.bench import Bench, half_pruned

SHAPE = (4096, 4096)
ROTATED_BYTES = 2**28  # of packed weights that are multiplied in turn: no GPU's cache holds them
Product = Callable[[], Tensor]


@torch.no_grad()
def packed_speed(bench: Bench) -> str:
    """Times of products of one row of inputs with packed and with dense weights, in words.

    Weights come from memory, as those of a model do. In a CUDA graph, where the kernels can be captured, nothing but
    the kernels takes time.
    """
    weight = half_pruned(SHAPE, bench.dtype, torch.device("cpu"))
    packed = pack(weight)
    assert packed is not None
    count = -(-ROTATED_BYTES // packed.bytes)
    module = PackedLinear(packed, None).to(bench.device)
    modules = [module, *(copy.deepcopy(module) for _ in range(count - 1))]
    weights = [weight.to(bench.device, copy=True) for _ in range(count)]
    inputs = torch.randn(1, SHAPE[1], device=bench.device, dtype=bench.dtype)
    captures = has_kernels(bench.device)
    times = {
        "packed": _times(bench.device, [partial(module, inputs) for module in modules], captures),
        "dense": _times(bench.device, [partial(linear, inputs, weight) for weight in weights], captures),
    }
    shown = ", ".join(f"{name} {words}" for name, words in times.items())
    kernel = "" if captures else " (Triton's kernels do not run here: unpacked each time)"
    return f"one row of inputs, {SHAPE[0]} × {SHAPE[1]}, half pruned, weights from memory: {shown}{kernel}"


def _times(device: torch.device, products: Sequence[Product], captures: bool) -> str:
    """Microseconds of a product, called from Python and, if they can be captured, in a CUDA graph, in words."""
    stopwatch, microseconds = Stopwatch(device), 1e6 / len(products)
    called = f"{stopwatch.least(partial(_call, products)) * microseconds:.1f} µs"
    if not captures:
        return called
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        _call(products)
    return f"{called} ({stopwatch.least(graph.replay) * microseconds:.1f} in a CUDA graph)"


def _call(products: Sequence[Product]) -> None:
    for product in products:
        product()
