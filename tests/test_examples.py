"""The examples run, on tiny models."""

import re
from pathlib import Path

import pytest

from llm_barber import InspectConfig, inspect
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
