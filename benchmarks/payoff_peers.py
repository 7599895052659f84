"""llama.cpp beside the payoff benchmark: a process of its own, and GGUF files of its types."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open
from transformers import LlamaConfig

WORKER = Path(__file__).parent / "payoff_llama.py"
TYPES = ("BF16", "Q8_0", "Q4_K_M")
CONTEXT = 1024  # tokens
INSTALL = (
    "llama.cpp is left out: --llama names no Python that has llama-cpp-python. To build it, 10 minutes on 2 cores:\n"
    "  python3 -m venv LLAMA\n"
    "  CMAKE_ARGS=-DLLAVA_BUILD=OFF LLAMA/bin/pip install --no-binary llama-cpp-python llama-cpp-python==0.3.36\n"
    "then give --llama LLAMA/bin/python"
)
BLOCK = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


class Llama:
    """A process that runs llama.cpp.

    Args:
        python: the Python that has llama-cpp-python.

    Raises:
        SystemExit: it has not.
    """

    def __init__(self, python: str) -> None:
        try:
            self._process = subprocess.Popen(
                [python, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            self.about: dict[str, str] = self.ask("about")
        except OSError:
            raise SystemExit(f"{python} does not run llama.cpp. {INSTALL}") from None

    def ask(self, do: str, **arguments: Any) -> Any:
        """Let the process carry out a command of `payoff_llama.py`, and return its result.

        Raises:
            ConnectionError: the process has ended.
            SystemExit: the command cannot be carried out.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise ConnectionError("the process of llama.cpp has ended")
        answer = json.loads(line)
        if "error" in answer:
            raise SystemExit(f"llama.cpp: {answer['error']}")
        return answer["result"]

    def decoding(self, prompt: list[int], tokens: int) -> Callable[[], float]:
        """Greedy decoding, for `in_turn`."""
        return lambda: self.ask("decode", prompt=prompt, tokens=tokens)

    def logits(self, tokens: list[int], path: Path) -> torch.Tensor:
        """Logits after each token, float32, (tokens, vocabulary); `path` is written and removed."""
        self.ask("logits", tokens=tokens, path=str(path))
        loaded = np.load(path)
        path.unlink()
        return torch.from_numpy(loaded)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def file_of_type(llama: Llama, source: Path, work: Path, kind: str, threads: int) -> Path:
    """A model's GGUF file in another type, made from `source` unless it is there."""
    target = work / f"{source.stem}.{kind}.gguf"
    if not target.exists():
        print(f"{target.name}: quantising …", flush=True)
        partial = target.with_suffix(".partial")
        llama.ask("quantise", source=str(source), target=str(partial), kind=kind, threads=threads)
        partial.rename(target)
    return target


def write_gguf(checkpoint: Path, target: Path) -> Path:
    """Write a LLaMA checkpoint in bfloat16 as GGUF, without a tokenizer, to measure speed.

    Rows of the query and key weights stay in transformers' order, so that outputs are not the model's.
    """
    config = LlamaConfig.from_pretrained(checkpoint)
    partial = target.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_tokenizer_model("none")
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dictionary
                tensor = file.get_tensor(name)
                if tensor.ndim == 1:
                    writer.add_tensor(gguf_name(name), tensor.float().numpy())
                else:
                    values = tensor.bfloat16().view(torch.uint8).numpy()
                    writer.add_tensor(gguf_name(name), values, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(target)
    return target


def gguf_name(name: str) -> str:
    """Name of a LLaMA tensor in GGUF files.

    Example: "model.layers.3.mlp.up_proj.weight" -> "blk.3.ffn_up.weight".
    """
    stem = name.removesuffix(".weight")
    if stem in OUTSIDE:
        return f"{OUTSIDE[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{BLOCK[part]}.weight"
