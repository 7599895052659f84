"""Empty model of a configuration: transformers' module tree, with parameters on `meta`."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
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

MOST_NUMBERS = 2**27  # numbers in a tensor; no buffer is larger
MOST_MODULES = 2**18  # in a model, before experts are split into linears
INITIALISING = ("torch.nn.init", "transformers.initialization")


def empty_model(
    config: PreTrainedConfig, dtype: torch.dtype, model_class: type[PreTrainedModel] | None = None
) -> PreTrainedModel:
    """Build the module tree with parameters on `meta`; each expert has its own linears.

    Args:
        config: the checkpoint's.
        dtype: of the parameters.
        model_class: transformers' class; None: the class of language models that the configuration names.

    Raises:
        ModelError: the model is no language model, or has more modules or larger buffers than any.
        Exception: any error that transformers raises.
    """
    build = auto_class(config).from_config if model_class is None else model_class._from_config
    with parameters_on_meta():
        try:
            model: PreTrainedModel = build(config, dtype=dtype, attn_implementation="sdpa")
        except ValueError:  # a family with its own attention code
            model = build(config, dtype=dtype, attn_implementation="eager")
    split_experts(model)
    model.tie_weights()
    join_tied_linears(model)
    model.eval().requires_grad_(False)
    return model


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Let modules that are made inside a `with` statement have parameters on `meta`, not initialised.

    Buffers (rotary frequencies) are in no checkpoint: they are computed.

    Raises:
        ModelError: there are more modules or larger buffers than in any model.
    """
    with init_empty_weights(include_buffers=False), _OnMeta(), _bounded():
        yield


def auto_class(config: PreTrainedConfig) -> Any:
    """Auto class that builds and loads the model: for language models, or for models that take images.

    Raises:
        ModelError: neither class does.
    """
    causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    with_images = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    # If both classes know the configuration, it says whether the checkpoint is the language model alone or all of it.
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
    """Refuse configurations that let transformers build modules without end."""
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
    """Creates tensors larger than any buffer on `meta`: stacks of experts may be larger than memory.

    Tensors on `meta` are not initialised, which would take a millisecond each.
    """

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), settings: dict[str, Any] | None = None
    ) -> Any:
        settings = settings or {}
        tensor = settings.get("tensor") if getattr(function, "__module__", None) in INITIALISING else None
        if tensor is not None and tensor.is_meta:
            return tensor
        if function is torch.arange and any(
            isinstance(value, int | float) and value > MOST_NUMBERS for value in arguments
        ):
            raise ModelError("config.json describes a buffer of more numbers than any model has", "get it again")
        if function in (torch.empty, torch.zeros, torch.ones, torch.randn, torch.rand):
            size = arguments[0] if arguments and isinstance(arguments[0], tuple | list) else arguments
            if all(isinstance(side, int) for side in size) and math.prod(size) > MOST_NUMBERS:
                settings = {**settings, "device": "meta"}
        return function(*arguments, **settings)


def language_model_prefix(model: PreTrainedModel) -> str:
    """Prefix of the names of modules beside the token embedding, the language model's; it may be empty."""
    embedding = model.get_input_embeddings()
    path = next(name for name, module in model.named_modules() if module is embedding)
    return path.rpartition(".")[0] + "." if "." in path else ""


def untie_head(model: PreTrainedModel, stored: Mapping[str, str]) -> None:
    """Untie the output head from the embedding if the checkpoint stores both, since they may differ.

    transformers unties them if they differ.

    Args:
        model: the model, without weights.
        stored: names of the checkpoint's tensors by the names of the model's parameters.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    names = [stored.get(f"{name}.weight") for name, module in model.named_modules() if module in (head, embedding)]
    if not isinstance(head, nn.Linear) or None in names or len(set(names)) < 2:
        return
    model.config.tie_word_embeddings = False
    if head.weight is getattr(embedding, "weight", None):
        head.weight = nn.Parameter(torch.empty_like(head.weight), requires_grad=False)


def join_tied_linears(model: nn.Module) -> None:
    """Merge linears that share their parameters into one module, so that hooks see all its calls."""
    first: dict[tuple[int, int], nn.Module] = {}
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, first.setdefault((id(child.weight), id(child.bias)), child))


def stored_buffer_names(root: nn.Module) -> list[str]:
    """Names, inside a module, of the buffers that a checkpoint contains, such as the bias of a router's scores."""
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
