"""Settings of `llm-barber plan`."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from llm_barber.messages import Message, message
from llm_barber.settings.checked import Rule
from llm_barber.settings.prune import PruneConfig

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class PlanConfig(PruneConfig):
    """Settings of `plan`: those of `prune`, and of the machine; `flops` make it another one than this.

    Raises:
        SettingsError: any of them is wrong; all wrong ones are named.
    """

    output: Path = Field(default=Path("pruned"), description="not written")
    processes: tuple[int, ...] = Field(default=(1,), description="how many share the calibration windows")
    flops: Rate | None = Field(default=None, description="FLOP/s of another machine; None: this one, measured")
    float32_flops: Rate | None = Field(default=None, description="FLOP/s of float32 products; None: an eighth")
    memory_bandwidth: Rate | None = Field(default=None, description="bytes/s of the device's memory")
    link: Rate | None = Field(default=None, description="bytes/s between host and device")
    network: Rate | None = Field(default=None, description="bytes/s between processes")
    bandwidth: Rate | None = Field(default=None, description="bytes/s of the disk")

    @field_validator("processes", mode="before")
    @classmethod
    def _counts_readable(cls, value: Any) -> Any:
        try:
            counts = tuple(int(one) for one in value.split(",")) if isinstance(value, str) else tuple(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{value!r} is not numbers with commas between them, like 1,2,4,8") from error
        if not counts or min(counts) < 1:
            raise ValueError(f"{value!r}: there is at least 1 process")
        return counts

    def rules(self) -> list[Rule]:
        """Rates are of a named machine, and the rules of `prune`."""
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
