"""Outcome of pruning a block: linears, masks, errors; and the counts for the record."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from llm_barber.masking.rebuild import Rebuilt
from llm_barber.method.pruned_linear import PrunedLinear
from llm_barber.method.tune import Tuned
from llm_barber.model.architecture import Block
from llm_barber.record.layers import BlockResult, LinearResult


@dataclass(frozen=True)
class BlockOutcome:
    """A block after a step of pruning.

    `linears`: the pruned linears. `masks`: their keep masks, and the weights that were swapped since the initial masks.
    `error_before`, `error_after`: mean reconstruction errors with the initial and with the final linears; None: not
    measured. `measured_from`: the first of the sequences that the errors are means over. `output_kept`: the block's
    output with the initial linears is kept. `rejected`: held-out windows rejected all that refining changed.
    """

    linears: dict[str, PrunedLinear]
    masks: dict[str, Rebuilt]
    error_before: float | None = None
    error_after: float | None = None
    measured_from: int | None = None
    output_kept: bool = False
    rejected: bool = False

    @classmethod
    def initial(cls, linears: dict[str, PrunedLinear]) -> "BlockOutcome":
        """A block with its initial masks."""
        return cls(linears, {name: Rebuilt(linear.keep, 0, 0, 0) for name, linear in linears.items()})

    def tuned(self, tuned: Tuned, initial_keeps: Mapping[str, Tensor], after_linears: bool) -> "BlockOutcome":
        """The block after its layer was tuned.

        Args:
            tuned: the tuned layer.
            initial_keeps: the initial keep masks, bool (out, in), by linear.
            after_linears: the linears had been refined one by one before.
        """
        linears = {name: tuned.linears[name] for name in self.linears}
        rejected = bool(linears) and tuned.rejected and (self.rejected or not after_linears)
        return replace(self, linears=linears, masks=self._masks_since(initial_keeps, linears), rejected=rejected)

    def refined(
        self, initial_linears: Mapping[str, PrunedLinear], linears: dict[str, PrunedLinear], rejected: bool
    ) -> "BlockOutcome":
        """The block after its linears were refined one by one; `initial_linears` have the initial masks."""
        initial_keeps = {name: linear.keep for name, linear in initial_linears.items()}
        return replace(self, linears=linears, masks=self._masks_since(initial_keeps, linears), rejected=rejected)

    def _masks_since(
        self, initial_keeps: Mapping[str, Tensor], linears: Mapping[str, PrunedLinear]
    ) -> dict[str, Rebuilt]:
        return {
            name: Rebuilt.between(initial_keeps[name], linears[name].keep, mask.beneficial)
            for name, mask in self.masks.items()
        }


def block_result(block: Block, outcome: BlockOutcome, weights: Mapping[str, Tensor]) -> BlockResult:
    """Counts of a block's linears for the record.

    Args:
        block: with all its prunable linears.
        outcome: of those that were pruned.
        weights: final weights of all its linears, (out, in).
    """
    linears = []
    for name, weight in weights.items():
        result = LinearResult(
            name=name,
            shape=(weight.shape[0], weight.shape[1]),
            pruned=0,
            zeros=weight.numel() - int((weight != 0).count_nonzero()),
        )
        if name in outcome.masks:
            mask, linear = outcome.masks[name], outcome.linears[name]
            counts = {
                "pruned": mask.keep.numel() - int(mask.keep.count_nonzero()),
                "beneficial_pairs": mask.beneficial,
                "grown": mask.grown,
                "dropped": mask.dropped,
                "pattern": str(linear.pattern) if linear.pattern else None,
                "few_tokens": bool(linear.few_tokens),
            }
            result = result.model_copy(update=counts)
        linears.append(result)
    return BlockResult(
        name=block.name,
        error_before=outcome.error_before,
        error_after=outcome.error_after,
        linears=tuple(linears),
        rejected=outcome.rejected,
    )
