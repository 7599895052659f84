"""Buffers that checkpoints contain, such as the bias that a router adds to its scores."""

import torch
from torch import Tensor, nn


def stored_buffer_names(root: nn.Module) -> list[str]:
    """Names, inside a module, of the buffers that a checkpoint contains."""
    return [
        f"{path}.{name}" if path else name
        for path, module in root.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]


def set_buffer(root: nn.Module, name: str, value: Tensor, device: torch.device) -> None:
    """Set a buffer's value; the buffer keeps its dtype, since routers choose in float32."""
    path, _, leaf = name.rpartition(".")
    owner = root.get_submodule(path)
    setattr(owner, leaf, value.to(device, getattr(owner, leaf).dtype))
