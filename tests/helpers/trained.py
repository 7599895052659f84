"""Pruned tiny models, their training, and the weights that their forward passes use."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.conftest import make_model, save_tokens
from tests.helpers.prune_runs import run
from tests.helpers.text import add_tokenizer

QUICK: dict[str, Any] = {"initial": "magnitude", "rebuild": False, "dtype": "float32"}
IDS = torch.arange(1, 25).view(2, 12)


def make_pruned(
    folder: Path, family: str = "llama", settings: dict[str, Any] | None = None, tokenizer: bool = False, **changes: Any
) -> Path:
    """Prune a tiny random model by magnitude; it is `folder`/pruned, the dense model `folder`/dense."""
    dense = make_model(folder / "dense", family, **changes)
    if tokenizer:
        add_tokenizer(dense)
    tokens = save_tokens(folder / "tokens.safetensors", sequences=1)
    run(dense, folder / "pruned", tokens, **{**QUICK, **(settings or {})})
    return folder / "pruned"


def language_loss(model: nn.Module, seed: int = 0) -> Tensor:
    """Loss of next tokens on random text."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 95, (2, 12), generator=generator)
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def zeros_of(model: nn.Module, names: Any) -> dict[str, Tensor]:
    """Where parameters are zero, bool, by name."""
    return {name: model.get_parameter(name).detach() == 0 for name in names}


@contextmanager
def used_weights(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Copies of the weights that the newest forward pass of each module used, by name."""
    used: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, outputs: Any) -> None:
            used[name] = module.weight.detach().clone()

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield used
    finally:
        for handle in handles:
            handle.remove()
