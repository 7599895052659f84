"""Sources of initial masks: a method (`method_masks.py`) or a checkpoint (`checkpoint_masks.py`)."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from llm_barber.loading.job import Job
from llm_barber.masking.granularity import Granularity
from llm_barber.masking.pattern import NofM, Pattern
from llm_barber.method.pruned_linear import PrunedLinear
from llm_barber.model.block import DecoderLayer
from llm_barber.model.streams import ActivationStreams
from llm_barber.record.report import SourceFiles
from llm_barber.settings.presets import Initial


class InitialMasks(Protocol):
    """Source of the masks that a run starts from, and all that the run asks about them."""

    @property
    def job(self) -> Job:
        """The opened model."""
        ...

    @property
    def method(self) -> Initial | None:
        """Method that chooses the masks; None: they are read from a checkpoint."""
        ...

    @property
    def target(self) -> Pattern | None:
        """Sparsity or N:M of linears without a target of their own; None: as the checkpoint has it."""
        ...

    @property
    def target_words(self) -> str:
        """The target, for people."""
        ...

    @property
    def has_one_target(self) -> bool:
        """True if one target is known to hold for all linears."""
        ...

    @property
    def pattern(self) -> NofM | None:
        """N:M that settings of the run follow where they depend on one; None: unstructured."""
        ...

    @property
    def granularity(self) -> Granularity | None:
        """Weights that compete for the masks; None: they are read from a checkpoint."""
        ...

    @property
    def budget(self) -> float | None:
        """Sparsity that an allocation can spread over linears of decoder layers; None: there is none."""
        ...

    @property
    def source_files(self) -> SourceFiles | None:
        """Files of the pruned checkpoint that the masks are read from; None: there is none."""
        ...

    def set_sparsities(self, sparsities: Mapping[str, float]) -> None:
        """Prune linears, by their names in the model, to these sparsities; only if there is a `budget`."""
        ...

    def linears(self, index: int) -> tuple[str, ...]:
        """The linears of a layer that may be pruned."""
        ...

    def patterns(self, index: int) -> dict[str, NofM]:
        """N:M of a layer's linears that a method prunes to one, by linear; none where a checkpoint has the masks."""
        ...

    @property
    def runs_layers(self) -> bool:
        """True if every layer is run with its dense weights, for the masks."""
        ...

    def __call__(
        self,
        index: int,
        layer: DecoderLayer,
        dense: Mapping[str, Tensor],
        streams: ActivationStreams,
        output: str | None = None,
    ) -> dict[str, PrunedLinear]:
        """Initial masks of a layer.

        Args:
            index: of the layer.
            layer: with its dense weights.
            dense: dense weights of its prunable linears, (out, in).
            streams: the layer's input.
            output: name of the array that takes the dense layer's output, if the layer is run (`runs_layers`).

        Returns:
            One `PrunedLinear` for each linear that is pruned; the others stay dense.
        """
        ...


def prunes_layers(initial_masks: InitialMasks) -> bool:
    """Test whether any linear of the decoder layers is pruned, not the output head alone."""
    return any(initial_masks.linears(index) for index in range(initial_masks.job.layer_count))
