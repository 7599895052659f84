"""Hold pruned weights at zero while a model is trained, whatever optimiser trains it.

The gradient of a pruned weight is set to zero when it is accumulated, so that clipping, momentum and factored moments
see the gradient of the sparse model. The weight itself is set to zero after each step of each optimiser, so that steps
which do not go by the gradient alone (Muon, noise) leave it at zero, too. Masks take a byte a weight that is trained.
"""

import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from llm_barber.errors import SettingsError
from llm_barber.runtime.pruned_weights import SHARE, PrunedWeight, count_zeros, find_pruned, local_part

FLATTENED = (
    "use DistributedDataParallel or FSDP2, which keep parameters as they are (torch's fully_shard; in accelerate "
    "fsdp_version: 2)"
)


def hold_zeros(model: nn.Module, folder: str | Path | None = None, share: float = SHARE) -> "HeldZeros":
    """Hold a model's pruned weights at exactly zero while it is trained, until `remove()`.

    Call it before the first step of the optimiser, on a model whose weights are loaded: before or after it is moved,
    compiled, wrapped in DistributedDataParallel or sharded with `fully_shard`. A second call returns the same object.

    Held are the linears that the model's record, `barber.json`, has as pruned. Without a record, every matrix of which
    at least `share` is zero is held; embeddings and matrices of nothing but zeros are not. All weights that are zero at
    the call stay zero. `names` of the result lists the parameters.

    In a model of PEFT, the product of LoRA's matrices is also masked in the forward pass, so that training sees what
    `merge_adapter` will merge. A step then takes about as long as one that trains all weights.

    Args:
        model: a model of transformers or PEFT, or any module.
        folder: of the pruned checkpoint with its record; None: the folder from which transformers loaded the model.
        share: zeros of a pruned matrix, at least, where there is no record.

    Raises:
        ModelError: nothing is pruned, the record cannot be read, or the model lacks zeros that the record has.
        SettingsError: linears are packed or on `meta`; an adapter of a pruned linear cannot be masked.
    """
    model = unwrapped(model)
    held = _HELD.get(model)
    if held is not None:
        held._bind(model)
        return held
    held = HeldZeros(find_pruned(model, None if folder is None else Path(folder), share))
    try:
        held._bind(model)
    except BaseException:
        held.remove()
        raise
    _HELD[model] = held
    return held


def is_held(model: nn.Module) -> bool:
    """True for a model whose zeros are held."""
    return unwrapped(model) in _HELD


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of what `torch.compile` and data parallelism wrap around it."""
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


class HeldZeros:
    """The pruned weights that `hold_zeros` holds at zero, until `remove()` or the end of a `with` statement.

    `names`: the parameters, by their names in the model. `zeros`: number of weights that are held; `weights`: of all
    weights of these parameters. `apply()` sets the weights to zero: call it after a step that no PyTorch optimiser
    made.
    """

    def __init__(self, pruned: list[PrunedWeight]) -> None:
        self.names = tuple(weight.name for weight in pruned)
        self.zeros = sum(count_zeros(weight.parameter) for weight in pruned)
        self.weights = sum(weight.parameter.numel() for weight in pruned)
        self._weights = [HeldWeight(weight) for weight in pruned]
        self._adapters: Callable[[], None] | None = None
        handles = (
            register_optimizer_step_pre_hook(_weakly(self._before_step)),
            register_optimizer_step_post_hook(_weakly(self._after_step)),
        )
        self._finalizer = weakref.finalize(self, _remove_all, handles)

    def __repr__(self) -> str:
        return f"HeldZeros({self.zeros:,} of {self.weights:,} weights in {len(self.names)} parameters)"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _bind(self, model: nn.Module) -> None:
        """Find parameters and adapters that the model has got since the last call.

        `hold_zeros` and each step of an optimiser do so for parameters; adapters need a second `hold_zeros`.
        """
        for weight in self._weights:
            weight.bind()
        if "peft" in sys.modules:
            from llm_barber.runtime.masked_lora import mask_adapters

            modules = [module for weight in self._weights if (module := weight.module()) is not None]
            self._adapters = mask_adapters(model, modules)

    @torch.no_grad()
    def apply(self) -> None:
        """Set the pruned weights to zero now: after a step of what is no optimiser of PyTorch."""
        for weight in self._weights:
            weight.apply()

    def remove(self) -> None:
        """Hold nothing any more; a second call does nothing."""
        self._finalizer()
        for weight in self._weights:
            weight.remove()
        if self._adapters is not None:
            self._adapters()
            self._adapters = None
        for model in [model for model, held in _HELD.items() if held is self]:
            del _HELD[model]

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer) -> None:
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for weight in self._weights:
            weight.rebind(trained)

    def _after_step(self, optimizer: Optimizer) -> None:
        self.apply()


# By the model; the values refer to its modules weakly, so that a model that nothing uses any more is freed.
_HELD: "weakref.WeakKeyDictionary[nn.Module, HeldZeros]" = weakref.WeakKeyDictionary()


class HeldWeight:
    """A parameter whose zeros are held.

    `fully_shard` and others replace a module's parameters: the hooks belong to the newest one that an optimiser has.
    """

    def __init__(self, pruned: PrunedWeight) -> None:
        self.name = pruned.name
        self.module = weakref.ref(pruned.module)
        self._leaf = pruned.leaf
        self._shape = pruned.parameter.shape  # of all processes' parts together
        self._parameter: Callable[[], nn.Parameter | None] = lambda: None
        self._mask: Tensor | None = None  # bool, True is pruned; of this process's part if `_is_part`
        self._is_part = False
        self._hook: RemovableHandle | None = None

    def bind(self) -> None:
        """Make the mask of the module's parameter, and mask its gradients, if it takes any.

        Raises:
            SettingsError: a program has flattened the parameter.
        """
        module = self.module()
        parameter = None if module is None else module._parameters.get(self._leaf)
        if module is None or (parameter is not None and parameter is self._parameter()):
            return
        if parameter is None or parameter.shape != self._shape:
            shape = "gone" if parameter is None else f"of shape {tuple(parameter.shape)}, not {tuple(self._shape)}"
            raise SettingsError(f"{self.name} is {shape}: its zeros cannot be held in flattened parameters", FLATTENED)
        if not parameter.requires_grad:
            return  # nothing changes it; a mask would take memory for nothing
        self._mask = self._mask_of(parameter)
        self._is_part = hasattr(parameter, "to_local")
        if self._hook is not None:
            self._hook.remove()
        self._hook = parameter.register_post_accumulate_grad_hook(self._mask_gradient)  # type: ignore[no-untyped-call]
        self._parameter = weakref.ref(parameter)

    def rebind(self, trained: set[int]) -> None:
        """Bind the module's parameter if an optimiser is about to change it, and mask the gradient that it has.

        Args:
            trained: ids of the optimiser's parameters.
        """
        module, bound = self.module(), self._parameter()
        if module is None or (bound is not None and id(bound) in trained):
            return
        parameter = module._parameters.get(self._leaf)
        # A parameter that is gone was flattened, which `bind` refuses.
        if parameter is None or parameter.shape != self._shape or id(parameter) in trained:
            self.bind()
            if (parameter := self._parameter()) is not None:
                self._mask_gradient(parameter)

    def _mask_of(self, parameter: nn.Parameter) -> Tensor:
        """Mask of this process's part of a parameter: of the mask so far, if it is whole, or of its zeros."""
        if self._mask is None or self._is_part:
            return local_part(parameter) == 0
        if not hasattr(parameter, "to_local"):
            return self._mask
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(parameter, DTensor)
        mask = self._mask.to(parameter.device)
        part = distribute_tensor(mask, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
        return part.clone()  # otherwise it would keep the whole mask in memory

    @torch.no_grad()
    def _mask_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._fill(parameter.grad)

    def _fill(self, tensor: Tensor) -> None:
        """Set the pruned elements of a parameter or gradient to zero; NaN and Inf, too, which a product would keep."""
        if self._mask is None:
            return
        part = local_part(tensor)
        if part.shape != self._mask.shape:
            raise SettingsError(
                f"{self.name} has shape {tuple(part.shape)}, its mask {tuple(self._mask.shape)}: its zeros cannot be "
                "held in flattened parameters",
                FLATTENED,
            )
        if self._mask.device != part.device:
            self._mask = self._mask.to(part.device)
        part.masked_fill_(self._mask, 0)

    def apply(self) -> None:
        """Set the pruned weights to zero."""
        parameter = self._parameter()
        if parameter is not None and parameter.requires_grad:
            self._fill(parameter)

    def remove(self) -> None:
        """Take the hook away, and forget the mask."""
        if self._hook is not None:
            self._hook.remove()
        self._hook, self._mask, self._parameter = None, None, lambda: None


def _weakly(method: Callable[[Optimizer], None]) -> Callable[[Optimizer, Any, Any], None]:
    """A hook of all optimisers that does not keep the method's object alive."""
    reference = weakref.WeakMethod(method)

    def call(optimizer: Optimizer, arguments: Any, settings: Any) -> None:
        if (bound := reference()) is not None:
            bound(optimizer)

    return call


def _remove_all(handles: tuple[RemovableHandle, ...]) -> None:
    for handle in handles:
        handle.remove()
