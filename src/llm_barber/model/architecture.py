"""Where a model family keeps its decoder layers, and which linears make up each block: one small record a family.

To add a family, add a record to `ARCHITECTURES` and its name to the parity test (see CONTRIBUTING.md).
"""

from dataclasses import dataclass

from llm_barber.errors import ModelError


@dataclass(frozen=True)
class Block:
    """One block of a decoder layer.

    `output` is the module whose output is the block's output; `linears` are the prunable modules. Both are paths
    inside the decoder layer.
    """

    name: str
    output: str
    linears: tuple[str, ...]


@dataclass(frozen=True)
class Architecture:
    """A model family: the path of its decoder layers (a module list), and each layer's blocks in order."""

    layers: str
    blocks: tuple[Block, ...]

    @property
    def linears(self) -> tuple[str, ...]:
        """All prunable linears of a decoder layer, block after block."""
        return tuple(name for block in self.blocks for name in block.linears)


LLAMA = Architecture(
    layers="model.layers",
    blocks=(
        Block(
            name="attention",
            output="self_attn",
            linears=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        ),
        Block(name="mlp", output="mlp", linears=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")),
    ),
)

OPT = Architecture(
    layers="model.decoder.layers",
    blocks=(
        Block(
            name="attention",
            output="self_attn",
            linears=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
        ),
        Block(name="mlp", output="fc2", linears=("fc1", "fc2")),
    ),
)

# By `model_type` of the configuration. Each name here has a parity test.
ARCHITECTURES: dict[str, Architecture] = {
    "gemma3_text": LLAMA,  # its further norms are outside the blocks
    "llama": LLAMA,
    "mistral": LLAMA,
    "opt": OPT,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
}


def find_architecture(model_type: str) -> Architecture:
    """The record for a configuration's `model_type`.

    Raises:
        ModelError: there is none.
    """
    if model_type not in ARCHITECTURES:
        raise ModelError(
            f"architecture {model_type!r} is not supported",
            f"supported are {', '.join(sorted(ARCHITECTURES))}; CONTRIBUTING.md shows how to add a record",
        )
    return ARCHITECTURES[model_type]
