"""Choose which linears stay packed in memory: all, those that the caller names, or those that are faster packed.

`keep_packed="auto"` times each shape of linear on this machine, packed and dense, while the model is loaded: with one
row of inputs, as when one sequence is decoded, and with `PROMPT` rows, as when a prompt is read. Times are weighted as
in a conversation of `PROMPT` tokens of prompt and `NEW` new tokens. Decoding then counts most: each new token reads
every weight once, and the whole prompt does so once, too.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from llm_barber import native
from llm_barber.checkpoint.encoding import Packed, pack, unpack
from llm_barber.checkpoint.rounding import Rounded, pack_rounded, unpack_rounded
from llm_barber.errors import SettingsError
from llm_barber.native import Instructions
from llm_barber.runtime.packed_linear import PackedLinear
from llm_barber.runtime.products import SHARED_ROWS

CPU = torch.device("cpu")
KeepPacked = bool | Literal["auto"] | Mapping[str, bool]

PROMPT, NEW = 256, 256  # tokens of the conversation
GAIN = 0.97  # packed weights must take at most this share of the dense time, so that noise does not decide
SECONDS = 0.04  # of one weight's rounds; the last round may go on beyond them
ROUNDS = 20
TIMED_ROWS = 64  # of a prompt
TIMED_WEIGHTS = 1 << 22  # larger weights are timed by their first rows
CACHED_BYTES = 1 << 22  # more than a core's own cache: what was in it must be read again

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Times:
    """Seconds of a linear's products: with one row of inputs, and with `PROMPT` rows."""

    decode: float
    prefill: float

    @property
    def conversation(self) -> float:
        """Seconds in a conversation of `PROMPT` and `NEW` tokens."""
        return self.prefill + NEW * self.decode


def is_faster(packed: Times, dense: Times, weighted: bool) -> bool:
    """Test whether a linear is faster packed than dense.

    Example: packed 1 ms and 300 ms, dense 2 ms and 200 ms -> weighted: 556 ms against 712 ms, True; not weighted: the
    prompt is slower, False.

    Args:
        packed: the linear's times with the weight packed.
        dense: the same with the weight dense.
        weighted: compare the conversation; otherwise neither decoding nor the prompt may be slower packed.
    """
    if packed.conversation > GAIN * dense.conversation:
        return False
    return weighted or (packed.decode <= dense.decode and packed.prefill <= dense.prefill)


class Choice:
    """The choice of the linears that stay packed.

    Attributes:
        decisions: by the linear's name in the model; filled while weights are loaded. As `keep_packed` of another
            `load` it repeats the choice.

    Args:
        keep_packed: all linears where that saves memory; none; "auto"; or a decision for each name, where linears that
            are not named are dense.
        names: linears that may be packed.
        device: of the model.
        measure: times of a weight, packed and dense; None: `measure_times`.
        dtype: in which the model computes; None: that of each weight.

    Raises:
        SettingsError: `keep_packed` is none of these, or names a linear that is not in the model; "auto" elsewhere than
            on the CPU.
    """

    def __init__(
        self,
        keep_packed: KeepPacked,
        names: Iterable[str],
        device: torch.device = CPU,
        measure: Callable[[Packed | Rounded], tuple[Times, Times]] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check(keep_packed, device)
        self.decisions: dict[str, bool] = dict.fromkeys(names, False)
        self._keep_packed = keep_packed
        self._measure = measure or self._measure_here
        self._dtype = dtype
        self._timed: dict[tuple[tuple[int, int], torch.dtype], bool] = {}  # by shape and dtype of values: packed?
        if isinstance(keep_packed, Mapping):
            self._check_names(keep_packed)

    @property
    def is_timed(self) -> bool:
        """True if products are timed before it is known which weights stay packed."""
        return self._keep_packed == "auto"

    def reads_packed(self, name: str) -> bool:
        """Test whether the weight of a linear is read as it is packed: it may stay so."""
        if isinstance(self._keep_packed, Mapping):
            return self._keep_packed.get(name, False)
        return bool(self._keep_packed) and name in self.decisions

    def decide(self, name: str, weight: Packed | Rounded | Tensor) -> Packed | Rounded | Tensor:
        """Decide on a weight that `reads_packed` names, and write the decision down.

        Args:
            name: of the linear.
            weight: packed; or dense, where packing saves nothing.

        Returns:
            the weight as the linear is to have it.

        Raises:
            SettingsError: the caller wants a weight packed that cannot be.
        """
        if isinstance(weight, Tensor):
            if isinstance(self._keep_packed, Mapping):
                raise SettingsError(
                    f"keep_packed: packing {name} saves nothing",
                    "give False for it, or the choice that was made for this checkpoint and dtype",
                )
            return weight
        self.decisions[name] = not self.is_timed or self._is_faster(weight)
        return weight if self.decisions[name] else _unpacked(weight)

    def report(self) -> None:
        """Log how many linears are packed."""
        if self._keep_packed is not False:
            packed = sum(self.decisions.values())
            logger.info("keep_packed: %d linears packed, %d dense", packed, len(self.decisions) - packed)

    def _measure_here(self, weight: Packed | Rounded) -> tuple[Times, Times]:
        """Measure times; a weight with rounded values does not say in which dtype the model computes."""
        return measure_times(weight) if isinstance(weight, Packed) else measure_times(weight, self._dtype)

    def _is_faster(self, weight: Packed | Rounded) -> bool:
        """Time a weight, unless a weight of this shape was timed already."""
        shape = weight.shape, weight.values.dtype
        if shape not in self._timed:
            packed, dense = self._measure(weight)
            faster = is_faster(packed, dense, native.instructions() > Instructions.AVX2)
            logger.info(
                "keep_packed: %d × %d: packed takes %.2f of the dense time in decoding, %.2f in reading a prompt: %s",
                *(*weight.shape, packed.decode / dense.decode, packed.prefill / dense.prefill),
                "packed" if faster else "dense",
            )
            self._timed[shape] = faster
        return self._timed[shape]

    def _check_names(self, decisions: Mapping[str, bool]) -> None:
        unknown = [name for name in decisions if name not in self.decisions]
        if unknown:
            raise SettingsError(
                f"keep_packed: no linear that can be packed is called {unknown[0]}",
                f"names are those of model.keep_packed, such as {next(iter(self.decisions), 'none here')}",
            )


def check(keep_packed: KeepPacked, device: torch.device) -> None:
    """Refuse a value that `keep_packed` cannot have.

    Raises:
        SettingsError: see `Choice`.
    """
    hint = "give True, False, 'auto', or the model.keep_packed of an earlier load"
    if isinstance(keep_packed, Mapping):
        for name, decision in keep_packed.items():
            if not isinstance(decision, bool):
                shown = f"keep_packed: {name!r} is {decision!r}, not True or False"
                raise SettingsError(shown, hint)
    elif not isinstance(keep_packed, bool) and keep_packed != "auto":
        raise SettingsError(f"keep_packed cannot be {keep_packed!r}", hint)
    if keep_packed == "auto" and device.type != "cpu":
        raise SettingsError(
            f"keep_packed auto times products on the CPU, not on {device}",
            "give keep_packed=True or False there",
        )


def _unpacked(weight: Packed | Rounded) -> Tensor:
    return unpack(weight) if isinstance(weight, Packed) else unpack_rounded(weight)


def measure_times(weight: Packed | Rounded, dtype: torch.dtype | None = None) -> tuple[Times, Times]:
    """Times of a weight on this machine, packed and dense: the fastest of some rounds, in turn.

    Args:
        weight: of a linear; the first rows stand for a large one.
        dtype: of inputs and of the dense weight, if the weight's values are rounded; None: the weight's.
    """
    dense_weight = _unpacked(weight)[: max(1, TIMED_WEIGHTS // (weight.shape[1] * SHARED_ROWS)) * SHARED_ROWS]
    part: Packed | Rounded | None = weight
    if len(dense_weight) < weight.shape[0]:
        part = pack(dense_weight) if isinstance(weight, Packed) else pack_rounded(dense_weight, weight.group)
    if part is None:  # only the other rows have zeros
        return Times(1, 1), Times(1, 1)
    packed = PackedLinear(part, None, dtype)
    dense_weight = dense_weight.to(packed.dtype)
    seconds = [[float("inf")] * 2 for _ in range(2)]
    linears: list[Callable[[Tensor], Tensor]] = [packed, lambda rows: nn.functional.linear(rows, dense_weight)]
    prompt = torch.ones(TIMED_ROWS, weight.shape[1], dtype=dense_weight.dtype)
    inputs, cached = (prompt[:1], prompt), torch.zeros(CACHED_BYTES // 4)
    start = time.perf_counter()
    with torch.no_grad():
        for number in range(ROUNDS):
            for kind, rows in enumerate(inputs):  # 0: decoding; 1: reading a prompt
                for side, linear in enumerate(linears):
                    cached.add_(1)  # in a model the weight is not in the cache: other weights were read since
                    before = time.perf_counter()
                    linear(rows)
                    seconds[side][kind] = min(seconds[side][kind], time.perf_counter() - before)
            if number and time.perf_counter() - start > SECONDS:  # the first round prepares, and touches new memory
                break
    # The dense time grows with the rows. Unpacking the weight is taken to cost the same for any number of rows.
    more = (PROMPT / TIMED_ROWS - 1) * seconds[1][1]
    return Times(seconds[0][0], seconds[0][1] + more), Times(seconds[1][0], seconds[1][1] + more)
