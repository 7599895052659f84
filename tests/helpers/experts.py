"""Experts of tiny models."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from llm_barber.model.experts import Experts, is_fused, split_experts
from tests.conftest import make_config

EXPERTS, HIDDEN = 6, 32
# Gates that come first; gates between, stacked as (in, out), with biases; no gates.
FAMILIES = {
    "qwen3_moe": {"num_experts": EXPERTS, "mlp_only_layers": []},
    "gpt_oss": {"num_local_experts": EXPERTS},
    "nemotron_h": {"n_routed_experts": EXPERTS},
}


def split(family: str, dtype: torch.dtype, **changes: int) -> Experts:
    """Experts of a family, with random weights; `changes` of the configuration."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(family, **{**FAMILIES[family], **changes}))
    parent = nn.Module()
    parent.experts = next(module for module in model.modules() if is_fused(module))
    split_experts(parent)
    experts = parent.experts
    assert isinstance(experts, Experts)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    return experts.requires_grad_(False).to(dtype)
