"""The empty model of a configuration: the module tree that transformers builds, with parameters on `meta`."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.overrides import TorchFunctionMode
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from llm_barber.errors import ModelError
from llm_barber.model.experts import split_experts

HUGE = 2**27  # numbers
MOST_MODULES = 2**18  # of a model before its experts get linears of their own
INITIALISING = ("torch.nn.init", "transformers.initialization")


def empty_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The module tree that transformers builds, parameters on `meta`, experts with linears of their own.

    Raises:
        ModelError: it is no language model, or it has more modules or larger buffers than any.
        whatever transformers does.
    """
    kind = auto_class(config)
    # Buffers (rotary frequencies) are in no checkpoint: they are made for real, parameters are not.
    with init_empty_weights(include_buffers=False), _OnMeta(), _bounded():
        try:
            model: PreTrainedModel = kind.from_config(config, dtype=dtype, attn_implementation="sdpa")
        except ValueError:  # a family whose attention is written out
            model = kind.from_config(config, dtype=dtype, attn_implementation="eager")
    split_experts(model)
    model.tie_weights()
    join_tied_linears(model)
    model.eval().requires_grad_(False)
    return model


def auto_class(config: PreTrainedConfig) -> Any:
    """What transformers builds and loads the model with: `AutoModelForCausalLM`, or, with images, another.

    Raises:
        ModelError: neither does.
    """
    causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    with_images = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    # A checkpoint says which it is, where both are: its language model alone, or all of it.
    if with_images is not None and with_images is not causal and with_images.__name__ in (config.architectures or ()):
        return AutoModelForImageTextToText
    if causal is not None:
        return AutoModelForCausalLM
    if with_images is not None:
        return AutoModelForImageTextToText
    raise ModelError(
        f"{config.model_type} is no language model that transformers builds by itself",
        "decoder models, which write text, are pruned; encoders, encoder-decoders and other kinds are not",
    )


@contextmanager
def _bounded() -> Iterator[None]:
    """Stop transformers from making modules without end, whatever the setting that asks for them."""
    count = 0

    def note(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > MOST_MODULES:
            raise ModelError(
                f"config.json describes a model of more than {MOST_MODULES:,} modules, which no model has",
                "get config.json again",
            )

    hook = register_module_module_registration_hook(note)
    try:
        yield
    finally:
        hook.remove()


class _OnMeta(TorchFunctionMode):
    """Tensors that no buffer is as large as are made on `meta` at once: stacks of experts may be larger than memory.

    Those that are there are not initialised, which takes a millisecond each and changes nothing.
    """

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), settings: dict[str, Any] | None = None
    ) -> Any:
        settings = settings or {}
        made = settings.get("tensor") if getattr(function, "__module__", None) in INITIALISING else None
        if made is not None and made.is_meta:
            return made
        if function is torch.arange and any(isinstance(one, int | float) and one > HUGE for one in arguments):
            raise ModelError("config.json describes a buffer of more numbers than any model has", "get it again")
        if function in (torch.empty, torch.zeros, torch.ones, torch.randn, torch.rand):
            size = arguments[0] if arguments and isinstance(arguments[0], tuple | list) else arguments
            if all(isinstance(one, int) for one in size) and math.prod(size) > HUGE:
                settings = {**settings, "device": "meta"}
        return function(*arguments, **settings)


def language_model_prefix(model: PreTrainedModel) -> str:
    """What the names begin with that lie beside the token embedding: those of the language model; "": all do."""
    embedding = model.get_input_embeddings()
    path = next(name for name, module in model.named_modules() if module is embedding)
    return path.rpartition(".")[0] + "." if "." in path else ""


def untie_head(model: PreTrainedModel, stored: Mapping[str, str]) -> None:
    """Give the output head a parameter of its own, where it would be tied and a checkpoint has both: they may differ.

    transformers does so, too, if they do.

    Args:
        model: without weights.
        stored: the checkpoint's tensors, by the names of the model's parameters.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = isinstance(head, nn.Linear) and head.weight is getattr(embedding, "weight", None)
    places = [stored.get(f"{name}.weight") for name, one in model.named_modules() if one in (head, embedding)]
    if tied and None not in places and len(set(places)) > 1:
        model.config.tie_word_embeddings = False
        head.weight = nn.Parameter(torch.empty_like(head.weight), requires_grad=False)


def join_tied_linears(model: nn.Module) -> None:
    """Put one module where two linears have the same parameters: what it is called with is then seen as its own."""
    first: dict[tuple[int, int], nn.Module] = {}
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, first.setdefault((id(child.weight), id(child.bias)), child))
