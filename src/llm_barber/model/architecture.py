"""Records of model families: the path of the decoder layers, and the linears of each block.

To add a family, add an entry to `ARCHITECTURES`, and its smallest configuration to the tests (see CONTRIBUTING.md).
"""

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # settings import this file, and the command line starts before torch is loaded
    from torch import Tensor, nn

ATTENTION, MLP = "attention", "mlp"  # names of blocks, in every entry


@dataclass(frozen=True)
class Block:
    """One block of a decoder layer.

    In an entry, `*` stands for the number of every expert. A layer may lack blocks and linears of its entry: they are
    left out.

    Attributes:
        name: the block's name.
        output: path, inside the decoder layer, of the module whose output is the block's output.
        linears: paths, inside the decoder layer, of the prunable modules.
    """

    name: str
    output: str
    linears: tuple[str, ...]


@dataclass(frozen=True)
class Channels:
    """Channels inside a block that may change places: nothing but one linear reads them, as its inputs.

    Attributes:
        writers: paths, inside the decoder layer, of the linears whose outputs, multiplied or alone, the channels are.
        reader: path of the linear whose inputs they are.
        of_heads: they are the values of attention heads. Each stays in its head, and moves alike in all query heads
            that share the key-value head.
        parts: number of equal parts of a writer's outputs that move alike: 2 where gate and up are one matrix.
    """

    writers: tuple[str, ...]
    reader: str
    of_heads: bool = False
    parts: int = 1


@dataclass(frozen=True)
class Architecture:
    """Record of a model family.

    Attributes:
        layers: path of the decoder layers, a module list.
        blocks: the blocks of a layer, in order.
        transposed: linears store their weights as (in, out).
        channels: those that may change places; a layer may lack their linears.
    """

    layers: str
    blocks: tuple[Block, ...]
    transposed: bool = False
    channels: tuple[Channels, ...] = ()

    @property
    def linears(self) -> tuple[str, ...]:
        """All linears that a layer may have, block after block."""
        return tuple(name for block in self.blocks for name in block.linears)

    def blocks_of(self, layer: "nn.Module") -> tuple[Block, ...]:
        """Blocks that a decoder layer has, with the linears that it has."""
        modules = {name for name, module in layer.named_modules() if getattr(module, "weight", None) is not None}
        blocks = []
        for block in self.blocks:
            if _has(layer, block.output):
                names = [name for linear in block.linears for name in _expanded(linear, layer) if name in modules]
                blocks.append(replace(block, linears=tuple(names)))
        return tuple(blocks)

    def convert_layout(self, weight: "Tensor") -> "Tensor":
        """Convert a linear's weight from the family's layout to (out, in), or back."""
        return weight.t().contiguous() if self.transposed else weight


@dataclass(frozen=True)
class StructureOptions:
    """Structure that the user states: `layers`, the decoder layers' path, and a layer's `blocks` in order."""

    layers: str | None = None
    blocks: tuple[Block, ...] = ()


def kind_of(linear: str) -> str:
    """Name of a linear with `*` in place of the expert's number."""
    return re.sub(r"\.\d+\.", ".*.", linear)


def select_linears(blocks: Iterable[Block], linears: Collection[str]) -> tuple[Block, ...]:
    """Restrict blocks to some of their linears; a block may be left with none."""
    return tuple(replace(block, linears=tuple(name for name in block.linears if name in linears)) for block in blocks)


def _has(layer: "nn.Module", path: str) -> bool:
    try:
        layer.get_submodule(path)
    except AttributeError:
        return False
    return True


def _expanded(linear: str, layer: "nn.Module") -> list[str]:
    """Names for which a linear with `*` in place of the expert's number stands."""
    experts, star, rest = linear.partition(".*.")
    if not star:
        return [linear]
    return (
        [f"{experts}.{name}.{rest}" for name, _ in layer.get_submodule(experts).named_children()]
        if _has(layer, experts)
        else []
    )


# Linears that, by their names, compute values or read them, and that compute an MLP's inner channels or read them. Not
# among them are q, k and v in one matrix, and routed experts: their channels keep their order.
VALUES, VALUE_READERS = "v_proj", ("o_proj", "out_proj", "dense")
INNER_CHANNELS = (
    Channels(("gate_proj", "up_proj"), "down_proj"),
    Channels(("up_proj",), "down_proj"),
    Channels(("gate_up_proj",), "down_proj", parts=2),
    Channels(("w1", "w3"), "w2"),
    Channels(("fc1",), "fc2"),
    Channels(("fc_in",), "fc_out"),
    Channels(("c_fc",), "c_proj"),
    Channels(("dense_h_to_4h",), "dense_4h_to_h"),
)


def _channels(block: Block) -> Iterator[Channels]:
    """Channels that may change places between the linears of a block of an entry."""
    modules = {linear.rpartition(".")[0] for linear in block.linears if "*" not in linear}
    for module in sorted(modules):
        prefix = f"{module}." if module else ""
        names = {linear.removeprefix(prefix) for linear in block.linears if linear.startswith(prefix)}
        if VALUES in names:
            reader = next(name for name in VALUE_READERS if name in names)
            yield Channels((f"{prefix}{VALUES}",), f"{prefix}{reader}", of_heads=True)
        for inner in INNER_CHANNELS:
            if names.issuperset((*inner.writers, inner.reader)):
                writers = tuple(f"{prefix}{writer}" for writer in inner.writers)
                yield replace(inner, writers=writers, reader=f"{prefix}{inner.reader}")
                break


def _family(
    layers: str, attention: tuple[str, tuple[str, ...]], mlp: tuple[str, tuple[str, ...]], mlp_output: str | None = None
) -> Architecture:
    """Record of a family whose layers have an attention module and an MLP, each with its linears."""
    blocks = [
        Block(name, module, tuple(f"{module}.{linear}" if module else linear for linear in linears))
        for name, (module, linears) in ((ATTENTION, attention), (MLP, mlp))
    ]
    if mlp_output is not None:
        blocks[1] = replace(blocks[1], output=mlp_output)
    return Architecture(
        layers, tuple(blocks), channels=tuple(channel for block in blocks for channel in _channels(block))
    )


QKV = ("q_proj", "k_proj", "v_proj")
LLAMA_ATTENTION = ("self_attn", (*QKV, "o_proj"))
BLOOM_ATTENTION = ("self_attention", ("query_key_value", "dense"))
BLOOM_MLP = ("mlp", ("dense_h_to_4h", "dense_4h_to_h"))

GATED = ("gate_proj", "up_proj", "down_proj")
EXPERTS = tuple(f"experts.*.{linear}" for linear in GATED)
SHARED = tuple(f"shared_expert.{linear}" for linear in GATED)
SEVERAL_SHARED = tuple(f"shared_experts.{linear}" for linear in GATED)
LATENT_ATTENTION = ("self_attn", ("q_proj", "q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj", "o_proj"))

GPT2 = _family("transformer.h", ("attn", ("c_attn", "c_proj")), ("mlp", ("c_fc", "c_proj")))
LLAMA = _family("model.layers", LLAMA_ATTENTION, ("mlp", GATED))
MIXTURE = _family("model.layers", LLAMA_ATTENTION, ("mlp", (*GATED, *EXPERTS, *SHARED)))
LATENT = _family("model.layers", LATENT_ATTENTION, ("mlp", (*GATED, *EXPERTS, *SEVERAL_SHARED)))
CONVOLUTION = Block("convolution", "conv", ("conv.in_proj", "conv.out_proj"))
LFM2 = _family("model.layers", ("self_attn", (*QKV, "out_proj")), ("feed_forward", ("w1", "w3", "w2", *EXPERTS)))
UNGATED = _family("model.layers", LLAMA_ATTENTION, ("mlp", ("up_proj", "down_proj")))

# Records by the configuration's `model_type`; each has a parity test. Norms outside the blocks make no difference, nor
# does it matter whether the blocks follow each other or are parallel.
ARCHITECTURES: dict[str, Architecture] = {
    "apertus": UNGATED,
    "arcee": UNGATED,
    "bloom": _family("transformer.h", BLOOM_ATTENTION, BLOOM_MLP),
    "cohere": LLAMA,
    "cohere2": LLAMA,
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "exaone4": LLAMA,
    "falcon": _family("transformer.h", BLOOM_ATTENTION, BLOOM_MLP),
    "gemma2": LLAMA,
    "gemma3_text": LLAMA,
    "gpt2": replace(GPT2, transposed=True),
    "gpt_bigcode": GPT2,
    "gpt_neox": _family("gpt_neox.layers", ("attention", ("query_key_value", "dense")), BLOOM_MLP),
    "gptj": _family("transformer.h", ("attn", (*QKV, "out_proj")), ("mlp", ("fc_in", "fc_out"))),
    "granite": LLAMA,
    "lfm2": replace(LFM2, blocks=(CONVOLUTION, *LFM2.blocks)),
    "lfm2_moe": replace(LFM2, blocks=(CONVOLUTION, *LFM2.blocks)),
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": MIXTURE,
    "mpt": _family("transformer.blocks", ("attn", ("Wqkv", "out_proj")), ("ffn", ("up_proj", "down_proj"))),
    "nemotron": UNGATED,
    "olmo": LLAMA,
    "olmo2": LLAMA,
    "olmo3": LLAMA,
    "olmoe": MIXTURE,
    "opt": _family("model.decoder.layers", ("self_attn", (*QKV, "out_proj")), ("", ("fc1", "fc2")), mlp_output="fc2"),
    "phi": _family("model.layers", ("self_attn", (*QKV, "dense")), ("mlp", ("fc1", "fc2"))),
    "phi3": _family("model.layers", ("self_attn", ("qkv_proj", "o_proj")), ("mlp", ("gate_up_proj", "down_proj"))),
    "phimoe": MIXTURE,
    "qwen2": LLAMA,
    "qwen2_moe": MIXTURE,
    "qwen3": LLAMA,
    "qwen3_moe": MIXTURE,
    "smollm3": LLAMA,
    "stablelm": LLAMA,
    "starcoder2": _family("model.layers", LLAMA_ATTENTION, ("mlp", ("c_fc", "c_proj"))),
}
