"""The rehearsal of a run: its layers, its model, and what is made of its measurements."""

import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from llm_barber.errors import ModelError
from llm_barber.model.empty import empty_model
from llm_barber.model.structure import find_architecture
from llm_barber.planning import rehearsal
from llm_barber.planning.rehearsal import (
    OTHER,
    Pass,
    Rehearsal,
    RehearsalError,
    extended_seconds,
    rehearse,
    rehearsed_layers,
    shortened,
)
from llm_barber.settings.prune import PruneConfig
from tests.conftest import FAMILIES, make_config


@pytest.mark.parametrize(
    ("kinds", "layers"),
    [("a", (1, 1)), ("aa", (1, 2)), ("aaaa", (1, 2)), ("aabbbb", (3, 4)), ("abababab", (2, 4)), ("aab", (3, 3))],
)
def test_first_layers_have_every_kind_and_further_layers_those_of_the_rest(kinds: str, layers: tuple[int, int]) -> None:
    assert rehearsed_layers([nn.Linear(ord(kind), 1, device="meta") for kind in kinds]) == layers


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shortened_configuration_describes_the_first_layer(family: str) -> None:
    config = make_config(family)
    path = find_architecture(config).layers
    whole = empty_model(config, torch.float32).get_submodule(path)
    short = empty_model(shortened(config, len(whole), 1), torch.float32).get_submodule(path)
    assert len(short) == 1
    shapes = [{name: weight.shape for name, weight in layers[0].named_parameters()} for layers in (whole, short)]
    assert shapes[0] == shapes[1]


def test_seconds_grow_with_windows_and_layers() -> None:
    """By hand: two layers were rehearsed, with 2 and with 6 windows, of a run of 10 windows and 5 layers."""
    few = Rehearsal([Pass(OTHER), Pass("pruning", [3.0, 2.0])], 6.0)
    many = Rehearsal([Pass(OTHER), Pass("pruning", [4.0, 4.0])], 10.0)
    seconds = extended_seconds([few, many], (2, 6), (1, 2), (10, 5))
    # The first layer takes a second more for 4 windows, the others 2 seconds, all else 1.
    assert seconds == {OTHER: 3.0, "pruning": 5.0 + 4 * 6.0}
    assert extended_seconds([many], (6,), (1, 2), (6, 5)) == {OTHER: 2.0, "pruning": 4.0 + 4 * 4.0}


def test_passes_that_go_back_and_an_output_head() -> None:
    """Forward and back are two passes over the layers in one; the head is a step by itself."""
    measured = Rehearsal([Pass(OTHER), Pass("costs", [1.0, 1.0, 5.0, 3.0]), Pass("pruning", [2.0, 2.0, 9.0])], 23.0)
    seconds = extended_seconds([measured], (4,), (1, 2), (4, 10))
    assert seconds == {OTHER: 0.0, "costs": 10.0 + 8 * 1.0 + 8 * 3.0, "pruning": 13.0 + 8 * 2.0}


def test_errors_of_the_process_are_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = PruneConfig(model="m", output=tmp_path / "out", pattern="2:5", seqlen=8, dtype="float32")
    with pytest.raises(ModelError, match="does not divide") as caught:
        rehearse(make_config("llama"), torch.float32, config, (2,))
    assert caught.value.hint
    monkeypatch.setattr(rehearsal, "CHILD", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(RehearsalError, match="ended with signal 9") as killed:
        rehearse(make_config("llama"), torch.float32, config, (2,))
    assert "--tflops" in killed.value.hint
    assert str(pickle.loads(pickle.dumps(killed.value))) == str(killed.value)
