"""Settings of `demo`."""

from pathlib import Path

from pydantic import Field

from llm_barber.settings.checked import Settings

QUICK_WINDOWS, FULL_WINDOWS = 8, 32  # of calibration text and of test text


class DemoConfig(Settings):
    """Settings of the demonstration."""

    output: Path = Field(Path("demo-output"), description="folder for the pruned models")
    model: str | None = Field(None, description="another model; None: SmolLM2-135M from its package")
    full: bool = Field(default=False, description="more text and more passes of tuning; several times as long")
    samples: int | None = Field(
        None, ge=1, description=f"calibration windows; None: {QUICK_WINDOWS}, full {FULL_WINDOWS}"
    )
    seqlen: int = Field(512, ge=2, description="tokens a window")
    windows: int | None = Field(
        None,
        ge=1,
        description=f"windows of WikiText-2 to measure perplexity on; None: {QUICK_WINDOWS}, full {FULL_WINDOWS}",
    )
    prompt: str = Field("The capital of France is", description="beginning of a text that each model continues")
    device: str = Field("auto", description="auto, cpu, cuda")

    @property
    def calibration_windows(self) -> int:
        """Number of calibration windows."""
        return self.samples or self._default_windows

    @property
    def test_windows(self) -> int:
        """Number of windows that perplexity is measured on."""
        return self.windows or self._default_windows

    @property
    def _default_windows(self) -> int:
        return FULL_WINDOWS if self.full else QUICK_WINDOWS
