"""The sizes that costs follow from, read off the empty model and its configuration."""

from dataclasses import dataclass

from torch import nn

from llm_barber.model.architecture import ATTENTION, Block
from llm_barber.model.device import experts_per_token, stored_score_bytes
from llm_barber.model.experts import Experts
from llm_barber.model.skeleton import Skeleton


@dataclass(frozen=True)
class BlockShapes:
    """A block, or a part of it: shapes of its linears, (out, in), in the order of the data flow.

    All but the last read one tensor, the block's input; the last reads what the block makes of their outputs.
    `attention_width`: heads × head size; 0 without attention. `copies`: number of experts with these shapes, to each of
    which a `share` of the tokens is routed. `other_weights`: weights of the block's other parts. `score_bytes`: of all
    heads' scores of a pair of tokens where attention stores them, else 0.
    """

    name: str
    linears: tuple[tuple[int, int], ...]
    attention_width: int
    copies: int = 1
    share: float = 1
    other_weights: int = 0
    score_bytes: int = 0

    @property
    def weights(self) -> int:
        """Weights of all linears, in one copy."""
        return sum(rows * columns for rows, columns in self.linears)

    @property
    def all_weights(self) -> int:
        """Weights of all copies."""
        return self.copies * self.weights

    @property
    def groups(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """The linears, grouped by the tensor that they read."""
        return tuple(group for group in (self.linears[:-1], self.linears[-1:]) if group)

    @property
    def largest(self) -> int:
        """Weights of the largest linear."""
        return max(rows * columns for rows, columns in self.linears)


@dataclass(frozen=True)
class LayerShapes:
    """A decoder layer: its blocks, and the number of its parameters, in linears and elsewhere."""

    blocks: tuple[BlockShapes, ...]
    parameters: int

    @property
    def weights(self) -> int:
        """Weights of all linears."""
        return sum(block.all_weights for block in self.blocks)


@dataclass(frozen=True)
class ModelShapes:
    """A model.

    `hidden`: features between decoder layers. `vocabulary`: rows of the output head, 0 without one. `head`: features
    that it reads. `embedding`: parameters of the token embedding. `outside`: all parameters outside the decoder layers,
    tied parameters once. `tied`: the head is the embedding.
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
        """Parameters of the whole model, tied parameters once."""
        return self.outside + self.layer_parameters

    @property
    def layer_parameters(self) -> int:
        """Parameters of all decoder layers."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def weights(self) -> int:
        """Weights of all prunable linears."""
        return sum(layer.weights for layer in self.layers)

    @property
    def largest_layer(self) -> LayerShapes:
        """The layer with the most parameters."""
        return max(self.layers, key=lambda layer: layer.parameters)


def model_shapes(skeleton: Skeleton) -> ModelShapes:
    """Read the sizes off an empty model."""
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
    blocks = [block for block in skeleton.blocks[index] if block.linears]
    return LayerShapes(
        blocks=tuple(part for block in blocks for part in _parts(layer, block, skeleton)),
        parameters=sum(parameter.numel() for parameter in layer.parameters()),
    )


def _parts(layer: nn.Module, block: Block, skeleton: Skeleton) -> list[BlockShapes]:
    """Shapes of a block; of a mixture, its experts, which are alike, and each other module by itself."""
    chosen = experts_per_token(skeleton.model.config)
    experts = {name: len(module) for name, module in layer.named_modules() if isinstance(module, Experts)}
    shapes: dict[str, list[tuple[int, int]]] = {}
    copies: dict[str, int] = {}
    for name in block.linears:
        mixture = next((path for path in experts if name.startswith(f"{path}.")), None)
        if mixture is not None and not name.startswith(f"{mixture}.0."):
            continue  # has the shape of the first expert's
        part = f"{mixture}.0" if mixture else name.rpartition(".")[0] if experts else block.output
        shape = tuple(layer.get_submodule(name).get_parameter("weight").shape)
        rows, columns = shape[::-1] if skeleton.architecture.transposed else shape
        shapes.setdefault(part, []).append((rows, columns))
        copies[part] = experts[mixture] if mixture else 1
    weights = {
        part: copies[part] * sum(rows * columns for rows, columns in of_part) for part, of_part in shapes.items()
    }
    return [
        BlockShapes(
            block.name,
            tuple(of_part),
            # The output projection reads the outputs of all heads, side by side.
            attention_width=of_part[-1][1] if block.name == ATTENTION else 0,
            copies=copies[part],
            share=min(1.0, chosen / copies[part]) if copies[part] > 1 else 1,
            other_weights=sum(weights.values()) - weights[part],
            score_bytes=stored_score_bytes(skeleton.model.config) if block.name == ATTENTION else 0,
        )
        for part, of_part in shapes.items()
    ]
