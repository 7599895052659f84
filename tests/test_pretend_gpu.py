"""Every step works on a device that is not the CPU, with the tensors that the CPU gives (`tests/pretend_gpu.py`)."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.utils import backend_registration

from tests.conftest import make_model
from tests.evaluation.test_evaluate import add_tokenizer

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
)
# Weights as (in, out); experts, apart and stacked; state spaces; positions by ALiBi; complex rotations.
FAMILIES = ("gpt2", "mixtral", "gpt_oss", "jamba", "falcon-rw", "deepseek_v2")


def differences(tokens: Path, *settings: dict[str, Any]) -> list[float]:
    common = {"calibration": str(tokens), "dtype": "float32", "batch_size": 2}
    return results(*(common | one for one in settings))


def results(*settings: dict[str, Any]) -> list[float]:
    command = [sys.executable, "-m", "tests.pretend_gpu", *map(json.dumps, settings)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert not found.returncode, found.stderr[-3000:]
    return [float(line) for line in found.stdout.splitlines()]


def test_every_method_gives_the_same_tensors(llama: Path, tokens: Path) -> None:
    assert differences(tokens, *({"model": str(llama), **one} for one in SETTINGS)) == [0.0] * len(SETTINGS)


def test_every_kind_of_model_gives_the_same_tensors(tmp_path: Path, tokens: Path) -> None:
    models = [make_model(tmp_path / family, family) for family in FAMILIES]
    found = differences(tokens, *({"model": str(one), "preset": "paper", "rebuild_ratio": 0.5} for one in models))
    assert found == [0.0] * len(FAMILIES)


def test_tuned_weights_differ_by_what_autograd_adds_up_in_another_order(llama: Path, tokens: Path) -> None:
    (found,) = differences(tokens, {"model": str(llama), "preset": "best"})
    assert found < 1e-4


def test_measures_are_the_same(tmp_path: Path, llama: Path) -> None:
    other = make_model(tmp_path / "other", "llama", seed=1)
    for model in (llama, other):
        add_tokenizer(model)
    (tmp_path / "text.txt").write_text("ab cd " * 200)
    model = {"model": str(other), "against": str(llama), "dtype": "float32", "batch_size": 2}
    assert results({**model, "text": [str(tmp_path / "text.txt")], "windows": 4, "seqlen": 24}) == [0.0]
