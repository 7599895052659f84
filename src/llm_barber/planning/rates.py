"""The speed of a machine at each kind of work, from a few numbers that are known of it."""

from dataclasses import dataclass, fields

import torch

from llm_barber.planning.work import Work

# The resource that limits each kind of work.
KINDS = {
    "products": "compute", "gradients": "compute", "attention": "compute", "grams": "compute", "exact": "compute",
    "moved": "memory", "sorted": "memory", "ordered": "memory", "searched": "memory",
    "copied": "link", "reduced": "network",
    "read": "disk", "written": "disk", "kept": "disk", "launches": "launches",
}  # fmt: skip
# Assumed speeds of a named machine: shares of the rate of matrix products.
ATTENTION_SHARE, FLOAT32_SHARE, TF32_SHARE = 0.5, 0.125, 0.5
# Bytes that memory moves: to sort an element, for each halving; for a weight, in a round of swaps.
SORTING_BYTES, SEARCHING_BYTES = 8, 400
LAUNCHES = 150_000.0  # kernels a second that PyTorch starts, assumed for a named machine
# Bytes/s of a core that hashes, assumed for a named machine: SHA-256 (of the output, by instructions for it; an AMD
# EPYC took 1.8e9) and XXH3 (of activations for `--resume`).
SHA256, XXH3 = 1.5e9, 2e10


@dataclass(frozen=True)
class Rates:
    """Amounts a second, of each kind of `Work`; FLOP/s, bytes/s, elements/s, launches/s."""

    products: float
    gradients: float
    attention: float
    grams: float
    exact: float
    moved: float
    sorted: float
    ordered: float
    searched: float
    copied: float
    reduced: float
    read: float
    written: float
    kept: float
    launches: float

    def seconds(self, work: Work) -> dict[str, float]:
        """Seconds of work by resource: compute, memory, link (host, device), network (processes), disk, launches."""
        seconds = dict.fromkeys(KINDS.values(), 0.0)
        for kind in fields(self):
            seconds[KINDS[kind.name]] += getattr(work, kind.name) / getattr(self, kind.name)
        return seconds


def named_rates(
    flops: float,
    float32_flops: float | None,
    memory: float,
    link: float,
    network: float,
    disk: float,
    dtype: torch.dtype,
) -> Rates:
    """Rates of a machine of which these are known.

    Args:
        flops: FLOP/s of matrix products in the compute dtype, as they are reached.
        float32_flops: FLOP/s of matrix products in float32; None: an eighth of `flops`.
        memory: bytes/s of the device's memory.
        link: bytes/s between host and device.
        network: bytes/s between processes.
        disk: bytes/s, reading and writing.
        dtype: the compute dtype; half precision is multiplied as TF32 where sums are float32.
    """
    exact = float32_flops or flops * FLOAT32_SHARE
    sorting = memory / SORTING_BYTES
    return Rates(
        products=flops, gradients=flops, attention=flops * ATTENTION_SHARE,
        grams=exact if dtype == torch.float32 else max(exact, flops * TF32_SHARE), exact=exact,
        moved=memory, sorted=sorting, ordered=sorting, searched=memory / SEARCHING_BYTES,
        copied=link, reduced=network, launches=LAUNCHES, **disk_rates(disk),
    )  # fmt: skip


def disk_rates(disk: float) -> dict[str, float]:
    """Bytes/s of reading, of writing the output, and of writing activations, with their hashes.

    The output is hashed while the disk writes it, and activations before.

    Args:
        disk: bytes/s of the disk.
    """
    return {"read": disk, "written": min(disk, SHA256), "kept": 1 / (1 / disk + 1 / XXH3)}
