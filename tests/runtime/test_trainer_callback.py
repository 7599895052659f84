"""transformers' Trainer with the callback: zeros hold after every step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from llm_barber import HoldZeros, hold_zeros
from llm_barber.errors import SettingsError
from llm_barber.runtime.held_zeros import is_held
from tests.helpers.trained import make_pruned, zeros_of


class Windows(Dataset):  # type: ignore[type-arg]
    """Random windows of text."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, 95, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


class Watch(TrainerCallback):
    """Notes where weights are zero after each step."""

    def __init__(self, names: Any) -> None:
        self.names, self.history = names, []

    def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
        self.history.append(zeros_of(model, self.names))


def arguments(folder: Path, optimizer: str, **settings: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder / "trainer"), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=3,
        learning_rate=0.01, weight_decay=0.1, optim=optimizer, use_cpu=True, report_to=[], save_strategy="no",
        disable_tqdm=True, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("optimizer", ["sgd", "adamw_torch", "adafactor"])
def test_zeros_hold_after_every_step(tmp_path: Path, optimizer: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_pruned(tmp_path))
    names = hold_zeros(model).names
    hold_zeros(model).remove()
    zeros, watch = zeros_of(model, names), Watch(names)
    before = {name: model.get_parameter(name).detach().clone() for name in names}
    settings = {"optim_args": "momentum=0.9"} if optimizer == "sgd" else {}
    Trainer(
        model,
        arguments(tmp_path, optimizer, **settings),
        train_dataset=Windows(),
        callbacks=[HoldZeros(), watch],
    ).train()
    assert len(watch.history) == 3
    assert all(torch.equal(after[name], zeros[name]) for after in watch.history for name in names)
    assert all(not torch.equal(model.get_parameter(name), before[name]) for name in names)
    assert not is_held(model)


def test_zeros_that_were_held_before_stay_held(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_pruned(tmp_path))
    held = hold_zeros(model)
    Trainer(model, arguments(tmp_path, "sgd"), train_dataset=Windows(), callbacks=[HoldZeros()]).train()
    assert is_held(model)
    assert hold_zeros(model) is held


def test_deepspeed_is_refused() -> None:
    class Arguments:
        deepspeed = "zero3.json"

    with pytest.raises(SettingsError, match="DeepSpeed trains copies"):
        HoldZeros().on_train_begin(Arguments(), None, None, model=torch.nn.Linear(2, 2))  # type: ignore[arg-type]
