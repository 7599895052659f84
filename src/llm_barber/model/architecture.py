"""Where a model family keeps its decoder layers, and which linears make up each block: one small record a family.

To add a family, add a record to `ARCHITECTURES` and its name to the parity test (see CONTRIBUTING.md).
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # settings import this file, and the command line starts before torch is loaded
    from torch import Tensor, nn

ATTENTION, MLP = "attention", "mlp"  # names of blocks, in every record


@dataclass(frozen=True)
class Block:
    """One block of a decoder layer.

    `output` is the module whose output is the block's output; `linears` are the prunable modules. Both are paths
    inside the decoder layer. In a record, `*` stands for every expert's number, and what a layer has not is left out:
    a block whose output is not there, a linear that is not there.
    """

    name: str
    output: str
    linears: tuple[str, ...]


@dataclass(frozen=True)
class Architecture:
    """A model family: the path of its decoder layers (a module list), and each layer's blocks in order.

    `transposed`: weights of linears are kept as (in, out).
    """

    layers: str
    blocks: tuple[Block, ...]
    transposed: bool = False

    @property
    def linears(self) -> tuple[str, ...]:
        """All that a layer may have, block after block."""
        return tuple(name for block in self.blocks for name in block.linears)

    def blocks_of(self, layer: "nn.Module") -> tuple[Block, ...]:
        """The blocks that a decoder layer has, with the linears that it has."""
        modules = {name for name, module in layer.named_modules() if getattr(module, "weight", None) is not None}
        found = []
        for block in self.blocks:
            if _has(layer, block.output):
                names = [name for linear in block.linears for name in _expanded(linear, layer) if name in modules]
                found.append(replace(block, linears=tuple(names)))
        return tuple(found)

    def convert_layout(self, weight: "Tensor") -> "Tensor":
        """A linear's weight as (out, in) from how the family keeps it, or the other way round."""
        return weight.t().contiguous() if self.transposed else weight


@dataclass(frozen=True)
class StructureOptions:
    """What a user decides. `layers`: path of the decoder layers. `blocks`: those of a layer, in order."""

    layers: str | None = None
    blocks: tuple[Block, ...] = ()


def kind_of(linear: str) -> str:
    """A linear's name with a star for the expert's number."""
    return re.sub(r"\.\d+\.", ".*.", linear)


def select_linears(blocks: Iterable[Block], linears: Collection[str]) -> tuple[Block, ...]:
    """Blocks with some of their linears; a block may be left with none."""
    return tuple(replace(block, linears=tuple(name for name in block.linears if name in linears)) for block in blocks)


def _has(layer: "nn.Module", path: str) -> bool:
    try:
        layer.get_submodule(path)
    except AttributeError:
        return False
    return True


def _expanded(linear: str, layer: "nn.Module") -> list[str]:
    """The names that a linear with `*` for the expert's number stands for."""
    experts, star, rest = linear.partition(".*.")
    if not star:
        return [linear]
    return (
        [f"{experts}.{name}.{rest}" for name, _ in layer.get_submodule(experts).named_children()]
        if _has(layer, experts)
        else []
    )


def _family(
    layers: str, attention: tuple[str, tuple[str, ...]], mlp: tuple[str, tuple[str, ...]], mlp_output: str | None = None
) -> Architecture:
    """Decoder layers with an attention module and an MLP, and the linears of each."""
    blocks = [
        Block(name, module, tuple(f"{module}.{linear}" if module else linear for linear in linears))
        for name, (module, linears) in ((ATTENTION, attention), (MLP, mlp))
    ]
    if mlp_output is not None:
        blocks[1] = replace(blocks[1], output=mlp_output)
    return Architecture(layers, tuple(blocks))


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

# By `model_type` of the configuration. Each name here has a parity test. Norms outside the blocks, and whether the
# blocks follow each other or stand side by side, make no difference.
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
