"""Tiny random models of each family, and the masks of the released program."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before imports read it: without a network each request is tried for seconds

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from llm_barber.checkpoint.digests import DIGEST, with_digest
from llm_barber.model.empty import auto_class
from llm_barber.progress import Silent

if "PYTEST_XDIST_WORKER" in os.environ:  # each has a processor to itself, and so have the processes that it starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)

DATA = Path(__file__).parent / "data"
RELEASED = DATA / "released-masks"

COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 128, "max_position_embeddings": 64}
LLAMA_LIKE = {**COMMON, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
GPT_LIKE = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 64}
MIXED = ["sliding_attention", "full_attention"]
LATENT = {
    **COMMON, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "moe_intermediate_size": 16,
    "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "n_group": 2,
    "topk_group": 1,
}  # fmt: skip
MIXTURE = {**LLAMA_LIKE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL = {**LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16}
CONVOLUTION = ["conv", "full_attention"]
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
DELTA = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": 48, "head_dim": 8,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
QWEN_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
SECTIONS = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
# Families without a record: their structure is found.
FOUND: dict[str, dict[str, Any]] = {
    "bamba": {**LLAMA_LIKE, **MAMBA, "attn_layer_indices": [1]},
    "deepseek_v32": {  # attention that chooses tokens, by linears that are as good as routers
        **LATENT, "index_n_heads": 4, "index_head_dim": 8, "index_topk": 16,
    },
    "falcon_h1": {**LLAMA_LIKE, **MAMBA, "mamba_d_ssm": 64},  # attention and state space side by side
    "gpt_oss": {  # experts stacked as (in, out), with biases; gates that do not saturate
        **LOCAL, "head_dim": 8, "layer_types": MIXED, "sliding_window": 8, "swiglu_alpha": 0.1,
    },
    "granitemoe": LOCAL,  # stacked as (out, in)
    "granitemoehybrid": {
        **LOCAL, **MAMBA, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 48,
    },
    "jamba": {
        **LLAMA_LIKE, "num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4,
    },
    "modernbert-decoder": {  # a dense layer and a norm before the output head, which is tied and has a bias
        **LLAMA_LIKE, "layer_types": MIXED, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "cls_token_id": 1, "sep_token_id": 2,
    },
    "nemotron_h": {  # one block a layer, experts without gates
        **LLAMA_LIKE, "layers_block_type": ["mamba", "moe", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 16,
        "ssm_state_size": 8, "n_groups": 1, "head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 48,
    },
    "qwen3_next": {**MIXTURE, **DELTA},
    # Language models of models with images.
    "gemma3": {
        "text_config": {**LLAMA_LIKE, "head_dim": 8, "sliding_window": 8, "layer_types": MIXED},
        "vision_config": VISION, "mm_tokens_per_image": 4,
    },
    "internvl": {
        "text_config": {"model_type": "qwen2", **LLAMA_LIKE},
        "vision_config": {**VISION, "image_size": [16, 16], "patch_size": [8, 8]},
    },
    "llava": {
        "text_config": {"model_type": "llama", **LLAMA_LIKE},
        "vision_config": {"model_type": "clip_vision_model", **VISION},
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", **LLAMA_LIKE}, "vision_config": {"model_type": "pixtral", **VISION},
    },
    "qwen2_5_vl": {"text_config": {**LLAMA_LIKE, "rope_parameters": SECTIONS}, "vision_config": QWEN_VISION},
    "qwen3_5": {"text_config": {**LLAMA_LIKE, **DELTA}, "vision_config": QWEN_VISION},
    "qwen3_5-whole": {
        "model_type": "qwen3_5", "text_config": {**LLAMA_LIKE, **DELTA}, "vision_config": QWEN_VISION,
        "architectures": ["Qwen3_5ForConditionalGeneration"],
    },
    "qwen3_vl": {
        "text_config": {**LLAMA_LIKE, "head_dim": 8, "rope_parameters": SECTIONS},
        "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    },
    "smolvlm": {"text_config": {"model_type": "llama", **LLAMA_LIKE}, "vision_config": VISION},
}  # fmt: skip
KNOWN: dict[str, dict[str, Any]] = {
    "apertus": LLAMA_LIKE,
    "arcee": LLAMA_LIKE,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 128},
    "cohere": {**LLAMA_LIKE, "pad_token_id": 0},
    "cohere2": {**LLAMA_LIKE, "pad_token_id": 0, "sliding_window": 8, "layer_types": MIXED},
    "deepseek_v2": {**LATENT, "topk_method": "group_limited_greedy"},
    "deepseek_v2-lite": {"model_type": "deepseek_v2", **LATENT, "q_lora_rank": None, "topk_method": "greedy"},
    "deepseek_v3": LATENT,
    "exaone4": {**LLAMA_LIKE, "sliding_window": 8, "layer_types": MIXED},
    "falcon": {**COMMON, "num_attention_heads": 4},  # attention and MLP side by side, multi-query
    "falcon-rw": {  # attention, then MLP; positions by ALiBi
        **COMMON, "model_type": "falcon", "num_attention_heads": 4, "parallel_attn": False, "alibi": True, "bias": True,
    },
    "gemma2": {**LLAMA_LIKE, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {
        **LLAMA_LIKE, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8, "layer_types": MIXED,
    },
    "gpt2": GPT_LIKE,  # weights as (in, out)
    "gpt_bigcode": GPT_LIKE,
    "gpt_neox": {**COMMON, "intermediate_size": 64, "num_attention_heads": 4},
    "gptj": {**GPT_LIKE, "rotary_dim": 4},
    "granite": {**LLAMA_LIKE, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
    "lfm2": {**LLAMA_LIKE, "layer_types": CONVOLUTION, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {**MIXTURE, "layer_types": CONVOLUTION, "num_dense_layers": 1},
    "llama": {**LLAMA_LIKE, "tie_word_embeddings": True},
    "mistral": {**LLAMA_LIKE, "sliding_window": 8},
    "mixtral": LOCAL,
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 128, "max_seq_len": 64},
    "nemotron": LLAMA_LIKE,
    "olmo": LLAMA_LIKE,
    "olmo2": LLAMA_LIKE,
    "olmo3": {**LLAMA_LIKE, "sliding_window": 8, "layer_types": MIXED},
    "olmoe": {**LLAMA_LIKE, "num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16},
    "opt": {**COMMON, "ffn_dim": 64, "num_attention_heads": 4, "word_embed_proj_dim": 32},
    "opt-350m": {  # projected embeddings, layer norm after
        "model_type": "opt", **COMMON, "ffn_dim": 64, "num_attention_heads": 4, "word_embed_proj_dim": 16,
        "do_layer_norm_before": False,
    },
    "phi": LLAMA_LIKE,
    "phi3": {**LLAMA_LIKE, "pad_token_id": 0},
    "phimoe": {**LOCAL, "head_dim": 8},
    "qwen2": LLAMA_LIKE,
    "qwen2_moe": {**MIXTURE, "shared_expert_intermediate_size": 48, "mlp_only_layers": [0]},
    "qwen3": {**LLAMA_LIKE, "head_dim": 8},
    "qwen3_moe": {**MIXTURE, "head_dim": 8, "norm_topk_prob": True, "mlp_only_layers": [0]},
    "smollm3": {**LLAMA_LIKE, "pad_token_id": 0},
    "stablelm": LLAMA_LIKE,
    "starcoder2": LLAMA_LIKE,
}  # fmt: skip
FAMILIES = KNOWN | FOUND


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with a time limit of their own take longest: they begin first, so that no processor waits for them."""
    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)


class Deprecations(logging.Handler):
    """What libraries log about calls that they will remove."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        # Configurations of the released masks have `torch_dtype`, as many checkpoints of users do.
        if "deprecated" in record.getMessage() and "`torch_dtype`" not in record.getMessage():
            self.messages.append(f"{record.name}: {record.getMessage()}")


@pytest.fixture(autouse=True)
def no_deprecated_calls() -> Iterator[None]:
    """Fail a test in which this program calls what a library will remove."""
    handler = Deprecations()
    loggers = [logging.getLogger(name) for name in ("transformers", "torch", "peft", "accelerate")]
    for logger in loggers:
        logger.addHandler(handler)
    yield
    for logger in loggers:
        logger.removeHandler(handler)
    assert not handler.messages


@pytest.fixture(autouse=True, scope="session")
def _disks_are_not_waited_for() -> Iterator[None]:
    """No test cuts the power, and fifteen waits of some milliseconds a run are a tenth of all that tests take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


def make_config(family: str, **changes: Any) -> PreTrainedConfig:
    """The configuration of a family's tiny model."""
    settings = {**FAMILIES[family], **changes}
    return AutoConfig.for_model(settings.pop("model_type", family), **settings)


MADE = TemporaryDirectory(prefix="llm-barber-tests-")  # models that `make_model` copies
STATES: dict[str, torch.Tensor] = {}  # by model: that of the random numbers after it was made


def make_model(folder: Path, family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Path:
    """Save a tiny random model of a family, and return its folder; each model is made once and then copied."""
    key = hashlib.sha256(repr((family, dtype, seed, sorted(changes.items()))).encode()).hexdigest()
    if key not in STATES:
        _save_model(Path(MADE.name) / key, family, dtype, seed, changes)
        STATES[key] = torch.get_rng_state()
    torch.set_rng_state(STATES[key])
    shutil.copytree(Path(MADE.name) / key, folder, dirs_exist_ok=True)
    return folder


def _save_model(folder: Path, family: str, dtype: torch.dtype, seed: int, changes: dict[str, Any]) -> None:
    torch.manual_seed(seed)
    config = make_config(family, **changes)
    model = auto_class(config).from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith(("score_correction_bias", "expert_bias")):  # what routers add to their scores
                buffer.normal_(0, 0.2)
    model.save_pretrained(folder)


def make_gguf(path: Path) -> Path:
    """Save a GGUF file with one tensor of a model of one layer, and no tokenizer."""
    from gguf import GGUFWriter

    writer = GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(16)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_vocab_size(95)
    writer.add_tensor("token_embd.weight", torch.zeros(95, 8).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load_model(folder: Path, **settings: Any) -> PreTrainedModel:
    """A checkpoint as transformers loads it."""
    model: PreTrainedModel = auto_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, **settings)
    return model


def save_tokens(path: Path, sequences: int = 4, tokens: int = 24, vocabulary: int = 128, seed: int = 1) -> Path:
    """Save random calibration tokens, and return the file."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (sequences, tokens), generator=generator)
    save_file({"input_ids": ids}, path)
    return path


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of a tensor, as integers."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def change_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes. A digest in it is made to fit."""
    content = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            content.pop(key, None)
        else:
            content[key] = value
    path.write_text(json.dumps(with_digest(content) if DIGEST in content else content))


class Listener(Silent):
    """Keeps what a run warns of."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A tiny LLaMA."""
    return make_model(tmp_path / "llama", "llama")


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """Calibration tokens for the tiny models."""
    return save_tokens(tmp_path / "tokens.safetensors")
