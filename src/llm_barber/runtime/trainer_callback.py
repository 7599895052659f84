"""Hold zeros while transformers' Trainer trains: a callback."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llm_barber.errors import SettingsError
from llm_barber.runtime.held_zeros import HeldZeros, hold_zeros, is_held
from llm_barber.runtime.pruned_weights import SHARE


class HoldZeros(TrainerCallback):  # type: ignore[misc]
    """A callback of transformers' Trainer that holds pruned weights at zero: `Trainer(…, callbacks=[HoldZeros()])`.

    It calls `hold_zeros` when the training begins, on the model as Trainer has moved or sharded it, and lets go when
    the training ends.

    Args:
        folder: as of `hold_zeros`.
        share: as of `hold_zeros`.

    Raises:
        SettingsError: when the training begins, as `hold_zeros`; also for DeepSpeed, which trains copies of its own.
        ModelError: when the training begins, as `hold_zeros`.
    """

    def __init__(self, folder: str | Path | None = None, share: float = SHARE) -> None:
        self.folder = folder
        self.share = share
        self.held: HeldZeros | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **settings: Any
    ) -> None:
        """Hold the zeros of Trainer's model."""
        if getattr(args, "deepspeed", None):
            raise SettingsError(
                "DeepSpeed trains copies of the weights, whose zeros are not held",
                "use DistributedDataParallel or FSDP2: accelerate with fsdp_version: 2",
            )
        before = is_held(settings["model"])
        held = hold_zeros(settings["model"], self.folder, self.share)
        self.held = None if before else held

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **settings: Any
    ) -> None:
        """Let go, unless the zeros were held before the training."""
        if self.held is not None:
            self.held.remove()
            self.held = None
