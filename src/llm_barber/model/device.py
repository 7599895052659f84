"""Choose the device, the compute dtype, and the number of sequences to compute together."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedConfig

from llm_barber.errors import BarberError, SettingsError
from llm_barber.parallel.ranks import local_rank

# Tokens of a batch: large enough for fast matrix products, small enough for temporaries to stay in the caches.
CPU_BATCH_TOKENS = 2048
GPU_BATCH_TOKENS = 8192
# Where attention stores the scores of all pairs of tokens, bytes for each pair and head: of the scores, of what caps
# them, of their softmax in float32 and of its copy in the compute dtype, with what autograd keeps.
SCORE_BYTES = 16
# Names in configurations of the number of experts that a router chooses for a token.
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")


def resolve_device(name: str) -> torch.device:
    """Choose the device of that name; `auto` is CUDA if available, else the CPU.

    Each process of a machine takes its own GPU.

    Raises:
        SettingsError: there is no such device.
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
        raise SettingsError(f"--device: unknown device {name!r}", "use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        present = "no GPU" if not count else "cuda:0 alone" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise SettingsError(
            f"--device {name}: PyTorch sees {present}",
            "use --device cpu" if count else "use --device cpu, or install a PyTorch that is built for GPUs",
        )
    if device.type == "cuda":  # before the first product: otherwise PyTorch takes cuBLAS to add up in any order
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return device


@contextmanager
def current_gpu_kept() -> Iterator[None]:
    """Make the caller's current GPU current again when the context ends; a CPU's run leaves CUDA alone."""
    cuda: Any = torch.cuda
    before = cuda.current_device() if cuda.is_initialized() else 0
    try:
        yield
    finally:
        if cuda.is_initialized():
            cuda._maybe_exchange_device(before)  # `set_device` would take memory of a GPU that was not used so far


@contextmanager
def fixed_order(device: torch.device) -> Iterator[None]:
    """Let a GPU add up in a fixed order within the context, where PyTorch can; a CPU always does.

    CUDA's usual backward pass of attention, and a few other operations, add up in the order in which threads arrive.
    PyTorch has deterministic operations in place of most of them, and warns of an operation without one. Forward and
    backward passes of attention then take the same kernels, too: a difference of two outputs measures pruning only if
    both come from the same kernels.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]  # a module's property
    if device.type != "cpu":
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Choose the dtype of that name; `auto` is the device's fastest dtype with float32's range.

    That is bfloat16 on CPUs with AVX512-BF16 or AMX and on GPUs that have it, else float32: other devices emulate
    bfloat16 slowly.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32


def multiplies_bfloat16(device: torch.device) -> bool:
    """Test whether the device has instructions for products in bfloat16."""
    if device.type == "cuda":
        with torch.cuda.device(device):  # PyTorch asks the current GPU
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Private in torch; if a function is missing, the answer is the safe one, False.
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check() for check in checks if check is not None)


def resolve_batch_size(limit: int | None, seqlen: int, sequences: int, device: torch.device) -> int:
    """Choose the number of sequences to compute together: `limit`, or what suits the device.

    On CPUs a batch has at most `CPU_BATCH_TOKENS` tokens (or one sequence): larger products are no faster, and
    PyTorch's bfloat16 kernels round them differently, so that the batch size would show in the masks.
    """
    suits = max(1, (CPU_BATCH_TOKENS if device.type == "cpu" else GPU_BATCH_TOKENS) // seqlen)
    if limit is None:
        return min(sequences, suits)
    return min(sequences, limit, suits) if device.type == "cpu" else min(sequences, limit)


class DeviceMemoryError(BarberError):
    """A GPU's memory is too small."""


@contextmanager
def device_memory_checked() -> Iterator[None]:
    """Say what helps when a GPU's memory is too small.

    Raises:
        DeviceMemoryError: it is.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            "the GPU's memory is too small",
            "use a smaller --batch-size, a shorter --seqlen or --activations-off-device; --resume goes on",
        ) from error


def free_device_memory(device: torch.device, limit: int | None) -> int:
    """Bytes of a CUDA device that this process can take, beside those that it has allocated.

    Args:
        device: the device.
        limit: most bytes that the process may allocate in all; None: all of the device's.
    """
    free, _ = torch.cuda.mem_get_info(device)
    # Memory that PyTorch has reserved and does not use, for example after an earlier run, is free as well.
    allocated = torch.cuda.memory_allocated(device)
    free += torch.cuda.memory_reserved(device) - allocated
    return free if limit is None else max(0, min(free, limit - allocated))


def experts_per_token(config: PreTrainedConfig) -> int:
    """Largest number of experts that a router chooses for a token; 1 for a model without experts."""
    counts = [getattr(config.get_text_config(), name, None) for name in EXPERTS_PER_TOKEN]
    return max((max(count) if isinstance(count, list | tuple) else int(count) for count in counts if count), default=1)


def stored_score_bytes(config: PreTrainedConfig) -> int:
    """Bytes of all heads' scores of a pair of tokens where attention stores them; 0 where a kernel does not."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", 0)  # a state-space model has none
    return SCORE_BYTES * heads if text._attn_implementation == "eager" else 0
