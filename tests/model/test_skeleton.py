"""A model run layer by layer through the skeleton gives the whole model's logits, whatever its depth."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.models.llama import modeling_llama

from llm_barber import PruneConfig, prune
from llm_barber.errors import ModelError
from llm_barber.evaluation.streamed import StreamedModel
from llm_barber.model.empty import auto_class
from llm_barber.model.experts import split_experts
from llm_barber.model.skeleton import Skeleton
from llm_barber.model.structure import find_architecture
from llm_barber.progress import Silent
from tests.conftest import FAMILIES, make_model, read_folder, save_tokens

DEPTH = 7
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers")


def deep(family: str) -> tuple[str, dict[str, Any]]:
    """The `model_type` and settings of a family's tiny model, with more layers."""
    settings = dict(FAMILIES[family])
    text_settings = dict(settings.get("text_config", settings))
    text_settings |= {name: DEPTH for name in DEPTHS if name in text_settings}
    for name in ("layer_types", "layers_block_type"):
        if name in text_settings:
            text_settings[name] = (text_settings[name] * DEPTH)[:DEPTH]
    settings = {**settings, "text_config": text_settings} if "text_config" in settings else text_settings
    return settings.pop("model_type", family), settings


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_layer_by_layer_equals_the_whole_model(family: str) -> None:
    torch.manual_seed(0)
    model_type, settings = deep(family)
    config = AutoConfig.for_model(model_type, **settings)
    model = auto_class(config).from_config(config, dtype=torch.float32).eval()
    skeleton = Skeleton(config, find_architecture(config), torch.device("cpu"), torch.float32)
    split_experts(model)  # which the skeleton has done, too
    for name, parameter in model.named_parameters():  # some are as memory was
        if parameter.dim() > 1 or name.endswith("bias"):
            parameter.normal_(0, 0.1)
    weights = dict(model.named_parameters()) | dict(model.named_buffers())
    skeleton.fill_outside({name: weights[name] for name in skeleton.all_outside_names})
    tokens = torch.randint(0, 128, (2, 12))
    embedded: list[torch.Tensor] = []
    skeleton.embed(tokens, embedded.append)
    hidden = embedded[0]
    for index in range(DEPTH):
        prefix = skeleton.layer_prefix(index)
        names = [*skeleton.layer_names(index), *skeleton.buffer_names(index)]
        layer = skeleton.load_layer(index, {name: weights[prefix + name] for name in names})
        output = layer(hidden, **skeleton.arguments(index, 2, 12))
        skeleton.tails[index] = None if isinstance(output, torch.Tensor) else len(output) - 1
        hidden = output if isinstance(output, torch.Tensor) else output[0]
    assert torch.allclose(skeleton.finish(hidden), model(tokens).logits, atol=1e-5)


def answering(tails: list[int | None]) -> Callable[..., Any]:
    """A decoder layer's forward that returns so much after the states, by the layer's number."""
    plain = modeling_llama.LlamaDecoderLayer.forward

    def forward(layer: torch.nn.Module, hidden_states: Any, *arguments: Any, **keywords: Any) -> Any:
        states = hidden_states[0] if isinstance(hidden_states, tuple) else hidden_states
        output = plain(layer, states, *arguments, **keywords)
        tail = tails[layer.self_attn.layer_idx]
        return output if tail is None else (output, *[None] * tail)

    return forward


@pytest.mark.parametrize("settings", [{"preset": "best"}, {"initial": "wanda", "granularity": "block"}])
def test_layers_whose_tuples_differ_in_length(
    tmp_path: Path, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model(tmp_path / "dense", "llama", num_hidden_layers=3)
    tokens = save_tokens(tmp_path / "tokens.safetensors")
    written = []
    for name, tails in (("alike", [None] * 3), ("differing", [1, 2, None])):
        monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", answering(tails))
        output = tmp_path / name
        common: dict[str, Any] = {"calibration": tokens, "dtype": "float32", "report": False}
        prune(PruneConfig(model=folder, output=output, prune_head=True, **common, **settings))
        states = StreamedModel(str(output), torch.device("cpu"), torch.float32).hidden_states(
            [load_file(tokens)["input_ids"]], Silent()
        )
        written.append((read_folder(output), states[0]))
    assert written[0][0].keys() == written[1][0].keys()
    assert all(torch.equal(tensor, written[1][0][name]) for name, tensor in written[0][0].items())
    assert torch.equal(written[0][1], written[1][1])


def test_models_that_unpack_what_layers_return(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three lengths of tuples found by trying, and a fourth for which an error says that none would do."""
    make_model(tmp_path / "dense", "llama", num_hidden_layers=2)
    config = AutoConfig.from_pretrained(tmp_path / "dense")

    def unpack(count: int) -> Callable[..., Any]:
        def forward(model: torch.nn.Module, input_ids: torch.Tensor, **_: Any) -> None:
            hidden = torch.zeros(*input_ids.shape, 32)
            for layer in model.layers:
                hidden, *rest = layer(hidden)
                if len(rest) != count:
                    raise ValueError(f"not enough values to unpack (expected {count + 1}, got {len(rest) + 1})")

        return forward

    for count in (0, 2, 5, 9):
        monkeypatch.setattr(modeling_llama.LlamaModel, "forward", unpack(count))
        tokens = torch.zeros(2, 4, dtype=torch.int64)
        skeleton = Skeleton(config, find_architecture(config), torch.device("cpu"), torch.float32)
        if count < 9:
            skeleton.embed(tokens, lambda hidden: None)
        else:
            with pytest.raises(ModelError, match="stepped over: not enough values"):
                skeleton.embed(tokens, lambda hidden: None)


def test_layers_that_change_the_shape_of_the_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(tmp_path / "dense", "llama", num_hidden_layers=2)
    plain = modeling_llama.LlamaDecoderLayer.forward
    monkeypatch.setattr(
        modeling_llama.LlamaDecoderLayer, "forward", lambda *positional, **named: plain(*positional, **named)[:, ::2]
    )
    tokens = save_tokens(tmp_path / "tokens.safetensors")
    with pytest.raises(ModelError, match=r"LlamaDecoderLayer makes states of shape \(4, 12, 32\) from \(4, 24, 32\)"):
        prune(PruneConfig(model=folder, output=tmp_path / "out", calibration=tokens))
    assert not (tmp_path / "out").exists()
