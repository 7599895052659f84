"""Write a random LLaMA-shaped checkpoint of any size.

It has a shard for each decoder layer; one layer at a time is in memory.

    python benchmarks/synthetic.py OUT --layers 32 --hidden 1024 --mlp 2816
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig


def write_llama(
    folder: Path, layers: int, hidden: int, mlp: int, heads: int, vocabulary: int, dtype: torch.dtype
) -> Path:
    """Write a checkpoint with a shard for each decoder layer, and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, vocab_size=vocabulary, max_position_embeddings=4096, tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"], dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip
    config.save_pretrained(folder)
    weight_map = {}

    def shard(name: str, tensors: dict[str, tuple[int, ...]]) -> None:
        made = {
            key: torch.ones(shape, dtype=dtype) if len(shape) == 1 else torch.randn(shape, dtype=dtype) * 0.02
            for key, shape in tensors.items()
        }
        save_file(made, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    shard(
        "outside.safetensors",
        {
            "model.embed_tokens.weight": (vocabulary, hidden),
            "model.norm.weight": (hidden,),
            "lm_head.weight": (vocabulary, hidden),
        },
    )
    for index in range(layers):
        square = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
        feed = {"mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden), "mlp.down_proj": (hidden, mlp)}
        norms = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
        shard(
            f"layer-{index:03d}.safetensors",
            {f"model.layers.{index}.{name}.weight": shape for name, shape in {**square, **feed, **norms}.items()},
        )
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}  # transformers refuses one without metadata
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--mlp", type=int, default=2816)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=1000)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    write_llama(
        options.output,
        options.layers,
        options.hidden,
        options.mlp,
        options.heads,
        options.vocabulary,
        getattr(torch, options.dtype),
    )


if __name__ == "__main__":
    main()
