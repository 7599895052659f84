"""The masks of the paper's released program (tests/data/released-masks/README.md), and runs that repeat them."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from llm_barber import RebuildConfig, RunReport, rebuild
from tests.conftest import RELEASED

GRANULARITIES = {"block": "block", "layer": "linear", "output1": "output", "input1": "input"}


REBUILT = sorted(RELEASED.glob("*/*.rebuilt.safetensors"))


def released_id(path: Path) -> str:
    """Return the name of a case in the output of pytest."""
    return f"{path.parent.name}-{path.name.removesuffix('.safetensors')}"


def make_pruned(path: Path, pruned: Path) -> dict[str, torch.Tensor]:
    """Write the pruned model that the released program started from, and return its linears."""
    shutil.copytree(path.parent / "dense", pruned)
    initial = load_file(path.parent / f"{path.name.split('.')[0]}.initial.safetensors")
    save_file(load_file(pruned / "model.safetensors") | initial, pruned / "model.safetensors", {"format": "pt"})
    return initial


def rebuild_as_released(path: Path, pruned: Path, out: Path) -> RunReport:
    """Rebuild with the granularity and the ratio that the name of a released file gives."""
    _, granularity, *ratio = path.name.removesuffix(".rebuilt.safetensors").split(".")
    return rebuild(
        RebuildConfig(
            dense=str(path.parent / "dense"), pruned=str(pruned), output=out, dtype="float32",
            granularity=GRANULARITIES[granularity], rebuild_ratio=float(".".join(ratio)),
            calibration=str(path.parent / "calibration.safetensors"),
        )
    )  # fmt: skip
