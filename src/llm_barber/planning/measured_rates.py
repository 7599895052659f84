"""The speed of this machine at each kind of work, measured in a few seconds."""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import log2
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.functional import linear, scaled_dot_product_attention

from llm_barber.checkpoint.durable import sync_file
from llm_barber.checkpoint.memory import pinned_memory
from llm_barber.masking.gram import add_products, gram_flops
from llm_barber.masking.products import exact_half_products
from llm_barber.masking.selection import SORTED_ON_GPU, sort_values
from llm_barber.masking.swaps import SWAPS_A_ROUND, swap_pairs
from llm_barber.model.attention import fast_attention
from llm_barber.planning.rates import LAUNCHES, Rates
from llm_barber.planning.recipe import Recipe
from llm_barber.planning.refining_costs import ROW
from llm_barber.planning.shapes import ModelShapes

LARGEST = 4096  # rows and columns of measured matrices, at most
DISK_BYTES = 2**26  # of the measured file
STARTED = 1000  # operations of one measurement
SECONDS = 1.0  # for one measurement


def measured_rates(
    model: ModelShapes, recipe: Recipe, dtype: torch.dtype, device: torch.device, network: float
) -> Rates:
    """Measure the rates of this machine, at the sizes of a decoder layer.

    Args:
        model: shapes of the model.
        recipe: the run.
        dtype: the compute dtype.
        device: the device that computes.
        network: bytes/s between processes, which are not measured.
    """
    stopwatch = Stopwatch(device)
    layer = model.largest_layer
    shapes = {(min(rows, LARGEST), min(columns, LARGEST)) for block in layer.blocks for rows, columns in block.linears}
    rows = recipe.batch_tokens
    products, gradients, grams = Measurement(), Measurement(), Measurement()
    for out, into in sorted(shapes):
        weight, inputs = (torch.randn(size, into, dtype=dtype, device=device) for size in (out, rows))
        outputs = torch.randn(recipe.tokens, out, dtype=dtype, device=device)
        sequence = inputs[: recipe.tokens]
        products.add(2 * rows * out * into, stopwatch.least(partial(linear, inputs, weight)))
        gradients.add(2 * recipe.tokens * out * into, stopwatch.least(partial(torch.matmul, outputs.t(), sequence)))
    exact = Measurement()
    for into in {columns for _, columns in shapes}:
        values = torch.randn(recipe.tokens, into, dtype=dtype, device=device).float()
        total = torch.zeros(into, into, device=device)
        with exact_half_products(dtype):
            grams.add(gram_flops(recipe.tokens, into), stopwatch.least(partial(add_products, total, values)))
        weight = torch.randn(min(into, 1024), into, device=device)
        exact.add(2 * len(weight) * into**2, stopwatch.least(partial(torch.matmul, weight, total)))
    into = layer.blocks[0].linears[0][1]
    # A GPU is timed with as much as a run gives it at a time: less would be time of launches.
    scores = torch.rand(256 if device.type == "cpu" else max(1, SORTED_ON_GPU // into), into, device=device)
    halvings = scores.numel() * log2(into)
    read, written, kept = _disk()
    moved = _moved(stopwatch, recipe, into, dtype, device)
    return Rates(
        products=products.rate,
        gradients=gradients.rate,
        attention=_attention(stopwatch, model, recipe, dtype, device),
        grams=grams.rate,
        exact=exact.rate,
        moved=moved,
        sorted=halvings / stopwatch.least(lambda: sort_values(scores)),
        ordered=halvings / stopwatch.least(lambda: scores.sort(1)),
        searched=_searched(stopwatch, device),
        copied=_copied(stopwatch, recipe, into, dtype, device),
        reduced=network,
        read=read,
        written=written,
        kept=kept,
        launches=LAUNCHES if device.type == "cpu" else _launches(stopwatch, device),
    )


@dataclass
class Measurement:
    """Amount of work and its seconds, added up over sizes."""

    amount: float = 0
    seconds: float = 0

    def add(self, amount: float, seconds: float) -> None:
        """Add the work of another size."""
        self.amount += amount
        self.seconds += seconds

    @property
    def rate(self) -> float:
        """Amount a second."""
        return self.amount / self.seconds


@dataclass(frozen=True)
class Stopwatch:
    """Times runs on a device."""

    device: torch.device

    def least(self, run: Callable[[], object], times: int = 5) -> float:
        """Least seconds of `times` runs after one to warm up; fewer if they take longer than `SECONDS`."""
        seconds: list[float] = []
        began = time.perf_counter()
        for _ in range(times + 1):
            start = time.perf_counter()
            run()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds.append(time.perf_counter() - start)
            if time.perf_counter() - began > SECONDS:
                break
        return min(seconds[1:] or seconds)


def _attention(
    stopwatch: Stopwatch, model: ModelShapes, recipe: Recipe, dtype: torch.dtype, device: torch.device
) -> float:
    """FLOP/s of causal attention, with heads of 64 features that share no keys.

    Heads of other sizes, or with shared keys, are up to twice as fast.
    """
    heads = max(1, min(model.largest_layer.blocks[0].attention_width, LARGEST) // 64)
    sequences = max(1, recipe.batch_tokens // recipe.tokens)
    query, key, value = (torch.randn(sequences, heads, recipe.tokens, 64, dtype=dtype, device=device) for _ in range(3))
    with fast_attention(device, dtype):
        seconds = stopwatch.least(lambda: scaled_dot_product_attention(query, key, value, is_causal=True))
    return 2 * sequences * recipe.tokens**2 * heads * 64 / seconds


def _moved(stopwatch: Stopwatch, recipe: Recipe, features: int, dtype: torch.dtype, device: torch.device) -> float:
    """Bytes/s of the steps between matrix products: conversions, products and sums of a batch."""
    hidden, gate = (torch.randn(recipe.batch_tokens, features, dtype=dtype, device=device) for _ in range(2))

    def chain() -> torch.Tensor:
        wide = hidden.float()
        return torch.nn.functional.silu((wide * wide.square().mean(1, keepdim=True)).to(dtype)) * gate + hidden

    size = recipe.itemsize
    # Bytes that each of eight steps reads and writes for a number.
    touched = (size + 4) + 8 + 4 + 8 + (4 + size) + 2 * size + 3 * size + 3 * size
    return hidden.numel() * touched / stopwatch.least(chain)


def _copied(stopwatch: Stopwatch, recipe: Recipe, features: int, dtype: torch.dtype, device: torch.device) -> float:
    """Bytes/s from host memory to the device; on a CPU within its memory."""
    batch = torch.randn(recipe.batch_tokens, features, dtype=dtype)
    if device.type != "cpu":  # as activations and read layers are
        batch = pinned_memory(tuple(batch.shape), dtype).copy_(batch)
    copy = torch.empty_like(batch, device=device)
    return batch.numel() * recipe.itemsize / stopwatch.least(lambda: copy.copy_(batch, non_blocking=True))


def _searched(stopwatch: Stopwatch, device: torch.device) -> float:
    """Weights a second in a round of swaps, with rows long enough to make all swaps in one round."""
    rows, columns = 256 if device.type == "cpu" else 4096, 1024
    inputs, weight = (torch.randn(count, columns, device=device) for count in (2 * columns, rows))
    gram = inputs.t() @ inputs / len(inputs)
    keep = weight.abs() > weight.abs().median(1, keepdim=True).values
    seconds = stopwatch.least(lambda: swap_pairs(keep, weight, gram, SWAPS_A_ROUND), 2)
    return rows * (columns + ROW) / seconds


def _launches(stopwatch: Stopwatch, device: torch.device) -> float:
    """Operations a second that PyTorch starts, each on one number."""
    number = torch.zeros(1, device=device)

    def start_all() -> None:
        for _ in range(STARTED):
            number.add_(1)

    return STARTED / stopwatch.least(start_all)


def _disk() -> tuple[float, float, float]:
    """Bytes/s of reading a file, checked for NaN; of writing one durably, hashed; of writing activations.

    The system caches these files. They lie in the present folder, if that can be written.
    """
    values = {"values": torch.randn(DISK_BYTES // 4)}
    present = Path.cwd()
    with tempfile.TemporaryDirectory(dir=present if os.access(present, os.W_OK) else None) as name:
        path = Path(name) / "rate.safetensors"
        start = time.perf_counter()
        save_file(values, path)
        sync_file(path)
        written = time.perf_counter()
        with safe_open(str(path), framework="pt") as handle:  # type: ignore[no-untyped-call]
            torch.aminmax(handle.get_tensor("values").clone())
        read = time.perf_counter()
        save_file(values, path)
        sync_file(path)
        kept = time.perf_counter()
    return DISK_BYTES / (read - written), DISK_BYTES / (written - start), DISK_BYTES / (kept - read)
