"""The result of `llm-barber plan`: the work of each stage, peak memory, time, and the bottleneck."""

import json

from pydantic import BaseModel, ConfigDict

from llm_barber.planning.rates import KINDS


class StageForecast(BaseModel):
    """Work of a stage in the process that has the most of it, and its seconds by resource.

    A disk works while a GPU computes layers: seconds of the disk are those that the run waits for it. Seconds of
    launches are those that a GPU waits for the host to start its next kernel.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    flops: float
    bytes_read: float
    bytes_written: float
    seconds: float
    seconds_by_kind: dict[str, float]


class ProcessesForecast(BaseModel):
    """A run in `processes` processes; memory in bytes of each process.

    `device_memory`: None where the host computes. `on_device`: the part of it that calibration activations take, which
    stay there. `in_files`: bytes of activations that `--memory` leaves no space for.
    """

    model_config = ConfigDict(frozen=True)

    processes: int
    stages: tuple[StageForecast, ...]
    host_memory: float
    device_memory: float | None
    on_device: float
    in_files: float

    @property
    def seconds(self) -> float:
        """Seconds of all stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def bottleneck(self) -> str:
        """The resource that takes most of the time: compute, memory, link, network, disk or launches."""
        kinds = {kind: sum(stage.seconds_by_kind[kind] for stage in self.stages) for kind in KINDS.values()}
        return max(kinds, key=lambda kind: kinds[kind])


class Forecast(BaseModel):
    """Costs of a run.

    `rates`: amounts a second of each kind of work. `measured`: the rates are this machine's.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    architecture: str
    structure: tuple[str, ...]
    layers: int
    parameters: int
    weights: int
    settings: str
    sequences: int
    tokens: int
    batch_size: int
    device: str
    dtype: str
    measured: bool
    rates: dict[str, float]
    runs: tuple[ProcessesForecast, ...]

    def to_json(self) -> str:
        """Indented JSON with a final newline."""
        record = self.model_dump(mode="json")
        for entry, run in zip(record["runs"], self.runs, strict=True):
            entry |= {"seconds": run.seconds, "bottleneck": run.bottleneck}
        return json.dumps(record, indent=1) + "\n"
