"""Every step works on a device that is not the CPU (`tests/helpers/pretend_gpu.py`), with the tensors of the CPU."""

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

PASSES = 2  # of tuning: more of them do the same again
TUNED = {"preset": "mask", "tune_passes": PASSES, "tune_windows": 4}
SETTINGS: tuple[dict[str, Any], ...] = (
    {"initial": "magnitude"},
    {"initial": "sparsegpt", "keep_updates": True},
    {"initial": "wanda", "rebuild_ratio": 0.5, "prune_head": True},
    {"initial": "ria", "pattern": "2:4", "sparsity": None, "format": "packed", "reorder": True},
    {"initial": "dsnot", "rebuild": False},
    {"initial": "alps", "rebuild": False},
    TUNED,
    {"preset": "mask", "allocation": "owl", "refine": "swaps", "reconstruct": "least-squares"},
    {**TUNED, "interrupted": True},
    {"initial": "wanda", "rebuild_ratio": 0.5, "room": 20_000},
    {**TUNED, "room": 10**9},
    {"preset": "mask", "allocation": "owl", "refine": "swaps", "reconstruct": "least-squares", "room": 60_000},
)
# Weights as (in, out); experts, apart and stacked; state spaces; positions by ALiBi; complex rotations;
# norms at the ends of blocks.
FAMILIES = ("gpt2", "mixtral", "gpt_oss", "jamba", "falcon-rw", "deepseek_v2", "gemma2", "gpt_neox")


def results(*settings: dict[str, Any]) -> list[Any]:
    """Results of one process for all settings: starting it takes longer than most of these runs."""
    command = [sys.executable, "-m", "tests.helpers.pretend_gpu", *map(json.dumps, settings)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert not process.returncode, process.stderr[-3000:]
    return [json.loads(line) for line in process.stdout.splitlines()]


@pytest.mark.timeout(300)
def test_every_method_and_kind_of_model_gives_the_same_tensors(tmp_path: Path, llama: Path, tokens: Path) -> None:
    common = {"calibration": str(tokens), "dtype": "float32", "batch_size": 2}
    runs = [common | {"model": str(llama)} | settings for settings in SETTINGS]
    for family in FAMILIES:
        model = make_model(tmp_path / family, family)
        runs.append({**common, "model": str(model), "preset": "paper", "rebuild_ratio": 0.5})
    tuned = {**common, "model": str(llama), **TUNED, "preset": "best"}
    *same, measures, tuned_difference = results(*runs, measured(tmp_path, llama), tuned)
    assert same == [0.0] * len(runs)
    assert measures == 0.0
    assert tuned_difference < 1e-4  # autograd adds up in another order on another device


def measured(folder: Path, dense: Path) -> dict[str, Any]:
    """Settings of `evaluate` with another model against the dense one."""
    other = make_model(folder / "other", "llama", seed=1)
    for model in (dense, other):
        add_tokenizer(model)
    (folder / "text.txt").write_text("ab cd " * 200)
    model = {"model": str(other), "against": str(dense), "dtype": "float32", "batch_size": 2}
    return {**model, "text": [str(folder / "text.txt")], "windows": 4, "seqlen": 24}


# Most waits of each line of the program, in a run with 8 windows, 2 layers and 14 linears.
WAITS: dict[str, dict[str, int]] = json.loads((Path(__file__).parent / "data" / "waits.json").read_text())
CHECK_FINITE = "model/gradients.py: if not finite.all():"
BREAK_TIES = (
    "masking/selection.py: tied: list[bool] = torch.stack([members.surplus.any() for members in marked]).tolist() "
    "if marked else []"
)


@pytest.mark.timeout(300)
def test_the_device_is_waited_for_as_seldom_as_can_be(tmp_path: Path, llama: Path, tokens: Path) -> None:
    """A step of tuning waits twice: for gradients that are not finite, and for ties; never for a sequence or a linear.

    More windows are more steps of tuning, batches to embed, and windows of the allocation's loss; nothing else.
    """
    common = {"model": str(llama), "dtype": "float32", "batch_size": 2}
    step = {**common, **TUNED, "calibration": str(tokens), "guard": 0, "counted": "step"}
    presets = {"paper": {"preset": "paper"}, "mask": {**TUNED, "guard": 0}, "held out": {**TUNED, "guard": 0.25}}
    texts = [save_tokens(tmp_path / f"{windows}.safetensors", sequences=windows) for windows in (8, 16)]
    runs = [
        {**common, **preset, "calibration": str(text), "counted": "run"}
        for preset in presets.values()
        for text in texts
    ]
    in_a_step, *in_runs = (Counter(waits) for waits in results(step, *runs))
    assert in_a_step == {CHECK_FINITE: 1, BREAK_TIES: 1}
    layers, steps = 2, 2  # a step has four windows
    embedded = {  # for the copy of token ids
        "model/stepping.py: model.base_model(input_ids=tokens, use_cache=False, **inputs)": 4,
        "model/skeleton.py: tokens = tokens.to(self.device)": 4,
    }
    # Of the allocation: token ids, and layers' inputs, which lie in host memory that is not pinned.
    copied = {
        "method/allocation.py: following = tokens[:, 1:].to(hidden.device)": 4,
        "method/allocation.py: gradients[number] = loss_gradients(layer, hidden.to(streams.device), gradients[number], "
        "sums)": 8,
    }
    lost = {"model/skeleton.py: logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits": 8} | copied
    tuned = {CHECK_FINITE: layers * PASSES * steps, BREAK_TIES: layers * PASSES * steps}
    held_out = {CHECK_FINITE: layers * PASSES, BREAK_TIES: layers * PASSES}  # 6 and 12 windows make 2 and 3 steps
    added = [dict(more - fewer) for fewer, more in zip(in_runs[::2], in_runs[1::2], strict=True)]
    assert added == [embedded, embedded | lost | tuned, embedded | lost | held_out]
    # Whoever adds a line that waits, or changes one, changes its budget.
    for name, waits in zip(presets, in_runs[::2], strict=True):
        beyond = {line: count for line, count in waits.items() if count > WAITS[name].get(line, 0)}
        assert not beyond, f"{name}: {beyond}, of {dict(waits)}"
