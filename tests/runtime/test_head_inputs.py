"""The output head of a model that takes no gradients is multiplied without a copy of its weight."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import llm_barber
from llm_barber import PruneConfig, prune
from tests.conftest import make_model, save_tokens


class ProductsWith(TorchDispatchMode):
    """Names of the products in which a weight takes part."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.names: list[str] = []
        self._memory = weight.untyped_storage().data_ptr()

    def __torch_dispatch__(self, function: Any, _: Any, arguments: Any = (), named: Any = None) -> Any:
        uses = any(
            isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() == self._memory
            for value in arguments
        )
        name = function._schema.name
        if uses and name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear"):
            self.names.append(name)
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize("keep_packed", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])  # the second has a tied head
def test_a_prompt_s_last_logits_copy_no_weight(tmp_path: Path, family: str, keep_packed: bool) -> None:
    model = make_model(tmp_path / "dense", family)
    tokens = save_tokens(tmp_path / "tokens.safetensors")
    prune(PruneConfig(model=model, output=tmp_path / "out", calibration=tokens, initial="magnitude", rebuild=False))
    with torch.inference_mode():  # in which a dense model's weights take no gradients, either
        loaded = llm_barber.load(tmp_path / "out", keep_packed=keep_packed)
    head = loaded.get_output_embeddings()
    prompt = torch.arange(1, 13).view(2, 6)
    with torch.no_grad(), ProductsWith(head.weight) as products:
        logits = loaded(prompt, logits_to_keep=1, use_cache=False).logits
    assert products.names == ["aten::mm"]
    with torch.inference_mode():
        # Products of other numbers of rows are rounded differently on some processors.
        torch.testing.assert_close(logits, loaded(prompt, use_cache=False).logits[:, -1:])


def test_a_model_that_is_loaded_dense_takes_gradients_as_transformers_has_it(tmp_path: Path) -> None:
    loaded = llm_barber.load(make_model(tmp_path / "dense", "llama"))
    assert all(parameter.requires_grad for parameter in loaded.parameters())
