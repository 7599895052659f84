"""The sizes that costs follow from, read off the empty model: no field of any family's configuration is looked at."""

from dataclasses import dataclass

from torch import nn

from llm_barber.model.architecture import ATTENTION, Architecture, Block
from llm_barber.model.device import experts_per_token
from llm_barber.model.experts import Experts
from llm_barber.model.skeleton import Skeleton


@dataclass(frozen=True)
class BlockShapes:
    """A block, or a part of one: its linears' shapes, (out, in), in the order in which data flows through them.

    All but the last read one tensor, the block's input; the last reads what the block makes of their outputs.
    `attention_width`: heads × head size; 0 where the block does not attend. `copies`: experts with these shapes, each
    of which is given a `share` of the tokens. `beside`: weights of the block's other parts.
    """

    name: str
    linears: tuple[tuple[int, int], ...]
    attention_width: int
    copies: int = 1
    share: float = 1
    beside: int = 0

    @property
    def weights(self) -> int:
        """Of all its linears, in one copy."""
        return sum(rows * columns for rows, columns in self.linears)

    @property
    def every_weight(self) -> int:
        """Of all copies."""
        return self.copies * self.weights

    @property
    def groups(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Its linears, those that read one tensor together."""
        return tuple(group for group in (self.linears[:-1], self.linears[-1:]) if group)

    @property
    def largest(self) -> int:
        """Weights of its largest linear."""
        return max(rows * columns for rows, columns in self.linears)


@dataclass(frozen=True)
class LayerShapes:
    """A decoder layer: its blocks, and all its parameters, those outside the linears among them."""

    blocks: tuple[BlockShapes, ...]
    parameters: int

    @property
    def weights(self) -> int:
        """Of all its linears."""
        return sum(block.every_weight for block in self.blocks)


@dataclass(frozen=True)
class ModelShapes:
    """A model.

    `hidden`: features between decoder layers. `vocabulary`: rows of the output head, 0 without one. `head`: its
    features. `embedding`: parameters of the token embedding. `outside`: all parameters outside the decoder layers,
    tied ones once. `tied`: is the head the embedding?
    """

    hidden: int
    vocabulary: int
    head: int
    embedding: int
    outside: int
    layers: tuple[LayerShapes, ...]
    tied: bool = False

    @property
    def head_block(self) -> BlockShapes:
        """The output head as a block of one linear."""
        return BlockShapes("output head", ((self.vocabulary, self.head),), 0)

    @property
    def parameters(self) -> int:
        """Of the whole model, tied ones once."""
        return self.outside + sum(layer.parameters for layer in self.layers)

    @property
    def weights(self) -> int:
        """Of all prunable linears."""
        return sum(layer.weights for layer in self.layers)

    @property
    def largest_layer(self) -> LayerShapes:
        """The layer with the most parameters."""
        return max(self.layers, key=lambda layer: layer.parameters)


def model_shapes(skeleton: Skeleton) -> ModelShapes:
    """The sizes of an empty model."""
    head = skeleton.model.get_output_embeddings()
    vocabulary, features = tuple(head.weight.shape) if head is not None else (0, 0)
    layers = tuple(_layer(skeleton, index) for index in range(len(skeleton.layers)))
    return ModelShapes(
        hidden=skeleton.model.config.get_text_config().hidden_size,
        vocabulary=vocabulary,
        head=features,
        embedding=skeleton.model.get_input_embeddings().weight.numel(),
        outside=sum(skeleton.model.get_parameter(name).numel() for name in skeleton.all_outside_names),
        layers=layers,
        tied=head is not None and head.weight is getattr(skeleton.model.get_input_embeddings(), "weight", None),
    )


def _layer(skeleton: Skeleton, index: int) -> LayerShapes:
    layer = skeleton.layers[index]
    chosen = experts_per_token(skeleton.model.config)
    blocks = [block for block in skeleton.blocks[index] if block.linears]
    return LayerShapes(
        blocks=tuple(part for block in blocks for part in _parts(layer, block, skeleton.architecture, chosen)),
        parameters=sum(parameter.numel() for parameter in layer.parameters()),
    )


def _parts(layer: nn.Module, block: Block, architecture: Architecture, chosen: int) -> list[BlockShapes]:
    """A block; of a mixture, its experts, all alike, and what else it has, each module by itself."""
    experts = {name: len(module) for name, module in layer.named_modules() if isinstance(module, Experts)}
    groups: dict[str, list[tuple[int, int]]] = {}
    counts: dict[str, int] = {}
    for name in block.linears:
        own = next((path for path in experts if name.startswith(f"{path}.")), None)
        if own is not None and not name.startswith(f"{own}.0."):
            continue  # as the first expert's
        place = f"{own}.0" if own else name.rpartition(".")[0] if experts else block.output
        shape = tuple(layer.get_submodule(name).get_parameter("weight").shape)
        rows, columns = shape[::-1] if architecture.transposed else shape
        groups.setdefault(place, []).append((rows, columns))
        counts[place] = experts[own] if own else 1
    weights = {place: counts[place] * sum(rows * columns for rows, columns in one) for place, one in groups.items()}
    return [
        BlockShapes(
            block.name,
            tuple(shapes),
            # What the output projection reads is every head's output, side by side.
            attention_width=shapes[-1][1] if block.name == ATTENTION else 0,
            copies=counts[place],
            share=min(1.0, chosen / counts[place]) if counts[place] > 1 else 1,
            beside=sum(weights.values()) - weights[place],
        )
        for place, shapes in groups.items()
    ]
