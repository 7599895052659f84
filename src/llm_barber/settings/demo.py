"""Settings of `demo`."""

from pathlib import Path

from pydantic import Field

from llm_barber.settings.checked import Settings

QUICK_WINDOWS, FULL_WINDOWS = 8, 32  # of calibration text and of test text


class DemoConfig(Settings):
    """Settings of `demo`: sizes of the demonstration, and where its models go.

    Raises:
        SettingsError: any of them is wrong; all wrong ones are named.
    """

    output: Path = Field(Path("demo-output"), description="Folder for the pruned models")
    model: str | None = Field(None, description="Another model (default: SmolLM2-135M from its package)")
    full: bool = Field(default=False, description="More text and more tuning; takes several times as long")
    samples: int | None = Field(
        None, ge=1, description=f"Calibration windows (default: {QUICK_WINDOWS}; with `full` {FULL_WINDOWS})"
    )
    seqlen: int = Field(512, ge=2, description="Tokens a window")
    windows: int | None = Field(
        None,
        ge=1,
        description=f"WikiText-2 windows to measure perplexity on (default: {QUICK_WINDOWS}; with `full` "
        f"{FULL_WINDOWS})",
    )
    prompt: str = Field("The capital of France is", description="Beginning of a text that each model continues")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 …")

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
