"""Find the weights of a model that a run pruned, by their zeros."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from llm_barber.checkpoint.companions import RECORD_NAME
from llm_barber.errors import ModelError, SettingsError
from llm_barber.record.file import read_record
from llm_barber.runtime.packed_linear import PackedLinear

SHARE = 0.1  # zeros of a pruned matrix, at least; dense models that were quantised once have up to 6 % by nature


@dataclass(frozen=True)
class PrunedWeight:
    """A parameter with pruned weights: its name in the model, its module, its name there, and its whole shape."""

    name: str
    module: nn.Module
    leaf: str
    shape: torch.Size

    @property
    def parameter(self) -> nn.Parameter | None:
        """The parameter that the module has now; None: a program has taken it away."""
        return self.module._parameters.get(self.leaf)


def find_pruned(model: nn.Module, folder: Path | None, share: float) -> list[PrunedWeight]:
    """Find the parameters of a model that have pruned weights, matrices and stacks of experts' matrices.

    They are the matrices with at least `share` zeros, except embeddings, matrices that share an embedding's weights and
    matrices of nothing but zeros. If the record of `folder` has linears with fewer, theirs is the share.

    Raises:
        SettingsError: linears are packed or on `meta`; `share` is not above 0 and at most 1.
        ModelError: nothing is pruned, the record cannot be read, or the model has fewer zeros than the run made.
    """
    if not 0 < share <= 1:
        raise SettingsError(f"share is {share}: it must be above 0 and at most 1", "leave it out: it is 0.1 then")
    _refuse_untrainable(model)
    folder = folder or _loaded_from(model)
    record = None if folder is None else read_record(folder)
    if folder is not None and record is None:
        raise ModelError(
            f"{folder} has no {RECORD_NAME}", "leave the folder out: matrices with zeros are found without a record"
        )
    if record is not None:
        shares = [linear.pruned / (linear.shape[0] * linear.shape[1]) for linear in record.linears if linear.pruned]
        share = min([share, *shares])
    zeros = {weight: count_zeros(parameter) for weight, parameter in _matrices(model)}
    pruned = [weight for weight, count in zeros.items() if share <= count / max(1, weight.shape.numel()) < 1]
    if not pruned:
        raise ModelError(
            f"no matrix of the model has {share:.0%} zeros, so that there is nothing to hold",
            "load the pruned checkpoint, not the dense one; a lower share finds matrices with fewer zeros",
        )
    present = sum(zeros[weight] for weight in pruned)
    if record is not None and present < record.pruned:
        raise ModelError(
            f"the model has {present:,} zeros, and the run of {folder} pruned {record.pruned:,} weights",
            "load the weights of that folder; zeros that training has filled do not come back",
        )
    return pruned


def _refuse_untrainable(model: nn.Module) -> None:
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise SettingsError(
            "the model's linears are packed in memory, and packed weights are not trained",
            "load it without keep_packed, or call model.dequantize() first",
        )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise SettingsError(
                f"{name} is on the meta device, so that its zeros are not known",
                "load the weights before holding zeros",
            )
        if type(parameter.data) is not Tensor and not hasattr(parameter, "to_local"):
            raise SettingsError(
                f"{name} is stored as {type(parameter.data).__name__}, which is not trained",
                "load the model dense: without semi_structured, and not quantised",
            )


def _loaded_from(model: nn.Module) -> Path | None:
    """The folder with a record from which transformers loaded the model; None: another place, or no record."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return Path(name) if name and (Path(name) / RECORD_NAME).is_file() else None


def _matrices(model: nn.Module) -> Iterator[tuple[PrunedWeight, nn.Parameter]]:
    """The floating-point matrices and stacks of matrices of a model, each once, without embeddings.

    Biases of stacked experts have two dimensions, too.
    """
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    seen = {id(parameter) for module in embeddings for parameter in module.parameters(recurse=False)}
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            is_matrix = parameter.dim() in (2, 3) and not leaf.endswith("bias") and parameter.is_floating_point()
            if is_matrix and id(parameter) not in seen:
                seen.add(id(parameter))  # a parameter that modules share is found once
                yield PrunedWeight(f"{path}.{leaf}".removeprefix("."), module, leaf, parameter.shape), parameter


def local_part(tensor: Tensor) -> Tensor:
    """The elements that this process has, without their gradient; of an ordinary tensor all of them."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def count_zeros(tensor: Tensor) -> int:
    """Number of zeros of a tensor, over all processes that share it: each of them must call this."""
    zeros = (tensor.detach() == 0).sum()
    return int(zeros.full_tensor() if hasattr(zeros, "full_tensor") else zeros)
