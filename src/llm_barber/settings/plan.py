"""Settings of `plan`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import Field

from llm_barber.messages import Message
from llm_barber.settings.prune import PruneConfig

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class PlanConfig(PruneConfig):
    """Settings of `plan`: those of `prune`, and rates of a machine that is not this one.

    Raises:
        SettingsError: any of them is wrong; all wrong ones are named.
    """

    model: str = Field(description="Folder with config.json, a config.json, hub id or GGUF file; weights are not read")
    output: Path = Field(default=Path("pruned"), description="Not written")
    tflops: Rate | None = Field(
        default=None,
        description="Plan for another machine, without a rehearsal: TFLOP/s of its matrix products, 400 on an H100",
    )
    gbps: Rate | None = Field(
        default=None, description="Plan for another machine, without a rehearsal: GB/s of its disk"
    )

    def _output_is_another(self) -> Iterable[Message]:
        return ()  # nothing is written
