"""The sizes that costs follow from, read off the empty model: no field of any family's configuration is looked at."""

from dataclasses import dataclass

from llm_barber.errors import ModelError
from llm_barber.model.architecture import Architecture, Block
from llm_barber.model.experts import Experts
from llm_barber.model.skeleton import Skeleton

ATTENTION = "attention"  # the name of the block that attends, in every architecture's record


@dataclass(frozen=True)
class BlockShapes:
    """A block: its linears' shapes, (out, in), in the order in which data flows through them.

    All but the last read one tensor, the block's input; the last reads what the block makes of their outputs.
    `attention_width`: heads × head size; 0 where the block does not attend.
    """

    name: str
    linears: tuple[tuple[int, int], ...]
    attention_width: int

    @property
    def weights(self) -> int:
        """Of all its linears."""
        return sum(rows * columns for rows, columns in self.linears)

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
        return sum(block.weights for block in self.blocks)


@dataclass(frozen=True)
class ModelShapes:
    """A model.

    `hidden`: features between decoder layers. `vocabulary`: rows of the output head, 0 without one. `head`: its
    features. `embedding`: parameters of the token embedding. `outside`: all parameters outside the decoder layers,
    tied ones once.
    """

    hidden: int
    vocabulary: int
    head: int
    embedding: int
    outside: int
    layers: tuple[LayerShapes, ...]

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
    """The sizes of an empty model.

    Raises:
        ModelError: it has experts, each of which sees a part of the tokens.
    """
    if any(isinstance(module, Experts) for module in skeleton.layers.modules()):
        raise ModelError(
            "a mixture of experts cannot be planned yet",
            "llm-barber prune takes it; its time is near that of a dense model with as many weights for each token",
        )
    head = skeleton.model.get_output_embeddings()
    vocabulary, features = tuple(head.weight.shape) if head is not None else (0, 0)
    layers = tuple(_layer(skeleton, index) for index in range(len(skeleton.layers)))
    return ModelShapes(
        hidden=layers[0].blocks[0].linears[-1][0],
        vocabulary=vocabulary,
        head=features,
        embedding=skeleton.model.get_input_embeddings().weight.numel(),
        outside=sum(skeleton.model.get_parameter(name).numel() for name in skeleton.every_outside_name),
        layers=layers,
    )


def _layer(skeleton: Skeleton, index: int) -> LayerShapes:
    layer = skeleton.layers[index]
    return LayerShapes(
        blocks=tuple(_block(layer, block, skeleton.architecture) for block in skeleton.blocks[index]),
        parameters=sum(parameter.numel() for parameter in layer.parameters()),
    )


def _block(layer: object, block: Block, architecture: Architecture) -> BlockShapes:
    shapes = []
    for name in block.linears:
        shape = tuple(layer.get_submodule(name).weight.shape)  # type: ignore[attr-defined]
        rows, columns = shape[::-1] if architecture.transposed else shape
        shapes.append((rows, columns))
    # What the output projection reads is every head's output, side by side.
    return BlockShapes(block.name, tuple(shapes), shapes[-1][1] if block.name == ATTENTION else 0)
