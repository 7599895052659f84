"""Which device and compute dtype to use, and how many sequences to compute together."""

import os
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedConfig

from llm_barber.errors import SettingsError
from llm_barber.messages import SettingName, message
from llm_barber.model.architecture import kind_of
from llm_barber.parallel.ranks import local_rank

# Large enough for the matrix products, small enough for temporaries to stay in the caches.
CPU_BATCH_TOKENS = 2048
GPU_BATCH_TOKENS = 8192
# What a GPU holds at once, for an estimate; `planning/memory.py` counts it for each step.
BYTES_OF_A_WEIGHT = 40  # of the layer: as read, as computed with, pruned, mask, statistics and their ranking
INPUT_ARRAYS, OUTPUT_ARRAYS = 10, 2  # of a batch: float32 ones of the widest, those of linears' inputs and outputs
# What configurations call it.
EXPERTS_A_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; each process of a machine takes a GPU of its own.

    Raises:
        SettingsError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available():
        started_by_torchrun = "LOCAL_RANK" in os.environ
        name = f"cuda:{local_rank() if started_by_torchrun else torch.cuda.current_device()}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise SettingsError(message("{device}: unknown device {name!r}", name=name), "use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        missing = "{device} is not there: PyTorch sees {count}"
        shown = message(missing, device=SettingName("device", name), count=torch.cuda.device_count())
        raise SettingsError(shown, "use --device cpu")
    if device.type == "cuda":  # before the first product: without it PyTorch takes cuBLAS to add up in any order
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is the fastest dtype of the device that keeps float32's range, else float32.

    bfloat16 on CPUs with AVX512-BF16 or AMX and on GPUs that have it; others would emulate it slowly.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32


def multiplies_bfloat16(device: torch.device) -> bool:
    """Does the device have instructions for it?"""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Private in torch; absent, the answer is the safe one.
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check() for check in checks if check is not None)


def resolve_batch_size(asked: int | None, seqlen: int, sequences: int, device: torch.device) -> int:
    """Sequences to compute together: a number of tokens that suits the device, or at most as many as asked for.

    On CPUs never more than `CPU_BATCH_TOKENS` (or one sequence): larger products are no faster, and PyTorch's bfloat16
    kernels round them differently, so that the batch size would show in the masks.
    """
    suits = max(1, (CPU_BATCH_TOKENS if device.type == "cpu" else GPU_BATCH_TOKENS) // seqlen)
    if asked is None:
        return min(sequences, suits)
    return min(sequences, asked, suits) if device.type == "cpu" else min(sequences, asked)


def free_device_memory(device: torch.device, limit: int | None) -> int:
    """Bytes that a CUDA device has left for this process, which is to take at most `limit`."""
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # of runs before, and reused
    return free if limit is None else min(free, limit)


def fitting_batch(layers: nn.ModuleList, seqlen: int, free: int, dtype: torch.dtype, experts_per_token: int = 1) -> int:
    """How many sequences can be computed together in so much memory, about; at least one.

    Where that is too many after all, a layer is computed again with half as many (`embedding.py`).

    Args:
        layers: the decoder layers.
        seqlen: tokens a sequence.
        free: bytes.
        dtype: of computing.
        experts_per_token: that a router chooses.
    """
    sequences = free
    for weights, of_a_token in _needs(layers, dtype, experts_per_token):
        sequences = min(sequences, (free - weights) // (of_a_token * seqlen))
    return max(1, sequences)


def needed_memory(layers: nn.ModuleList, seqlen: int, dtype: torch.dtype, experts_per_token: int = 1) -> int:
    """Bytes that the largest layer takes with one sequence, about; the arguments are those of `fitting_batch`."""
    needs = _needs(layers, dtype, experts_per_token)
    return max((weights + of_a_token * seqlen for weights, of_a_token in needs), default=0)


def _needs(layers: nn.ModuleList, dtype: torch.dtype, experts_per_token: int) -> Iterator[tuple[int, int]]:
    """Bytes that each layer takes, whatever it computes, and for each token."""
    for layer in layers:
        shapes = {kind_of(name): tuple(one.shape) for name, one in layer.named_parameters() if one.dim() == 2}
        # Both sides: a matrix may be kept as (in, out), and is read from one side and written to the other.
        sides = sum(sum(shape) * (experts_per_token if "*" in kind else 1) for kind, shape in shapes.items())
        widest = max((max(shape) for shape in shapes.values()), default=1)
        token = INPUT_ARRAYS * 4 * widest + OUTPUT_ARRAYS * dtype.itemsize * sides
        yield BYTES_OF_A_WEIGHT * sum(one.numel() for one in layer.parameters()), token


def experts_per_token(config: PreTrainedConfig) -> int:
    """How many a router chooses for a token, in the layer where they are most; 1 of a model without."""
    found = [getattr(config.get_text_config(), name, None) for name in EXPERTS_A_TOKEN]
    return max((max(one) if isinstance(one, list | tuple) else int(one) for one in found if one), default=1)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Has the device no memory left, be it PyTorch or cuBLAS that says so?"""
    return isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error)
