"""The fine-tuning of a pruned model, for its record."""

from pydantic import Field

from llm_barber.record.layers import Result


class FineTuning(Result):
    """Training after pruning, in which pruned weights stayed zero.

    `pruned`: the checkpoint that was trained, as it was named. `record`: the digest of its record. `tensors`: names of
    the tensors that differ from the run's output; all others are the same, bit for bit. `versions`: of the libraries
    that wrote the trained checkpoint. `others_are_dense`: kept weights outside `tensors` are the dense model's, bit for
    bit; left out where they are not, and in older records.
    """

    pruned: str
    record: str
    tensors: tuple[str, ...] = Field(min_length=1)
    versions: dict[str, str]
    others_are_dense: bool = False
    later_fields = ("others_are_dense",)
