"""A disk that is slower than the layers: no layer waits for activations, memory is bounded, and nothing is lost."""

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from llm_barber.checkpoint import activation_writer
from llm_barber.checkpoint import writer as writer_module
from llm_barber.checkpoint.state import STATE_NAME, read_state
from llm_barber.checkpoint.writer import CheckpointWriter
from llm_barber.errors import OutputError
from llm_barber.model.streams import ArrayMemory
from llm_barber.run import stream as run_module
from tests.conftest import make_model
from tests.helpers.kills import (
    die_before_activations,
    die_before_claim,
    die_before_state,
    die_in_activations,
    die_in_next_layer,
    die_in_shard,
    die_in_state,
    run_killed,
)
from tests.helpers.resumed_runs import MASK_ALONE, record_passed_layers, record_pruned_layers
from tests.helpers.runs import keep_each_input, read_untimed_files, run
from tests.helpers.slow_disk import LayerClock, slow_activations

LAYERS = 14
TUNED: dict[str, Any] = {"preset": "mask", "allocation": "uniform", "tune_passes": 1, "target_mix": 0.5}


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """A model of `LAYERS` decoder layers."""
    return make_model(tmp_path / "deep", "llama", num_hidden_layers=LAYERS)


def record_memory(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the bytes of activations whenever an array is allocated from now on."""
    sizes: list[int] = []
    empty = ArrayMemory.empty_off_device

    def noted(self: ArrayMemory, *values: Any, **named: Any) -> torch.Tensor:
        array = empty(self, *values, **named)
        sizes.append(self.used)
        return array

    monkeypatch.setattr(ArrayMemory, "empty_off_device", noted)
    return sizes


@pytest.mark.parametrize(
    ("settings", "arrays"),
    [({"initial": "wanda"}, 1), (TUNED, 2)],
    ids=["one stream", "two streams"],
)
def test_no_layer_waits_for_activations(
    tmp_path: Path,
    deep: Path,
    tokens: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    arrays: int,
) -> None:
    """A file takes as long as ten layers; a layer that waited for it would wait for ever.

    The arrays that are being written stay as they are: later layers write into others, which are all the memory that
    a slow disk costs.
    """
    with monkeypatch.context() as patch:
        expected, fast = slow_activations(patch, 0), record_memory(patch)
        keep_each_input(patch)
        run(deep, tmp_path / "whole", tokens, **settings)
    assert expected.keys() == set(range(1, LAYERS))
    array = 4 * 24 * AutoConfig.from_pretrained(deep).hidden_size * 4  # 4 windows of 24 tokens, in float32
    for layers_per_file in (10, 3):
        out = tmp_path / f"out-{layers_per_file}"
        with monkeypatch.context() as patch:
            kept, slow = slow_activations(patch, layers_per_file), record_memory(patch)
            run(deep, out, tokens, **settings)
        assert read_untimed_files(out) == read_untimed_files(tmp_path / "whole")
        assert 1 in kept
        assert kept == {layers: expected[layers] for layers in kept}
        assert max(fast) < max(slow) <= max(fast) + arrays * array


def test_where_activations_cannot_be_made_again_each_layer_waits(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    claim, prune_layer = CheckpointWriter._claim_activations, run_module.prune_layer

    def claimed(self: CheckpointWriter, newest: Any) -> None:
        claim(self, newest)
        log.append(f"{newest.layers} kept")

    def begun(job: Any, index: int, *rest: Any) -> Any:
        log.append(f"layer {index}")
        return prune_layer(job, index, *rest)

    monkeypatch.setattr(CheckpointWriter, "_claim_activations", claimed)
    monkeypatch.setattr(run_module, "prune_layer", begun)
    run(model, tmp_path / "out", tokens, **MASK_ALONE)
    assert log == ["layer 0", "1 kept", "layer 1", "2 kept", "layer 2"]


@pytest.mark.parametrize("format", ["dense", "packed"])
def test_a_layer_is_computed_while_the_shard_before_it_is_written(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    """Not more than one shard waits to be written: the next one would take its memory, too."""
    run(model, tmp_path / "whole", tokens, format=format)
    clock, writing = LayerClock(monkeypatch), threading.Lock()
    sync = writer_module.sync_file

    def slow(path: Path) -> str:
        assert writing.acquire(blocking=False)
        number = int(path.name.split("-of-")[0][-5:])
        if number <= 3:  # the tensors outside the layers, and two layers; nothing is computed after the third
            clock.wait(number - 1)
        digest = sync(path)
        writing.release()
        return digest

    monkeypatch.setattr(writer_module, "sync_file", slow)
    run(model, tmp_path / "out", tokens, format=format)
    assert read_untimed_files(tmp_path / "out") == read_untimed_files(tmp_path / "whole")


@pytest.mark.parametrize("place", ["shard", "state", "activations"])
@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "the disk of .* is full"), (errno.EACCES, "cannot write .*: .*denied")]
)
def test_errors_of_the_writing_threads_reach_the_run(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, place: str, number: int, message: str
) -> None:
    """The second layer cannot be written, or its input; all that is said to be finished is durable."""
    run(model, tmp_path / "whole", tokens)

    def fail(original: Callable[..., Any], is_bad: Callable[..., bool]) -> Callable[..., Any]:
        def failing(*values: Any) -> Any:
            if is_bad(*values):
                raise OSError(number, os.strerror(number))
            return original(*values)

        return failing

    with monkeypatch.context() as patch:
        match place:
            case "shard":
                sync = fail(writer_module.sync_file, lambda path: "-00003-of-" in path.name)
                patch.setattr(writer_module, "sync_file", sync)
            case "state":
                write = fail(writer_module.write_state, lambda _, state: len(state.layers) > 1)
                patch.setattr(writer_module, "write_state", write)
            case "activations":
                keep_each_input(patch)  # whoever keeps the next one is told
                patch.setattr(activation_writer, "save_activations", fail(lambda: None, lambda *_: True))
        with pytest.raises(OutputError, match=message) as caught:
            run(model, tmp_path / "out", tokens)
    assert "go on with --resume" in caught.value.hint
    work = tmp_path / "out.partial"
    state = read_state(work)
    assert state is not None
    assert all((work / name).is_file() for name in state.shards)
    finished = len(json.loads((work / STATE_NAME).read_text())["layers"])
    assert finished == (2 if place == "activations" else 1)
    pruned_layers = record_pruned_layers(monkeypatch)
    run(model, tmp_path / "out", tokens, resume=True)
    assert pruned_layers == list(range(finished, 3))
    assert read_untimed_files(tmp_path / "out") == read_untimed_files(tmp_path / "whole")


# What is left of a layer, and whether this layer is pruned again, or the next one: where activations can be made again
# from the shards, and where they cannot.
POINTS = {
    die_in_shard: (0, 0),
    die_before_state: (0, 0),
    die_in_state: (0, 0),
    die_before_activations: (1, 0),
    die_in_activations: (1, 0),
    die_before_claim: (1, 0),
}


WHOLE: dict[str, dict[str, bytes]] = {}  # by settings: the files of a run that was not killed


@pytest.mark.parametrize("die", [*POINTS, die_in_next_layer], ids=lambda die: die.__name__)
@pytest.mark.parametrize(
    "settings", [TUNED, {"initial": "wanda", "format": "packed"}, MASK_ALONE], ids=["mask", "packed", "SparseGPT"]
)
def test_a_run_that_is_killed_at_any_point_goes_on_to_the_same_bytes(
    tmp_path: Path,
    tokens: Path,
    monkeypatch: pytest.MonkeyPatch,
    die: Callable[[int], None],
    settings: dict[str, Any],
) -> None:
    """It is killed in its first layer, and in the third when it goes on."""
    model = make_model(tmp_path / "dense", "llama", num_hidden_layers=4)
    if str(settings) not in WHOLE:
        run(model, tmp_path / "whole", tokens, **settings)
        WHOLE[str(settings)] = read_untimed_files(tmp_path / "whole")
    for layer in (0, 2):
        run_killed(die, layer, model, tmp_path / "out", tokens, resume=True, **settings)
    pruned_layers, passed_layers = record_pruned_layers(monkeypatch), record_passed_layers(monkeypatch)
    run(model, tmp_path / "out", tokens, resume=True, **settings)
    if die is die_in_next_layer:  # the shard of the layer before, and the input, may be durable or not
        assert pruned_layers in ([2, 3], [3])
    else:
        assert pruned_layers == list(range(2 + POINTS[die][settings is MASK_ALONE], 4))
    # The input of a layer that was begun may be durable or not; the input before is.
    possible = ([], [1], [1, 2], [2]) if die is die_in_next_layer else ([], [1]) if pruned_layers[0] == 2 else ([2],)
    assert passed_layers in (([],) if settings is MASK_ALONE else possible)
    assert read_untimed_files(tmp_path / "out") == WHOLE[str(settings)]
