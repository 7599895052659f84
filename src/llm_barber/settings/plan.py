"""Settings of `plan`."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from llm_barber.messages import Message, message
from llm_barber.settings.base import COMMAS, Size
from llm_barber.settings.checked import Rule
from llm_barber.settings.prune import PruneConfig

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# Defaults of a machine given by `flops`: bytes of the GPU's memory; bytes/s of the device's memory, between host and
# device, and of the disk.
DEVICE_MEMORY, MEMORY_BANDWIDTH, LINK, DISK = 80e9, 2e12, 10e9, 2e9
NETWORK = 10e9  # bytes/s between processes of any machine, by default: it is not measured


class PlanConfig(PruneConfig):
    """Settings of `plan`: those of `prune`, and rates of the machine; with `flops`, of a machine that is not this one.

    Raises:
        SettingsError: any of them is wrong; all wrong ones are named.
    """

    model: str = Field(description="Folder with config.json, a config.json, hub id or GGUF file; weights are not read")
    output: Path = Field(default=Path("pruned"), description="Not written")
    device_memory: Size | None = Field(
        default=None,
        description=f"GPU memory to stay within (default: all that is free; {DEVICE_MEMORY / 1e9:g} GB of a "
        "machine given by `flops`)",
    )
    processes: Annotated[tuple[int, ...], COMMAS[1]] = Field(
        default=(1,), description="Numbers of processes, on a device each, that share the windows"
    )
    flops: Rate | None = Field(
        default=None,
        description="FLOP/s that matrix products reach on the machine to plan for, 400e12 on an H100 (default: this "
        "machine's, measured)",
    )
    float32_flops: Rate | None = Field(
        default=None,
        description="The same in float32, for swaps and least squares (default: an eighth of `flops`)",
    )
    memory_bandwidth: Rate | None = Field(
        default=None,
        description=f"Bytes/s of the device's memory; needs `flops` (default: {MEMORY_BANDWIDTH / 1e9:g}e9)",
    )
    link: Rate | None = Field(
        default=None, description=f"Bytes/s between host and device; needs `flops` (default: {LINK / 1e9:g}e9)"
    )
    network: Rate | None = Field(
        default=None,
        description=f"Bytes/s between processes; GPUs of one machine reach 100e9 (default: {NETWORK / 1e9:g}e9)",
    )
    bandwidth: Rate | None = Field(
        default=None,
        description=f"Bytes/s of the disk (default: measured in this folder; with `flops` {DISK / 1e9:g}e9)",
    )

    @field_validator("processes", mode="before")
    @classmethod
    def _counts_readable(cls, value: Any) -> Any:
        try:
            counts = tuple(int(count) for count in (value.split(",") if isinstance(value, str) else value))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{value!r} is not numbers with commas between them, like 1,2,4,8") from error
        if not counts or min(counts) < 1:
            raise ValueError(f"{value!r}: there is at least 1 process")
        return counts

    def rules(self) -> list[Rule]:
        """Rules about the machine, and those of `prune`."""
        return [*super().rules(), self._machine_is_named]

    def _output_is_another(self) -> Iterable[Message]:
        return ()  # nothing is written

    def _machine_is_named(self) -> Iterator[Message]:
        rates = (self.float32_flops, self.memory_bandwidth, self.link)
        if self.flops is None and any(rate is not None for rate in rates):
            yield message(
                "{float32_flops}, {memory_bandwidth} and {link} (between host and device) are of a named machine: give "
                "{flops}, too; between processes it is {network}"
            )
