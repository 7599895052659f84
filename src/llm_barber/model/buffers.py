"""Buffers that checkpoints contain, such as the bias that a router adds to its scores."""

import re
from collections.abc import Collection, Iterable

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


def missing_buffers(model: nn.Module, found: Collection[str]) -> list[str]:
    """Names of the buffers that checkpoints contain and this one lacks, but for those that transformers leaves out.

    Args:
        model: a transformers model.
        found: names of the parameters and buffers that the checkpoint has.
    """
    absent = (name for name in stored_buffer_names(model) if name not in found)
    return unexpected(absent, getattr(model, "_keys_to_ignore_on_load_missing", None))


def unexpected(names: Iterable[str], expected: Iterable[str] | None) -> list[str]:
    """The names that no pattern of `expected` is found in."""
    patterns = [re.compile(pattern) for pattern in expected or ()]
    return [name for name in names if not any(pattern.search(name) for pattern in patterns)]


def set_buffer(root: nn.Module, name: str, value: Tensor, device: torch.device) -> None:
    """Set a buffer's value; the buffer keeps its dtype, since routers choose in float32."""
    path, _, leaf = name.rpartition(".")
    owner = root.get_submodule(path)
    setattr(owner, leaf, value.to(device, getattr(owner, leaf).dtype))
