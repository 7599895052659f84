"""`--format packed` writes the files that `pack` makes of a dense output."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llm_barber import InspectConfig, PackConfig, PruneConfig, inspect, pack, prune, unpack
from llm_barber.runtime.load import load
from tests.conftest import make_model, read_folder, save_tokens
from tests.helpers.runs import read_untimed_files, run, run_killed_at


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "dense", "llama", dtype=torch.bfloat16, num_hidden_layers=3)


def test_the_files_are_those_that_pack_makes_of_the_dense_output(tmp_path: Path, model: Path) -> None:
    tokens = save_tokens(tmp_path / "tokens.safetensors")
    settings: dict[str, Any] = {"model": model, "calibration": tokens, "pattern": "2:4", "dtype": "float32"}
    prune(PruneConfig(output=tmp_path / "plain", report=False, **settings))
    pack(PackConfig(model=str(tmp_path / "plain"), output=tmp_path / "packed"))
    prune(PruneConfig(output=tmp_path / "direct", report=False, format="packed", **settings))
    assert read_untimed_files(tmp_path / "packed") == read_untimed_files(tmp_path / "direct")
    assert "llm_barber.register()" in (tmp_path / "direct" / "README.md").read_text()
    assert inspect(InspectConfig(model=str(tmp_path / "direct"), dense=str(model))).problems == ()
    unpack(PackConfig(model=str(tmp_path / "direct"), output=tmp_path / "unpacked"))
    plain, unpacked = read_folder(tmp_path / "plain"), read_folder(tmp_path / "unpacked")
    assert all(torch.equal(plain[name], unpacked[name]) for name in plain)
    assert (
        inspect(InspectConfig(model=str(tmp_path / "unpacked"), dense=str(model))).problems == ()
    )  # files' digests, too
    ids = load_file(tokens)["input_ids"]
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "direct")(ids).logits, load(tmp_path / "plain")(ids).logits)


def test_a_run_killed_at_any_moment_goes_on_to_the_same_bytes(tmp_path: Path, model: Path) -> None:
    tokens = save_tokens(tmp_path / "tokens.safetensors")
    run(model, tmp_path / "whole", tokens, format="packed")
    kills = 0
    while run_killed_at(3 + 7 * kills, model, tmp_path / "out", tokens, format="packed", resume=True):
        kills += 1
        if (tmp_path / "out").exists():
            break
    assert kills > 3
    expected, resumed = read_untimed_files(tmp_path / "whole"), read_untimed_files(tmp_path / "out")
    assert {name: resumed[name] for name in expected} == expected
