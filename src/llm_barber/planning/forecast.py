"""The result of `llm-barber plan`: counts of work, and what a rehearsal says about time and memory."""

import json

from pydantic import BaseModel, ConfigDict


class Expected(BaseModel):
    """Time and memory of a run on this machine, extended from a rehearsal.

    `layers`, `windows`: decoder layers of the rehearsal, and the windows of each of its runs. `stages`: seconds by
    stage. `host_memory`, `device_memory`: peak bytes; `device_memory` is None where the host computes.
    """

    model_config = ConfigDict(frozen=True)

    layers: int
    windows: tuple[int, ...]
    stages: dict[str, float]
    host_memory: int
    device_memory: int | None

    @property
    def seconds(self) -> float:
        """Seconds of all stages."""
        return sum(self.stages.values())


class Forecast(BaseModel):
    """Costs of a run.

    `flops`: least number of floating-point operations, matrix products alone. `bytes_read`, `bytes_written`: of weight
    files. `least_seconds`: seconds that no machine with the given rates goes below; None: no rates were given.
    `expected`: on this machine; None: the plan is for a machine with the given rates.
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
    device: str
    dtype: str
    flops: float
    bytes_read: int
    bytes_written: int
    least_seconds: float | None = None
    expected: Expected | None = None

    def to_json(self) -> str:
        """Indented JSON with a final newline."""
        record = self.model_dump(mode="json")
        if self.expected is not None:
            record["expected"]["seconds"] = self.expected.seconds
        return json.dumps(record, indent=1) + "\n"
