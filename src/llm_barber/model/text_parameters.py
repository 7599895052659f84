"""Parameters outside the decoder layers that a model uses to embed text, and to compute logits.

A model may have modules anywhere: a norm after the embedding, a dense layer before the output head, a vision tower.
The forward is run once, with zeros for weights and the decoder layers stepped over, to see which parameters text needs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from llm_barber.model.stepping import TRIAL_TOKENS, find_stepping, stepped_over, tensors_in


@dataclass(frozen=True)
class TextParameters:
    """Names of parameters outside the decoder layers.

    Attributes:
        embedding: parameters used before the last decoder layer is called.
        logits: parameters used after that.
    """

    embedding: frozenset[str] = frozenset()
    logits: frozenset[str] = frozenset()


def find_text_parameters(
    model: PreTrainedModel, layers: nn.ModuleList, layers_prefix: str, device: torch.device
) -> TextParameters:
    """Run a model on a few tokens, and note which parameters outside its layers are used.

    For a model that cannot step over its layers the result is empty; embedding the calibration tokens refuses such a
    model, and says why.

    Args:
        model: an empty model; its parameters are not changed.
        layers: its decoder layers.
        layers_prefix: prefix of the names of the layers' parameters.
        device: the device of the model's buffers.
    """
    with _zeros_outside(model, layers_prefix, device) as names:
        uses = _Uses(names)
        hook = layers[-1].register_forward_pre_hook(lambda *_: uses.end_embedding())
        tokens = torch.zeros(1, TRIAL_TOKENS, dtype=torch.int64, device=device)
        try:
            stepping = find_stepping(model, layers, device)
            uses.begin()
            with torch.no_grad(), stepped_over(layers, stepping.tail), uses:
                model(input_ids=tokens, use_cache=False)
        except Exception:  # models that cannot step over their layers raise any error
            return TextParameters()
        finally:
            hook.remove()
    return TextParameters(frozenset(uses.embedding), frozenset(uses.logits))


class _Uses(TorchFunctionMode):
    """Notes which parameters tensors are computed from; products with them are zeros, and not computed.

    Args:
        names: names of the parameters by their identity.
    """

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self._names = names
        self.begin()

    def begin(self) -> None:
        """Forget all noted parameters, and note those of the embedding."""
        self.embedding: set[str] = set()
        self.logits: set[str] = set()
        self._noted = self.embedding

    def end_embedding(self) -> None:
        """Note the parameters of the logits from now on."""
        self._noted = self.logits

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), settings: dict[str, Any] | None = None
    ) -> Any:
        settings = settings or {}
        used = [
            self._names[id(tensor)]
            for tensor in tensors_in((arguments, list(settings.values())))
            if id(tensor) in self._names
        ]
        # Zeros of an output head take no memory, but a product with them does.
        if used and function is nn.functional.linear:
            self._noted.update(used)
            inputs, weight, *_ = arguments
            return inputs.new_zeros(*inputs.shape[:-1], weight.shape[0])
        result = function(*arguments, **settings)
        if used and tensors_in(result):  # not a query, such as for a dtype
            self._noted.update(used)
        return result


@contextmanager
def _zeros_outside(model: nn.Module, layers_prefix: str, device: torch.device) -> Iterator[dict[int, str]]:
    """Replace the parameters outside the layers by zeros that take no memory, within the context.

    Yields the names of the zeros by identity; tied parameters have the first of their names.
    """
    zeros: dict[int, nn.Parameter] = {}
    names: dict[int, str] = {}
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if name.startswith(layers_prefix):
            continue
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        if id(parameter) not in zeros:
            zero = torch.zeros((), dtype=parameter.dtype, device=device).expand(parameter.shape)
            zeros[id(parameter)] = nn.Parameter(zero, requires_grad=False)
            names[id(zeros[id(parameter)])] = name
        replaced.append((owner, leaf, parameter))
        owner._parameters[leaf] = zeros[id(parameter)]
    try:
        yield names
    finally:
        for owner, leaf, parameter in replaced:
            owner._parameters[leaf] = parameter
