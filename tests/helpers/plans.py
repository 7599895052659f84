"""Models and runs for the tests of planning: two layers by hand, and the configurations of Llama 3."""

from typing import Any

import torch
from transformers import AutoConfig

from llm_barber.masking.granularity import Granularity
from llm_barber.model.skeleton import Skeleton
from llm_barber.model.structure import find_architecture
from llm_barber.planning.rates import named_rates
from llm_barber.planning.recipe import Recipe
from llm_barber.planning.shapes import BlockShapes, LayerShapes, ModelShapes, model_shapes
from llm_barber.settings.initial import Initial
from llm_barber.settings.presets import Allocation
from llm_barber.settings.refining import RefineSettings

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
    "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
LLAMA_70B = {
    **LLAMA_8B, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
}  # fmt: skip

# One layer by hand: two (4, 4) linears read one tensor, then (4, 4); up (8, 4), down (4, 8); 5 more parameters.
ATTENTION = BlockShapes("attention", ((4, 4), (4, 4), (4, 4)), 4)
MLP = BlockShapes("mlp", ((8, 4), (4, 8)), 0)
LAYER = LayerShapes((ATTENTION, MLP), 48 + 64 + 5)
MODEL = ModelShapes(hidden=4, vocabulary=10, head=4, embedding=40, outside=84, layers=(LAYER, LAYER))
PAPER = Recipe(
    sequences=6, tokens=10, batch=2, itemsize=2, stored=2, on_cpu=True, method=Initial.WANDA, pattern=None,
    allocation=Allocation.UNIFORM, granularity=Granularity.OUTPUT, refine=None,
)  # fmt: skip
RATES = named_rates(4e14, None, 2e12, 1e10, 5e9, 2e9, torch.bfloat16)
MASK = Recipe(**{**PAPER.__dict__, "granularity": None, "refine": RefineSettings(100, 0.5, False, held_out=2)})


def shapes_of(settings: dict[str, Any], family: str = "llama") -> ModelShapes:
    """Sizes of a model from fields of its configuration."""
    fields = {**settings}
    config = AutoConfig.for_model(fields.pop("model_type", family), **fields)
    architecture = find_architecture(config)
    return model_shapes(Skeleton(config, architecture, torch.device("cpu"), torch.float32))
