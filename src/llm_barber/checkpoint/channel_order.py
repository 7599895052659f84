"""The order of a checkpoint's channels: `channel-order.json` says where each channel of the dense model went.

Pruning to N:M may reorder channels inside blocks (`masking/channel_order.py`), which changes no output of the model.
Whoever compares the checkpoint with its dense model reorders the dense model's tensors first.
"""

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from llm_barber.checkpoint.locations import TensorInfo
from llm_barber.checkpoint.untrusted import check_regular, parse_json
from llm_barber.errors import ModelError

ORDER_NAME = "channel-order.json"
HINT = "get the checkpoint again"


class Reordered(BaseModel):
    """Tensors whose channels were reordered together.

    `tensors`: the dimension that holds the channels, by the checkpoint's names. `order`: place i takes the dense
    model's channel `order[i]`.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    tensors: dict[str, Annotated[int, Field(ge=0)]] = Field(min_length=1)
    order: tuple[int, ...]

    @model_validator(mode="after")
    def _is_a_permutation(self) -> Self:
        if sorted(self.order) != list(range(len(self.order))):
            raise ValueError(f"the order of {next(iter(self.tensors))} is no permutation")
        return self


class ChannelOrder(BaseModel):
    """All channels of a checkpoint that are not where the dense model has them; each tensor is named once."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    version: Literal[1] = 1
    reordered: tuple[Reordered, ...]

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        if len(self._by_name) < sum(len(part.tensors) for part in self.reordered):
            raise ValueError("a tensor is reordered twice")
        return self

    @cached_property
    def _by_name(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        return {name: (dim, part.order) for part in self.reordered for name, dim in part.tensors.items()}

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """Reorder a tensor of the dense model, by its name in the checkpoint; others come back as they are."""
        if name not in self._by_name:
            return tensor
        dim, order = self._by_name[name]
        return tensor.index_select(dim, torch.tensor(order, device=tensor.device))

    def check(self, tensors: Mapping[str, TensorInfo], model: str) -> None:
        """Refuse an order of other tensors than a model's.

        Raises:
            ModelError: a tensor is missing, or has another number of channels.
        """
        for name, (dim, order) in self._by_name.items():
            shape = tensors[name].shape if name in tensors else ()
            if dim >= len(shape) or shape[dim] != len(order):
                raise ModelError(
                    f"{model} has no {name} with {len(order)} channels in dimension {dim}, which {ORDER_NAME} reorders",
                    "give the dense model that was pruned",
                )

    def to_json(self) -> bytes:
        """Content of the file; the same for the same order."""
        return json.dumps(self.model_dump(mode="json"), separators=(",", ":")).encode() + b"\n"

    @classmethod
    def from_json(cls, content: bytes, path: Path = Path(ORDER_NAME)) -> Self:
        """Read the content of a file; `path` is for the message.

        Raises:
            ModelError: it is damaged, or of another version of the program.
        """
        try:
            parse_json(content)
            return cls.model_validate_json(content)
        except ValidationError as error:
            problem = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ModelError(f"{path} is damaged: {problem}", HINT) from error
        except ValueError as error:
            raise ModelError(f"{path} is damaged: {error}", HINT) from error


def read_order(folder: Path) -> ChannelOrder | None:
    """The order of a checkpoint's channels; None: they are where the dense model has them.

    Raises:
        ModelError: the file is damaged or cannot be read.
    """
    path = folder / ORDER_NAME
    if not path.exists():
        return None
    check_regular(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error}", HINT) from error
    return ChannelOrder.from_json(content, path)
