"""Settings of `plan`."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from llm_barber.settings.prune import PruneConfig

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class PlanConfig(PruneConfig):
    """Settings of `plan`: those of `prune`, and rates of a machine that is not this one.

    Raises:
        SettingsError: any of them is wrong; the first wrong one is named.
    """

    model: str = Field(
        title="MODEL_OR_CONFIG",
        description="Folder with config.json, a config.json, hub id or GGUF file; weights are not read",
    )
    output: Path = Field(Path("pruned"), title="OUT", description="Not written")
    tflops: Rate | None = Field(
        default=None,
        description="Plan for another machine, without a rehearsal: TFLOP/s of its matrix products, 400 on an H100",
    )
    gbps: Rate | None = Field(
        default=None, description="Plan for another machine, without a rehearsal: GB/s of its disk"
    )

    def _check_folders(self) -> None:
        """Nothing is written."""
