"""The settings of a run, resolved to the numbers that its costs depend on beside the model's shapes."""

import math
from dataclasses import dataclass, replace

import torch

from llm_barber.masking.granularity import Granularity
from llm_barber.masking.pattern import NofM, group_pattern
from llm_barber.method.allocation import loss_windows
from llm_barber.method.refine_linear import swap_stages
from llm_barber.parallel.ranks import Ranks
from llm_barber.settings.initial import Initial, rebuild_defaults
from llm_barber.settings.presets import Allocation
from llm_barber.settings.prune import PruneConfig
from llm_barber.settings.refining import RefineSettings

# Counted in runs with the models of benchmarks/plan_accuracy.py: swaps of a row that gain, as a share of its weights,
# and swaps that a round makes after its first.
USEFUL_SWAPS, SWAPS_OF_A_ROUND = 1 / 16, 14


@dataclass(frozen=True)
class Recipe:
    """A run's settings as numbers.

    `batch`: sequences computed together. `itemsize`: bytes of a number in the compute dtype; `stored`: in the
    checkpoint. `on_cpu`: host and device memory are the same. `refine`: None: no refining. `repeatable`: no layer
    waits until the previous layer's output is durable. `reorders`: channels are reordered first. `processes` share the
    sequences.
    `room`: bytes of the device's memory that calibration activations may take. `activation_memory`: the same of the
    host's memory; None: any number. Further activations are files.
    """

    sequences: int
    tokens: int
    batch: int
    itemsize: int
    stored: int
    on_cpu: bool
    method: Initial
    pattern: NofM | None
    allocation: Allocation
    granularity: Granularity | None  # of the rebuild; None: no rebuild
    refine: RefineSettings | None
    prunes_head: bool = False
    repeatable: bool = True
    reorders: bool = False
    processes: int = 1
    room: int = 0
    activation_memory: int | None = None
    initial_granularity: Granularity | None = None  # None: the method's released program's

    @classmethod
    def of(
        cls, config: PruneConfig, batch: int, dtype: torch.dtype, stored: torch.dtype, device: torch.device
    ) -> "Recipe":
        """Resolve the settings of a run of `prune`."""
        pattern = group_pattern(config.target)
        granularity, _ = rebuild_defaults(config.method, config.granularity, config.rebuild_ratio, config.target)
        return cls(
            sequences=config.samples,
            tokens=config.seqlen,
            batch=batch,
            itemsize=dtype.itemsize,
            stored=stored.itemsize,
            on_cpu=device.type == "cpu",
            method=config.method,
            pattern=pattern,
            allocation=config.allocated_by,
            granularity=granularity if config.rebuilds else None,
            refine=RefineSettings.of(config, config.target, config.samples, config.seqlen),
            prunes_head=config.prune_head,
            repeatable=config.runs_what_it_writes,
            reorders=config.reorders,
            initial_granularity=config.initial_granularity,
        )

    def among(self, processes: int) -> "Recipe":
        """The same run in a number of processes."""
        return replace(self, processes=processes)

    @property
    def ranks_linears(self) -> bool:
        """True if the weights of a whole linear compete for the initial mask."""
        if self.initial_granularity is None:
            return self.method.compares_in_linear
        return self.initial_granularity is Granularity.LINEAR

    @property
    def local_sequences(self) -> int:
        """Calibration sequences of the process that has the most."""
        return math.ceil(self.sequences / self.processes)

    @property
    def local_tokens(self) -> int:
        """Calibration tokens of the process that has the most."""
        return self.local_sequences * self.tokens

    @property
    def all_tokens(self) -> int:
        """Calibration tokens of all processes."""
        return self.sequences * self.tokens

    @property
    def held_out(self) -> int:
        """Held-out tokens of the process that has the most."""
        if self.refine is None:
            return 0
        count = min(self.processes, self.sequences)
        shares = (Ranks(rank, count).shares(self.sequences, self.refine.held_out)[1] for rank in range(count))
        return max(share.stop - share.start for share in shares) * self.tokens

    @property
    def batch_tokens(self) -> int:
        """Tokens that are computed together."""
        return min(self.batch, self.local_sequences) * self.tokens

    @property
    def loss_tokens(self) -> int:
        """Tokens of which the allocation takes gradients in the first process, which has the most of them."""
        return min(loss_windows(self.tokens), self.local_sequences) * self.tokens

    @property
    def target_from_masks(self) -> bool:
        """True if the run of the dense layer for its initial masks gives tuning's target, too."""
        return self.refine is not None and self.refine.aims_at_dense_layers and self.method.reads_inputs

    @property
    def follows_dense(self) -> bool:
        """True if the dense model's activations go through the layers, too."""
        return self.refine is not None and self.refine.follows_dense

    def on_device(self, width: int, arrays: int | None = None) -> float:
        """Bytes of arrays of calibration activations that stay on the device.

        `arrays`: number of arrays; None: of those that go from layer to layer.
        """
        return self._staying(width, arrays) * self._array_size(width)

    def moved_share(self, width: int, arrays: int | None = None) -> float:
        """Share of the arrays that is moved to the device and back; `arrays` as in `on_device`."""
        return 1 - self._staying(width, arrays) / self._count(arrays)

    def activations(self, width: int, arrays: int | None = None) -> float:
        """Bytes of arrays of `width` features that are off the device; `arrays` as in `on_device`.

        A layer's inputs are copied off the device to make them durable; process 0 has those of all processes.
        """
        staying = self._staying(width, arrays)
        count = float(self._count(arrays) - staying)
        if arrays is None:
            count += min(staying, self.durable)
            count += self.durable * self.sequences / self.local_sequences if self.processes > 1 else 0
        return count * self._array(width)

    def outlasting(self, width: int) -> float:
        """Bytes of a layer's inputs, off the device, that are still being written when later layers need other arrays.

        0 on a CPU, where writing ends first, and with several processes, of which process 0 writes copies.
        """
        if self.on_cpu or not self.repeatable or self.processes > 1:
            return 0
        return (self.durable - min(self._staying(width), self.durable)) * self._array(width)

    @property
    def durable(self) -> int:
        """Number of arrays that a layer starts from."""
        return 2 if self.follows_dense else 1

    @property
    def passes_dense(self) -> bool:
        """True if the dense model is passed through before the first layer is pruned."""
        return self.reorders or self.allocation is not Allocation.UNIFORM

    @property
    def passing(self) -> int:
        """Number of arrays in such a pass: the layer's inputs, and one that moves through the dense model."""
        return self.durable + 1

    def kept_on_device(self, layers: float, width: int) -> float:
        """Bytes of the dense layers, `layers` bytes in all, that stay on the device between the allocation's passes."""
        if self.on_cpu or self.allocation is not Allocation.LOSS:
            return 0
        return min(layers, max(0.0, self.room - self.on_device(width, self.passing)))

    def _staying(self, width: int, arrays: int | None = None) -> int:
        """Number of arrays that stay on the device."""
        return min(self._count(arrays), self.room // self._array_size(width))

    def _count(self, arrays: int | None) -> int:
        return RefineSettings.arrays(self.refine) if arrays is None else arrays

    def in_memory(self, activations: float, width: int) -> float:
        """Bytes of the activations off the device that lie in host memory; further whole arrays lie in files."""
        if self.activation_memory is None:
            return activations
        array = self._array(width)
        return min(activations, self.activation_memory // array * array)

    def _array(self, width: int) -> int:
        return self._array_size(width) if self.on_cpu else block_size(self._array_size(width))

    def _array_size(self, width: int) -> int:
        return self.local_tokens * width * self.itemsize

    @property
    def swap_stages(self) -> tuple[int, ...]:
        """Most swaps of a row in each stage, as `refine_linear` makes them."""
        if self.refine is None:
            return ()
        return swap_stages(self.refine.swaps_of(self.pattern), guarded=self.refine.held_out > 0)

    def rounds(self, columns: int) -> float:
        """Rounds of swaps of a row: each stage begins a round, until the row gains no more."""
        useful, rounds = columns * USEFUL_SWAPS, 0.0
        for stage in self.swap_stages:
            swaps = min(float(stage), useful)
            useful -= swaps
            rounds += 1 + swaps / SWAPS_OF_A_ROUND
            if not swaps:  # the first stage without a gain is the last
                break
        return rounds

    @property
    def tune_steps(self) -> int:
        """Steps of a pass of tuning."""
        return 0 if self.refine is None else self.refine.step_count(self.sequences)

    @property
    def tune_turns(self) -> float:
        """Time of a pass of tuning over that of a process's own windows: the processes without one in a step wait."""
        windows = 1 if self.refine is None else self.refine.sequences_a_step
        return math.ceil(windows / self.processes) * self.processes / windows


def block_size(size: int) -> int:
    """Bytes of pinned memory that PyTorch takes for an array of `size` bytes: the next power of two."""
    return 1 << max(0, size - 1).bit_length()
