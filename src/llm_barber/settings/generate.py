"""Settings of `generate`."""

from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from llm_barber.messages import Message, message
from llm_barber.settings.base import Dtype
from llm_barber.settings.checked import Rule, Settings

STANDARD_INPUT = "-"
COLDEST = 0.01  # smallest temperature above 0: with smaller ones logits overflow
ROUNDS = 5


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


class GenerateConfig(Settings):
    """Settings of `generate`: a model, a prompt, how tokens are chosen, and a model to compare the speed with.

    Raises:
        SettingsError: any of them is wrong; all wrong ones are named.
    """

    model: str = Field(description="Folder (packed or not), hub id (org/name[@revision]) or GGUF file")
    prompt: str = Field(
        description=f"Text to continue, or message to a chat model; {STANDARD_INPUT} reads standard input"
    )
    against: str | None = Field(None, description="Let this model, dense in memory, write, too, and time both in turn")
    max_new_tokens: int = Field(128, ge=1, description="Most tokens to write; fewer if the model ends its text")
    temperature: Annotated[float, AfterValidator(_not_too_cold)] = Field(
        0.0,
        ge=0,
        description="0: always the most likely token; 1: drawn by the model's probabilities; above: more random",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of what `temperature` draws")
    chat: bool | None = Field(
        None, description="Put the prompt into the tokenizer's chat template (default: on if it has one)"
    )
    keep_packed: Annotated[KeepPacked, BeforeValidator(_as_choice)] = Field(
        KeepPacked.AUTO,
        description="Keep pruned linears of `model` packed in memory (default: auto, where that is faster on this CPU; "
        "on a GPU all)",
    )
    repeats: int | None = Field(None, ge=1, description=f"Rounds of timing with `against` (default: {ROUNDS})")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 …")
    dtype: Dtype = Field("auto", description="Compute in float32, bfloat16 or float16 (default: auto, the fastest)")

    def rules(self) -> list[Rule]:
        """Refuse a number of rounds where nothing is timed in rounds."""
        return [*super().rules(), self._repeats_need_another_model]

    def _repeats_need_another_model(self) -> Iterator[Message]:
        if self.repeats is not None and self.against is None:
            yield message("{repeats} needs {against}")

    @property
    def rounds(self) -> int:
        """Number of times that two models are timed in turn."""
        return self.repeats or ROUNDS
