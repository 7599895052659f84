"""Every step works on a device that is not the CPU, with the tensors that the CPU gives (`tests/pretend_gpu.py`)."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch.utils import backend_registration

from tests.conftest import make_model, save_tokens
from tests.helpers.text import add_tokenizer

if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("this PyTorch has no devices written in Python", allow_module_level=True)

SETTINGS: tuple[dict[str, Any], ...] = (
    {"initial": "magnitude"},
    {"initial": "sparsegpt", "keep_updates": True},
    {"initial": "wanda", "rebuild_ratio": 0.5, "prune_head": True},
    {"initial": "ria", "pattern": "2:4", "sparsity": None, "format": "packed"},
    {"initial": "dsnot", "rebuild": False},
    {"initial": "alps", "rebuild": False},
    {"preset": "mask"},
    {"preset": "mask", "allocation": "owl", "refine": "swaps", "reconstruct": "least-squares"},
    {"preset": "mask", "interrupted": True},
    {"initial": "wanda", "rebuild_ratio": 0.5, "room": 20_000},
    {"preset": "mask", "room": 10**9},
    {"preset": "mask", "allocation": "owl", "refine": "swaps", "reconstruct": "least-squares", "room": 60_000},
)
# Weights as (in, out); experts, apart and stacked; state spaces; positions by ALiBi; complex rotations.
FAMILIES = ("gpt2", "mixtral", "gpt_oss", "jamba", "falcon-rw", "deepseek_v2")


def results(*settings: dict[str, Any]) -> list[Any]:
    """Results of one process for all settings: starting it takes longer than most of these runs."""
    command = [sys.executable, "-m", "tests.pretend_gpu", *map(json.dumps, settings)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert not process.returncode, process.stderr[-3000:]
    return [json.loads(line) for line in process.stdout.splitlines()]


def test_every_method_and_kind_of_model_gives_the_same_tensors(tmp_path: Path, llama: Path, tokens: Path) -> None:
    common = {"calibration": str(tokens), "dtype": "float32", "batch_size": 2}
    runs = [common | {"model": str(llama)} | settings for settings in SETTINGS]
    for family in FAMILIES:
        model = make_model(tmp_path / family, family)
        runs.append({**common, "model": str(model), "preset": "paper", "rebuild_ratio": 0.5})
    *same, tuned = results(*runs, {**common, "model": str(llama), "preset": "best"})
    assert same == [0.0] * len(runs)
    assert tuned < 1e-4  # autograd adds up in another order on another device


CHECK_FINITE, BREAK_TIES = "model/gradients.py check_finite", "masking/selection.py _without_ties"


def test_a_step_of_tuning_waits_for_the_device_twice(llama: Path, tokens: Path) -> None:
    """Once for gradients that are not finite, once for ties; never for a sequence or a linear."""
    settings = {"model": str(llama), "calibration": str(tokens), "preset": "mask", "guard": 0, "counted": "step"}
    assert results({**settings, "dtype": "float32", "batch_size": 2}) == [{CHECK_FINITE: 1, BREAK_TIES: 1}]


@pytest.mark.parametrize("preset", ["paper", "mask"])
def test_the_device_is_not_waited_for_more_often_with_more_text(tmp_path: Path, llama: Path, preset: str) -> None:
    """More windows are more steps of tuning, batches to embed, and windows of the allocation's loss; nothing else."""
    runs = []
    for windows in (8, 16):
        calibration = save_tokens(tmp_path / f"{windows}.safetensors", sequences=windows)
        settings = {"model": str(llama), "calibration": str(calibration), "preset": preset, "counted": "run"}
        runs.append({**settings, "dtype": "float32", "batch_size": 2} | ({"guard": 0} if preset == "mask" else {}))
    fewer, more = (Counter(waits) for waits in results(*runs))
    layers, passes, steps = 2, 8, 2  # a step has four windows
    embedded, lost = {"model/stepping.py capture": 4}, {"model/skeleton.py Skeleton.finish": 8}
    tuned = {CHECK_FINITE: layers * passes * steps, BREAK_TIES: layers * passes * steps}
    assert dict(more - fewer) == (embedded | lost | tuned if preset == "mask" else embedded)


def test_measures_are_the_same(tmp_path: Path, llama: Path) -> None:
    other = make_model(tmp_path / "other", "llama", seed=1)
    for model in (llama, other):
        add_tokenizer(model)
    (tmp_path / "text.txt").write_text("ab cd " * 200)
    model = {"model": str(other), "against": str(llama), "dtype": "float32", "batch_size": 2}
    assert results({**model, "text": [str(tmp_path / "text.txt")], "windows": 4, "seqlen": 24}) == [0.0]
