"""Empty model on `meta`: it embeds the calibration tokens, then loads one decoder layer at a time."""

from collections.abc import Callable, Mapping
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from llm_barber.errors import ModelError
from llm_barber.model.architecture import Architecture
from llm_barber.model.empty import empty_model, language_model_prefix, set_buffer, stored_buffer_names
from llm_barber.model.stepping import (
    Arguments,
    Stepping,
    capture,
    depends_on_tokens,
    different_tensors,
    find_stepping,
    layer_output,
)
from llm_barber.model.text_parameters import TextParameters, find_text_parameters


class Skeleton:
    """The module tree that transformers builds, without weights.

    Args:
        config: the model's configuration.
        architecture: its entry, or what was found.
        device: the device that computes layers.
        dtype: the compute dtype.
        model: result of `empty_model(config, dtype)`; None: computed here.
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
        self.model = model or empty_model(config, dtype)
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
        # `DecoderLayer.tail` of each layer that has run.
        self.tails: dict[int, int | None] = {}
        self.stepping: Stepping | None = None  # known once tokens were embedded
        self.layers: nn.ModuleList = self.model.get_submodule(architecture.layers)
        self.blocks = [architecture.blocks_of(layer) for layer in self.layers]
        # By (sequences, tokens): keyword arguments of each layer's call.
        self._arguments: dict[tuple[int, int], list[Arguments]] = {}

    @property
    def all_outside_names(self) -> list[str]:
        """Names of the parameters outside the decoder layers; tied parameters once."""
        return [name for name, _ in self.model.named_parameters() if not name.startswith(self.layers_prefix)]

    @property
    def outside_names(self) -> list[str]:
        """Names of the parameters outside the decoder layers that embed text.

        They are all parameters in the module that holds the token embedding, and others that the forward uses before
        the last layer. Parameters of the output head are left out, unless the head is tied to the embedding.
        """
        head = self._parameters_of_head
        embedding = {id(parameter) for parameter in self.model.get_input_embeddings().parameters()}
        parameters, prefix = dict(self.model.named_parameters()), language_model_prefix(self.model)
        used = self._text_parameters.embedding
        return [
            name
            for name in self.all_outside_names
            if (name.startswith(prefix) or name in used) and id(parameters[name]) not in head - embedding
        ]

    @property
    def outside_names_and_head(self) -> list[str]:
        """`outside_names`, and the parameters of the head and between layers and head; tied parameters once."""
        parameters, used = dict(self.model.named_parameters()), {*self.outside_names, *self._text_parameters.logits}
        head = self._parameters_of_head
        return [name for name in self.all_outside_names if name in used or id(parameters[name]) in head]

    @cached_property
    def _text_parameters(self) -> TextParameters:
        return find_text_parameters(self.model, self.layers, self.layers_prefix, self.device)

    @property
    def _parameters_of_head(self) -> set[int]:
        head = self.model.get_output_embeddings()
        return {id(parameter) for parameter in head.parameters()} if head is not None else set()

    @property
    def head_name(self) -> str:
        """Path of the output head.

        Raises:
            ModelError: the model has no output head that is a linear.
        """
        head = self.model.get_output_embeddings()
        names = [name for name, module in self.model.named_modules() if module is head]
        if not names or not isinstance(head, nn.Linear):
            raise ModelError(
                f"{type(self.model).__name__} has no output head that is a linear", "leave out --prune-head"
            )
        return str(names[0])

    @property
    def head(self) -> nn.Linear:
        """The output head."""
        head = self.model.get_submodule(self.head_name)
        assert isinstance(head, nn.Linear)
        return head

    @property
    def layers_prefix(self) -> str:
        """Prefix of a layer's number in the names of its parameters."""
        return f"{self.architecture.layers}."

    def layer_prefix(self, index: int) -> str:
        """Prefix of the names of a layer's parameters in the model."""
        return f"{self.layers_prefix}{index}."

    def layer_names(self, index: int) -> list[str]:
        """Names of a layer's parameters, inside the layer."""
        return [name for name, _ in self.layers[index].named_parameters()]

    def buffer_names(self, index: int) -> list[str]:
        """Names of a layer's buffers that checkpoints contain, inside the layer."""
        return stored_buffer_names(self.layers[index])

    def linears(self, index: int) -> tuple[str, ...]:
        """Prunable linears of a layer, block after block."""
        return tuple(name for block in self.blocks[index] for name in block.linears)

    def shared_parameters(self) -> list[tuple[str, str]]:
        """Further names of parameters that several modules share, each with the parameter's first name.

        The modules are in several layers or in one; names are inside the list of layers. A linear that one layer uses
        under several names is a single module, and left out.
        """
        first = {id(parameter): name for name, parameter in self.layers.named_parameters()}
        shared = []
        for name, parameter in self.layers.named_parameters(remove_duplicate=False):
            path, first_path = name.rpartition(".")[0], first[id(parameter)].rpartition(".")[0]
            is_same_module = self.layers.get_submodule(path) is self.layers.get_submodule(first_path)
            if not is_same_module or path.partition(".")[0] != first_path.partition(".")[0]:
                shared.append((name, first[id(parameter)]))
        return shared

    def other_names(self, index: int, linear: str) -> list[str]:
        """Further paths, inside a layer, of a linear that has several."""
        return [path for path in self._paths[index][id(self.layers[index].get_submodule(linear))] if path != linear]

    @cached_property
    def _paths(self) -> list[dict[int, list[str]]]:
        """Paths of the modules of each layer, by the module's identity."""
        by_layer: list[dict[int, list[str]]] = [{} for _ in self.layers]
        for paths, layer in zip(by_layer, self.layers, strict=True):
            for path, module in layer.named_modules(remove_duplicate=False):
                paths.setdefault(id(module), []).append(path)
        return by_layer

    def fill_outside(self, weights: Mapping[str, Tensor]) -> None:
        """Set parameters outside the decoder layers, by the model's names."""
        self._assign(self.model, weights)
        self.model.tie_weights()

    def embed(self, tokens: Tensor, keep: Callable[[Tensor], None]) -> None:
        """Embed a batch of tokens, and capture the arguments of each decoder layer's call.

        The layers are stepped over: the arguments of layer 7 (mask, positions, cache) do not depend on the result of
        layer 6.

        Args:
            tokens: int64, (sequences, tokens).
            keep: called with the hidden states, (sequences, tokens, hidden).

        Raises:
            ModelError: the layers' arguments depend on the tokens, or the layers cannot be stepped over.
        """
        tokens = tokens.to(self.device)
        states, arguments = self._capture(tokens)
        keep(states)
        if not self._arguments:  # arguments may depend on the tokens without an embedding, which gradients do not show
            _, flipped_arguments = self._capture(tokens.flip(1))
            for of_layer, of_flipped in zip(arguments, flipped_arguments, strict=True):
                for name in different_tensors(of_layer, of_flipped):
                    raise depends_on_tokens(self.model, name)
        self._arguments[len(tokens), tokens.shape[1]] = arguments

    def _capture(self, tokens: Tensor, **inputs: Tensor) -> tuple[Tensor, list[Arguments]]:
        """Call `capture`, with layers stepped over as was found when it was called first."""
        if self.stepping is None:
            self.stepping = find_stepping(self.model, self.layers, self.device)
        return capture(self.model, self.layers, tokens, self.stepping.tail, **inputs)

    def finish(self, hidden: Tensor) -> Tensor:
        """Logits, (sequences, tokens, vocabulary), from the last decoder layer's output.

        The model's own forward runs; its layers return `hidden`, whatever their arguments.

        Args:
            hidden: (sequences, tokens, hidden), of any positions, since each token's logits depend on it alone.
        """
        usual_tail = next(reversed(self.tails.values()), None)
        for index, layer in enumerate(self.layers):
            output = layer_output(self.tails.get(index, usual_tail), hidden)
            layer.forward = lambda *_, _output=output, **__: _output
        try:
            tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=self.device)  # only their shape matters
            logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        finally:
            for layer in self.layers:
                del layer.forward
        return logits

    def arguments(self, index: int, sequences: int, tokens: int) -> Arguments:
        """Captured keyword arguments of a layer's call for a batch of this shape."""
        return self._arguments[sequences, tokens][index]

    def drop_outside(self) -> None:
        """Send the parameters outside the decoder layers back to `meta`."""
        for name in self.all_outside_names:
            self._set_parameter(self.model, name, None)
        self.model.tie_weights()

    def load_layer(self, index: int, weights: Mapping[str, Tensor]) -> nn.Module:
        """Load a layer's weights and buffers, by names inside the layer, from any float dtype."""
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
