"""Parameters of a model and the tensors of a checkpoint that hold them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_barber.checkpoint.locations import Location
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.errors import ModelError
from llm_barber.loading.naming import find_locations
from llm_barber.model.empty import empty_model
from tests.conftest import make_config, make_model


def test_base_prefix_may_be_missing(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "opt", "opt")
    tensors = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    source = CheckpointSource(folder)
    source.locations = find_locations(empty_model(make_config("opt"), torch.float32), source.tensors)
    name = "model.decoder.layers.0.fc1.weight"
    assert source.location(name) == Location("decoder.layers.0.fc1.weight")
    with pytest.raises(ModelError, match="has no tensor 'model.nothing'"):
        source.location("model.nothing")


def test_experts_that_are_stored_one_by_one_or_stacked(tmp_path: Path) -> None:
    """An expert's weight is a tensor of its own, or a part of the tensor of all experts."""
    for family, stacked in (("qwen3_moe", False), ("granitemoe", True)):
        folder = make_model(tmp_path / family, family)
        source = CheckpointSource(folder)
        locations = find_locations(empty_model(make_config(family), torch.float32), source.tensors)
        parts = [location for location in locations.values() if location.part is not None]
        assert bool(parts) is stacked
        tensors = source.read({location.tensor for location in parts})
        for location in parts:
            part = location.of(tensors[location.tensor])
            assert part.dim() == 2
            assert part.untyped_storage().data_ptr() == tensors[location.tensor].untyped_storage().data_ptr()
        assert set(source.tensors) == {location.tensor for location in locations.values()}
