"""Settings of `demo`."""

from pathlib import Path

from pydantic import Field

from llm_barber.settings.checked import Settings


class DemoConfig(Settings):
    """Settings of `demo`: sizes of the demonstration, and where its models go.

    Raises:
        SettingsError: any of them is wrong; all wrong ones are named.
    """

    output: Path = Field(Path("demo-output"), description="Folder for the pruned models")
    model: str | None = Field(None, description="Another model (default: SmolLM2-135M from its package)")
    samples: int = Field(32, ge=1, description="Calibration windows")
    seqlen: int = Field(512, ge=2, description="Tokens a window")
    windows: int = Field(32, ge=1, description="Windows of WikiText-2 to measure perplexity on")
    prompt: str = Field("The capital of France is", description="Text that each model continues")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 …")
