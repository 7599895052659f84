"""Settings of the commands that look at a model, write a copy of it in another form, or let it write."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from llm_barber.settings.base import MODEL, ComputeSettings, OutputFolder, Settings, check_apart, refuse_if

QUICK_WINDOWS, FULL_WINDOWS = 8, 32  # of `demo`, of calibration text and of test text
STANDARD_INPUT = "-"
COLDEST = 0.01  # smallest temperature above 0: with smaller ones logits overflow
ROUNDS = 5


class InspectConfig(Settings):
    """Settings of `inspect`: the checkpoint, and the dense model to verify it with.

    Raises:
        SettingsError: any of them is wrong; the first wrong one is named.
    """

    model: str = Field(title="MODEL", description=MODEL)
    dense: str | None = Field(None, description="Dense model to compare kept weights with, bit for bit or rounded")
    revision: str | None = Field(None, description="Revision of MODEL, if it is a hub id")
    dense_revision: str | None = Field(None, description="Revision of the dense model, if it is a hub id")

    @model_validator(mode="after")
    def _revision_has_a_model(self) -> Self:
        refuse_if(self.dense_revision is not None and self.dense is None, "--dense-revision needs --dense", "give both")
        return self


class CopySettings(Settings):
    """A model, and the folder of its copy."""

    model: str = Field(title="MODEL", description="Folder of the model")
    output: OutputFolder = Field(title="OUT", description="Folder to write; it appears when it is complete")
    overwrite: bool = Field(False, description="Replace the folder when the new copy is complete")

    @model_validator(mode="after")
    def _is_apart(self) -> Self:
        check_apart(self.output, self.model, self.typed("model"))
        return self


class Values(StrEnum):
    """Stored values of kept weights: exact, or rounded."""

    EXACT = "exact"
    INT8 = "int8"


class UnpackConfig(CopySettings):
    """Settings of `unpack`.

    Raises:
        SettingsError: any of them is wrong; the first wrong one is named.
    """

    model: str = Field(title="PACKED", description="Folder of a packed model")


class PackConfig(UnpackConfig):
    """Settings of `pack`; `unpack` takes them, too.

    Raises:
        SettingsError: any of them is wrong; the first wrong one is named.
    """

    model: str = Field(title="PRUNED", description="Folder of a pruned model")
    output: OutputFolder = Field(title="PACKED", description="Folder to write; it appears when it is complete")
    values: Values = Field(Values.EXACT, description="Kept weights as they are, or rounded: smaller, another model")


class ConvertConfig(CopySettings):
    """Settings of `convert`.

    Raises:
        SettingsError: any of them is wrong; the first wrong one is named.
    """

    model: str = Field(title="MODEL", description="Folder or hub id of a model with pytorch_model*.bin")
    revision: str | None = Field(None, description="Revision of a hub id")


class KeepPacked(StrEnum):
    """Pruned linears that stay packed in memory: those that are faster so on this CPU, all, or none."""

    AUTO = "auto"
    YES = "yes"
    NO = "no"


def _as_choice(value: Any) -> Any:
    return {True: KeepPacked.YES, False: KeepPacked.NO}[value] if isinstance(value, bool) else value


def _not_too_cold(value: float) -> float:
    if 0 < value < COLDEST:
        raise ValueError(f"{value:g} is too small: 0 takes the most likely token, else {COLDEST} is the least")
    return value


class GenerateConfig(ComputeSettings):
    """Settings of `generate`: a model, a prompt, how tokens are chosen, and a model to compare the speed with.

    Raises:
        SettingsError: any of them is wrong; the first wrong one is named.
    """

    model: str = Field(title="MODEL", description=f"{MODEL}; the folder may be packed")
    prompt: str = Field(
        title="PROMPT",
        description=f"Text to continue, or message to a chat model; {STANDARD_INPUT} reads standard input",
    )
    against: str | None = Field(None, description="Let this model, dense in memory, write, too, and time both in turn")
    max_new_tokens: int = Field(128, ge=1, description="Most tokens to write; fewer if the model ends its text")
    temperature: Annotated[float, AfterValidator(_not_too_cold)] = Field(
        0.0,
        ge=0,
        description="0: always the most likely token; 1: drawn by the model's probabilities; above: more random",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of what --temperature draws")
    chat: bool | None = Field(
        None, description="Put the prompt into the tokenizer's chat template (default: on if it has one)"
    )
    keep_packed: Annotated[KeepPacked, BeforeValidator(_as_choice)] = Field(
        KeepPacked.AUTO,
        description="Keep pruned linears of MODEL packed in memory (default: auto, where that is faster on this CPU; "
        "on a GPU all)",
    )
    repeats: int | None = Field(None, ge=1, description=f"Rounds of timing with --against (default: {ROUNDS})")

    @model_validator(mode="after")
    def _repeats_need_another_model(self) -> Self:
        refuse_if(self.repeats is not None and self.against is None, "--repeats needs --against", "give both")
        return self

    @property
    def rounds(self) -> int:
        """Number of times that two models are timed in turn."""
        return self.repeats or ROUNDS


class ReportConfig(Settings):
    """Settings of `report`: the folder of a finished run, and the page to write.

    Raises:
        SettingsError: any of them is wrong; the first wrong one is named.
    """

    folder: Path = Field(title="OUT", description="Folder that prune or rebuild wrote")
    output: Path | None = Field(None, description="HTML file to write (default: report.html in OUT)")


class DemoConfig(Settings):
    """Settings of `demo`: sizes of the demonstration, and where its models go.

    Raises:
        SettingsError: any of them is wrong; the first wrong one is named.
    """

    output: Path = Field(Path("demo-output"), description="Folder for the pruned models")
    model: str | None = Field(None, description="Another model (default: SmolLM2-135M from its package)")
    full: bool = Field(False, description="More text and more tuning; takes several times as long")
    samples: int | None = Field(
        None, ge=1, description=f"Calibration windows (default: {QUICK_WINDOWS}; with --full {FULL_WINDOWS})"
    )
    seqlen: int = Field(512, ge=2, description="Tokens a window")
    windows: int | None = Field(
        None,
        ge=1,
        description=f"WikiText-2 windows to measure perplexity on (default: {QUICK_WINDOWS}; with --full "
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
