"""The examples run, on tiny models."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llm_barber import InspectConfig, PruneConfig, inspect, prune
from tests.conftest import make_model, read_folder, save_tokens
from tests.helpers.forked import ForkedProgram, run_script
from tests.helpers.pages import ROOT
from tests.helpers.trained import make_pruned

EXAMPLE = ROOT / "examples" / "finetune.py"
TEXT = "the quick brown fox jumps over the lazy dog. " * 40


@pytest.mark.parametrize("lora", [False, True])
def test_finetune(tmp_path: Path, lora: bool) -> None:
    if lora:
        pytest.importorskip("peft")
    pruned, dense, out = make_pruned(tmp_path, tokenizer=True), tmp_path / "dense", tmp_path / "out"
    (tmp_path / "text.txt").write_text(TEXT)
    options = ["--steps", "20", "--batch", "2", "--seqlen", "32", "--rate", "1e-2", "--windows", "4"]
    arguments = [str(pruned), str(dense), str(tmp_path / "text.txt"), str(out), *options]
    arguments += ["--held-out", str(tmp_path / "text.txt"), *(["--lora", "8"] if lora else [])]
    done = ForkedProgram(lambda: run_script(EXAMPLE, arguments), tmp_path, {"CUDA_VISIBLE_DEVICES": ""})
    assert done.wait() == 0, done.stderr[-3000:]
    rows = {
        row[0]: (float(row[1]), float(row[2])) for row in re.findall(r"^(\w+) +([\d.]+) +([\d.]+)$", done.stdout, re.M)
    }
    assert rows.keys() == {"before", "after", "dense"}
    assert rows["after"][1] < 0.8 * rows["before"][1]
    result = inspect(InspectConfig(model=str(out), dense=str(dense)))
    assert result.problems == ()
    assert result.sparsity == 0.5


def test_barber_finds_the_masks_of_preset_paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    import barber

    make_model(tmp_path / "dense", "llama")
    tokens = save_tokens(tmp_path / "tokens.safetensors", sequences=6)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    masks = barber.prune(model, load_file(tokens)["input_ids"], 0.5, 0.3)
    config = PruneConfig(
        model=tmp_path / "dense", output=tmp_path / "out", preset="paper", dtype="float32", calibration=tokens,
        rebuild_ratio=0.3,
    )  # fmt: skip
    assert prune(config).swapped > 0
    pruned = read_folder(tmp_path / "out")
    assert len(masks) == 14
    for name, mask in masks.items():
        assert torch.equal(mask, pruned[f"{name}.weight"] != 0), name
        assert torch.equal(model.get_submodule(name).weight, pruned[f"{name}.weight"])
