"""Settings of `evaluate`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field

from llm_barber.messages import Message, message
from llm_barber.settings.base import COMMAS, Dtype, StructureSettings
from llm_barber.settings.checked import Rule


class EvaluateConfig(StructureSettings):
    """Settings of `evaluate`: texts and tasks to measure a model on, and a model to compare it with.

    Raises:
        SettingsError: any of them is wrong; all wrong ones are named.
    """

    model: str = Field(description="Folder, hub id (org/name[@revision]) or GGUF file")
    against: str | None = Field(
        None, description="Compare with this model: perplexity, KL divergence, next tokens, accuracies"
    )
    text: tuple[str, ...] | None = Field(
        None,
        description="wikitext2, from the hub ptb or c4, or a file; repeatable (default: wikitext2; with tasks none)",
    )
    windows: int | None = Field(None, ge=1, description="Windows of each text (default: all)")
    seqlen: int = Field(2048, ge=2, description="Tokens a window")
    bos: bool = Field(
        True,
        description="Begin each window with BOS if the tokenizer begins texts with it; many published numbers are "
        "measured without BOS",
    )
    tasks: Annotated[tuple[str, ...], *COMMAS] = Field(
        (),
        description="Tasks of lm-eval; paper stands for the seven of the paper: boolq, rte, hellaswag, winogrande, "
        "arc_easy, arc_challenge, openbookqa",
    )
    tasks_folder: Path | None = Field(
        None,
        description="Folder with NAME.jsonl of each task, instead of the hub; lines of query, choices, gold or of "
        "context_options, continuation, gold",
    )
    limit: int | None = Field(None, ge=2, description="Most examples of each task (default: all)")
    batch_size: int | None = Field(None, ge=1, description="Most windows at a time (default: by the device)")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 …")
    dtype: Dtype = Field("auto", description="Compute in float32, bfloat16 or float16 (default: auto, the fastest)")

    def rules(self) -> list[Rule]:
        """Refuse a number of examples where no task has any."""
        return [*super().rules(), lambda: limit_needs_tasks(self.limit, bool(self.tasks or self.tasks_folder))]

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts to measure."""
        if self.text is not None:
            return self.text
        return () if self.tasks or self.tasks_folder else ("wikitext2",)


def limit_needs_tasks(limit: int | None, has_tasks: bool) -> Iterator[Message]:
    """Problem of a number of examples where no task has any."""
    if limit is not None and not has_tasks:
        yield message("{limit} needs {tasks} or {tasks_folder}")
