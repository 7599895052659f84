"""An empty model on `meta`: it embeds the calibration tokens, then takes one decoder layer's weights in and out."""

from collections.abc import Callable, Mapping
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from llm_barber.errors import ModelError
from llm_barber.model.architecture import Architecture
from llm_barber.model.buffers import set_buffer, stored_buffer_names
from llm_barber.model.empty import empty_model, language_model_prefix
from llm_barber.model.fixed_order import FixedOrder
from llm_barber.model.stepping import (
    Arguments,
    Stepping,
    answer,
    capture,
    depends_on_tokens,
    different_tensors,
    find_stepping,
)
from llm_barber.model.text_parameters import TextParameters, find_text_parameters


class Skeleton:
    """The module tree that transformers builds, without weights.

    Args:
        config: the model's configuration.
        architecture: its record.
        device: where layers are computed.
        dtype: what they are computed in.
        model: what `empty_model` made of both, if it has been made.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        architecture: Architecture,
        device: torch.device,
        dtype: torch.dtype,
        model: PreTrainedModel | None = None,
    ) -> None:
        self.architecture = architecture
        self.device = device
        self.dtype = dtype
        self.order = FixedOrder(enabled=device.type != "cpu")
        self.model = model or empty_model(config, dtype)
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
        # What follows the states in what each layer returns, once it has run: see `DecoderLayer.tail`.
        self.tails: dict[int, int | None] = {}
        self.stepping: Stepping | None = None  # once it has embedded tokens
        self.layers: nn.ModuleList = self.model.get_submodule(architecture.layers)
        self.blocks = [architecture.blocks_of(layer) for layer in self.layers]
        # Keyword arguments of each layer's call, by (sequences, tokens).
        self._arguments: dict[tuple[int, int], list[Arguments]] = {}

    @property
    def all_outside_names(self) -> list[str]:
        """Parameters outside the decoder layers; tied ones once."""
        return [name for name, _ in self.model.named_parameters() if not name.startswith(self.layers_prefix)]

    @property
    def outside_names(self) -> list[str]:
        """Parameters outside the decoder layers that embed text: those beside the embedding, and what else is used.

        The output head's are not among them, unless it is the embedding.
        """
        head = self._parameters_of_head
        embedding = {id(parameter) for parameter in self.model.get_input_embeddings().parameters()}
        parameters, beside = dict(self.model.named_parameters()), language_model_prefix(self.model)
        used = self._text_parameters.embedding
        return [
            name
            for name in self.all_outside_names
            if (name.startswith(beside) or name in used) and id(parameters[name]) not in head - embedding
        ]

    @property
    def outside_names_and_head(self) -> list[str]:
        """`outside_names`, the output head's parameters and what lies between layers and head; tied ones once."""
        parameters, others = dict(self.model.named_parameters()), {*self.outside_names, *self._text_parameters.logits}
        head = self._parameters_of_head
        return [name for name in self.all_outside_names if name in others or id(parameters[name]) in head]

    @cached_property
    def _text_parameters(self) -> TextParameters:
        return find_text_parameters(self.model, self.layers, self.layers_prefix, self.device)

    @property
    def _parameters_of_head(self) -> set[int]:
        head = self.model.get_output_embeddings()
        return {id(parameter) for parameter in head.parameters()} if head is not None else set()

    @property
    def head_name(self) -> str:
        """The path of the output head.

        Raises:
            ModelError: there is none that is a matrix.
        """
        head = self.model.get_output_embeddings()
        found = [name for name, module in self.model.named_modules() if module is head]
        if not found or not isinstance(head, nn.Linear):
            raise ModelError(f"{type(self.model).__name__} has no output head that is a linear", "leave it dense")
        return str(found[0])

    @property
    def head(self) -> nn.Linear:
        """The output head."""
        found = self.model.get_submodule(self.head_name)
        assert isinstance(found, nn.Linear)
        return found

    @property
    def layers_prefix(self) -> str:
        """What stands before a layer's number in the names of its parameters."""
        return f"{self.architecture.layers}."

    def layer_prefix(self, index: int) -> str:
        """What stands before the names of a layer's parameters in the model."""
        return f"{self.layers_prefix}{index}."

    def layer_names(self, index: int) -> list[str]:
        """Names of a layer's parameters, inside the layer."""
        return [name for name, _ in self.layers[index].named_parameters()]

    def buffer_names(self, index: int) -> list[str]:
        """Names of a layer's buffers that checkpoints have, inside the layer."""
        return stored_buffer_names(self.layers[index])

    def linears(self, index: int) -> tuple[str, ...]:
        """The prunable linears of a layer, block after block."""
        return tuple(name for block in self.blocks[index] for name in block.linears)

    def names_in_other_layers(self) -> list[tuple[str, str]]:
        """Parameters of layers that are another module's, too, in another layer or, if it is no linear, in its own.

        Each with its other name.
        """
        first = {id(parameter): name for name, parameter in self.layers.named_parameters()}
        found = []
        for name, parameter in self.layers.named_parameters(remove_duplicate=False):
            path, other = name.rpartition(".")[0], first[id(parameter)].rpartition(".")[0]
            same = self.layers.get_submodule(path) is self.layers.get_submodule(other)
            if not same or path.partition(".")[0] != other.partition(".")[0]:
                found.append((name, first[id(parameter)]))
        return found

    def other_names(self, index: int, linear: str) -> list[str]:
        """The other paths, inside a layer, of a linear that has several."""
        return [path for path in self._paths[index][id(self.layers[index].get_submodule(linear))] if path != linear]

    @cached_property
    def _paths(self) -> list[dict[int, list[str]]]:
        """Of each layer, the paths of its modules."""
        found: list[dict[int, list[str]]] = [{} for _ in self.layers]
        for paths, layer in zip(found, self.layers, strict=True):
            for path, module in layer.named_modules(remove_duplicate=False):
                paths.setdefault(id(module), []).append(path)
        return found

    def fill_outside(self, weights: Mapping[str, Tensor]) -> None:
        """Give the model parameters outside the decoder layers, by the model's names."""
        self._assign(self.model, weights)
        self.model.tie_weights()

    def embed(self, tokens: Tensor, keep: Callable[[Tensor], None]) -> None:
        """Run a batch of tokens to the first decoder layer, and note how each layer is called.

        The layers themselves are stepped over: what a model passes to layer 7 (mask, positions, cache) does not depend
        on what layer 6 computes.

        Args:
            tokens: int64, (sequences, tokens).
            keep: is handed the hidden states, (sequences, tokens, hidden).

        Raises:
            ModelError: what the model passes to its layers depends on the tokens, or it cannot do without their work.
        """
        tokens = tokens.to(self.device)
        if self.stepping is None:
            self.stepping = find_stepping(self.model, self.layers, self.device)
        states, arguments = capture(self.model, self.layers, tokens, self.stepping.tail)
        keep(states)
        if not self._arguments:  # what is looked up for each token is not the only way to depend on them
            _, other = capture(self.model, self.layers, tokens.flip(1), self.stepping.tail)
            for one, two in zip(arguments, other, strict=True):
                for name in different_tensors(one, two):
                    raise depends_on_tokens(self.model, name)
        self._arguments[len(tokens), tokens.shape[1]] = arguments

    def finish(self, hidden: Tensor) -> Tensor:
        """Logits, (sequences, tokens, vocabulary), from the last decoder layer's output.

        The model's own forward runs; its layers answer with `hidden`, whatever they are given.

        Args:
            hidden: (sequences, tokens, hidden); any positions, since each is finished by itself.
        """
        of_any = next(reversed(self.tails.values()), None)
        for index, layer in enumerate(self.layers):
            found = answer(self.tails.get(index, of_any), hidden)
            layer.forward = lambda *_, _found=found, **__: _found
        try:
            tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=self.device)  # only their shape matters
            logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        finally:
            for layer in self.layers:
                del layer.forward
        return logits

    def arguments(self, index: int, sequences: int, tokens: int) -> Arguments:
        """Keyword arguments of a layer's call for a batch of this shape, as they were captured."""
        return self._arguments[sequences, tokens][index]

    def drop_outside(self) -> None:
        """Forget the parameters outside the decoder layers."""
        for name in self.all_outside_names:
            self._set_parameter(self.model, name, None)
        self.model.tie_weights()

    def load_layer(self, index: int, weights: Mapping[str, Tensor]) -> nn.Module:
        """Give a layer its weights and buffers, by names inside the layer, in any float dtype."""
        layer = self.layers[index]
        buffers = set(self.buffer_names(index))
        self._assign(layer, {name: tensor for name, tensor in weights.items() if name not in buffers})
        for name in buffers & weights.keys():
            set_buffer(layer, name, weights[name], self.device)
        return layer

    def release_layer(self, index: int) -> None:
        """Send a layer's weights back to `meta`."""
        for name in self.layer_names(index):
            self._set_parameter(self.layers[index], name, None)

    def _assign(self, root: nn.Module, weights: Mapping[str, Tensor]) -> None:
        for name, tensor in weights.items():
            self._set_parameter(root, name, tensor.to(self.device, self.dtype))

    @staticmethod
    def _set_parameter(root: nn.Module, name: str, value: Tensor | None) -> None:
        path, _, leaf = name.rpartition(".")
        owner = root.get_submodule(path)
        if value is None:
            value = torch.empty_like(getattr(owner, leaf), device="meta")
        setattr(owner, leaf, nn.Parameter(value, requires_grad=False))
