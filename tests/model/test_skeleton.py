"""A model run layer by layer through the skeleton gives the whole model's logits, whatever its depth."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llm_barber.model.experts import split_experts
from llm_barber.model.skeleton import Skeleton
from llm_barber.model.structure import find_architecture
from tests.conftest import FAMILIES

DEPTH = 7
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers")


def deep(family: str) -> tuple[str, dict[str, Any]]:
    """The `model_type` and settings of a family's tiny model, with more layers."""
    settings = dict(FAMILIES[family])
    settings |= {name: DEPTH for name in DEPTHS if name in settings}
    for name in ("layer_types", "layers_block_type"):
        if name in settings:
            settings[name] = (settings[name] * DEPTH)[:DEPTH]
    return settings.pop("model_type", family), settings


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_layer_by_layer_equals_the_whole_model(family: str) -> None:
    torch.manual_seed(0)
    model_type, settings = deep(family)
    config = AutoConfig.for_model(model_type, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    skeleton = Skeleton(config, find_architecture(config), torch.device("cpu"), torch.float32)
    split_experts(model)  # which the skeleton has done, too
    for name, parameter in model.named_parameters():  # some are as memory was
        if parameter.dim() > 1 or name.endswith("bias"):
            parameter.normal_(0, 0.1)
    weights = dict(model.named_parameters()) | dict(model.named_buffers())
    skeleton.fill_outside({name: weights[name] for name in skeleton.every_outside_name})
    tokens = torch.randint(0, 128, (2, 12))
    found: list[torch.Tensor] = []
    skeleton.embed(tokens, found.append)
    hidden = found[0]
    for index in range(DEPTH):
        prefix = skeleton.layer_prefix(index)
        names = [*skeleton.layer_names(index), *skeleton.buffer_names(index)]
        layer = skeleton.load_layer(index, {name: weights[prefix + name] for name in names})
        output = layer(hidden, **skeleton.arguments(index, 2, 12))
        skeleton.layers_return_tuples = not isinstance(output, torch.Tensor)
        hidden = output[0] if skeleton.layers_return_tuples else output
    assert torch.allclose(skeleton.finish(hidden), model(tokens).logits, atol=1e-5)
