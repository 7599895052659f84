"""Hold pruned weights at zero while a model is trained, whatever optimiser trains it.

The gradient of a pruned weight is set to zero when it is accumulated, so that clipping, momentum and factored moments
see the gradient of the sparse model. The weight itself is set to zero after each step of each optimiser, so that steps
which do not go by the gradient alone (Muon, noise) leave it at zero, too. Masks take a byte a weight that is trained.
"""

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llm_barber.errors import SettingsError
from llm_barber.runtime.pruned_weights import SHARE, PrunedWeight, count_zeros, find_pruned, local_part

ATTRIBUTE = "_llm_barber_held_zeros"  # of a model whose zeros are held


def hold_zeros(model: nn.Module, folder: str | Path | None = None, share: float = SHARE) -> "HeldZeros":
    """Hold a model's pruned weights at exactly zero while it is trained, until `remove()`.

    Call it before the first step of the optimiser, on a model whose weights are loaded: before or after it is moved,
    compiled, wrapped in DistributedDataParallel or sharded with `fully_shard`. A second call returns the same object.

    Every matrix of which at least `share` is zero is held; embeddings and matrices of nothing but zeros are not. If the
    model's record, `barber.json`, has linears with fewer pruned weights, these are held, too. All weights that are zero
    at the call stay zero. `names` of the result lists the parameters.

    In a model of PEFT, the product of LoRA's matrices is also masked in the forward pass, so that training sees what
    `merge_adapter` will merge. A step then takes about as long as one that trains all weights.

    Args:
        model: a model of transformers or PEFT, or any module.
        folder: of the pruned checkpoint with its record; None: the folder from which transformers loaded the model.
        share: zeros of a pruned matrix, at least.

    Raises:
        ModelError: nothing is pruned, the record cannot be read, or the model lacks zeros that the record has.
        SettingsError: linears are packed or on `meta`; an adapter of a pruned linear cannot be masked.
    """
    model = unwrapped(model)
    held: HeldZeros | None = getattr(model, ATTRIBUTE, None)
    if held is None:
        held = HeldZeros(model, find_pruned(model, None if folder is None else Path(folder), share))
    try:
        held._bind()
        held._mask_adapters()
    except BaseException:
        held.remove()
        raise
    return held


def is_held(model: nn.Module) -> bool:
    """True for a model whose zeros are held."""
    return getattr(unwrapped(model), ATTRIBUTE, None) is not None


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of what `torch.compile` and data parallelism wrap around it."""
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


@dataclass
class _Mask:
    """What is held of a parameter: `pruned`, bool, True where this process's part of it stays zero."""

    parameter: nn.Parameter
    pruned: Tensor
    hook: RemovableHandle | None = None

    @torch.no_grad()
    def fill(self, tensor: Tensor | None) -> None:
        """Set the pruned elements of the parameter or its gradient to zero, NaN and Inf among them."""
        if tensor is not None:
            part = local_part(tensor)
            self.pruned = self.pruned.to(part.device)
            part.masked_fill_(self.pruned, 0)


class HeldZeros:
    """The pruned weights that `hold_zeros` holds at zero, until `remove()` or the end of a `with` statement.

    `names`: the parameters, by their names in the model. `zeros`: number of weights that are held; `weights`: of all
    weights of these parameters. `apply()` sets the weights to zero: call it after a step that no PyTorch optimiser
    made. The model has it as an attribute; a copy of the model has nothing there.
    """

    def __init__(self, model: nn.Module, pruned: list[PrunedWeight]) -> None:
        self.names = tuple(weight.name for weight in pruned)
        self.zeros = sum(count_zeros(weight.parameter) for weight in pruned if weight.parameter is not None)
        self.weights = sum(weight.shape.numel() for weight in pruned)
        self._model, self._pruned = weakref.ref(model), pruned
        self._masks: dict[str, _Mask] = {}
        self._undo_adapters: Callable[[], None] | None = None
        self._hooks = (
            register_optimizer_step_pre_hook(_weakly(self._bind)),
            register_optimizer_step_post_hook(_weakly(self.apply)),
        )
        for hook in self._hooks:
            weakref.finalize(self, hook.remove)
        model.__dict__[ATTRIBUTE] = self

    def __repr__(self) -> str:
        return f"HeldZeros({self.zeros:,} of {self.weights:,} weights in {len(self.names)} parameters)"

    def __reduce__(self) -> tuple[Any, ...]:
        """Nothing, in a copy of the model or in its file."""
        return type(None), ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _bind(self) -> None:
        """Mask the parameters that take gradients; also those that took the place of others, as `fully_shard` does.

        Raises:
            SettingsError: a program has flattened a parameter.
        """
        for weight in self._pruned:
            parameter, mask = weight.parameter, self._masks.get(weight.name)
            if mask is not None and mask.parameter is parameter:
                continue
            if parameter is None or parameter.shape != weight.shape:
                raise SettingsError(
                    f"{weight.name} is gone, or has another shape: zeros cannot be held in flattened parameters",
                    "use DistributedDataParallel or FSDP2, which keep parameters as they are (torch's fully_shard; in "
                    "accelerate fsdp_version: 2)",
                )
            if parameter.requires_grad:  # nothing changes others, for which a mask would take memory
                if mask is not None and mask.hook is not None:
                    mask.hook.remove()
                mask = self._masks[weight.name] = _Mask(parameter, local_part(parameter) == 0)
                mask.fill(parameter.grad)  # it may have been accumulated before the hook was there
                mask.hook = parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    lambda changed, mask=mask: mask.fill(changed.grad)
                )

    def _mask_adapters(self) -> None:
        """Mask the adapters of the pruned linears; adapters that are added later need a second `hold_zeros`."""
        if "peft" in sys.modules and (model := self._model()) is not None:
            from llm_barber.runtime.masked_lora import mask_adapters

            self._undo_adapters = mask_adapters(model, [weight.module for weight in self._pruned])

    def apply(self) -> None:
        """Set the pruned weights to zero now: after a step of what is no optimiser of PyTorch."""
        for mask in self._masks.values():
            mask.fill(mask.parameter)

    def remove(self) -> None:
        """Hold nothing any more; a second call does nothing."""
        for hook in (*self._hooks, *(mask.hook for mask in self._masks.values())):
            if hook is not None:
                hook.remove()
        self._masks.clear()
        if self._undo_adapters is not None:
            self._undo_adapters()
            self._undo_adapters = None
        if (model := self._model()) is not None:
            model.__dict__.pop(ATTRIBUTE, None)


def _weakly(method: Callable[[], None]) -> Callable[[Any, Any, Any], None]:
    """A hook of all optimisers that does not keep the method's object alive."""
    reference = weakref.WeakMethod(method)

    def call(*_: Any) -> None:
        if (bound := reference()) is not None:
            bound()

    return call


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
