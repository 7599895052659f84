"""Settings of `selftest`."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from llm_barber.settings.base import COMMAS
from llm_barber.settings.checked import Settings


class Check(StrEnum):
    """A check of `selftest`, in the order in which checks run."""

    MASKS = "masks"
    REPEAT = "repeat"
    SECOND_GPU = "second-gpu"
    MEMORY = "memory"
    WAITS = "waits"
    ATTENTION = "attention"
    NORMS = "norms"
    KERNELS = "kernels"
    PACKED = "packed"
    SEMI_STRUCTURED = "semi-structured"
    GRAPHS = "graphs"
    TIMES = "times"


class SelftestConfig(Settings):
    """Settings of `selftest`: the device to check, the checks, and the model whose runs are timed.

    Raises:
        SettingsError: any of them is wrong; all wrong ones are named.
    """

    checks: Annotated[tuple[Check, ...], *COMMAS] = Field(
        tuple(Check), min_length=1, description=f"Checks to run: {', '.join(Check)} (default: all)"
    )
    model: str | None = Field(
        None,
        description="Model whose runs are timed (default: on a GPU SmolLM2-135M if its package is installed, else a "
        "random model)",
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 …")
