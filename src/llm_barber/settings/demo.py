"""Settings of `demo`."""

from pathlib import Path

from pydantic import Field

from llm_barber.settings.checked import Settings


class DemoConfig(Settings):
    """Settings of the demonstration."""

    output: Path = Field(Path("demo-output"), description="folder for the pruned models")
    model: str | None = Field(None, description="another model; None: SmolLM2-135M from its package")
    samples: int = Field(32, ge=1, description="calibration windows")
    seqlen: int = Field(512, ge=2, description="tokens a window")
    windows: int = Field(32, ge=1, description="windows of WikiText-2 to measure perplexity on")
    prompt: str = Field("The capital of France is", description="what each model goes on from")
    device: str = Field("auto", description="auto, cpu, cuda")
