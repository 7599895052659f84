"""Copies of finished tensors to host memory, which a GPU makes while it computes on."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from llm_barber.checkpoint.memory import pinned_memory


def start_copies(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """Start to copy tensors to host memory; nothing waits for a GPU.

    Args:
        tensors: by name; they must not be changed, but may be freed.

    Returns:
        Contiguous tensors in host memory, by name, and a function that waits until they are complete. It may be called
        by another thread.
    """
    on_host = {name: _start_copy(tensor) for name, tensor in tensors.items()}
    devices = {tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"}
    copied = [torch.cuda.current_stream(device).record_event() for device in devices]

    def wait() -> None:
        for event in copied:
            event.synchronize()

    return on_host, wait


def _start_copy(tensor: Tensor) -> Tensor:
    """Copy by the stream that computes: memory that is freed is not used again before the copy is complete."""
    if tensor.device.type != "cuda":
        return tensor.cpu().contiguous()
    return pinned_memory(tuple(tensor.shape), tensor.dtype).copy_(tensor, non_blocking=True)
