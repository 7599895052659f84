"""Settings of `evaluate`."""

from pathlib import Path

from pydantic import Field

from llm_barber.settings.base import DTYPES, Dtype, StructureSettings


class EvaluateConfig(StructureSettings):
    """Settings of `evaluate`."""

    model: str = Field(description="folder, hub id or GGUF file")
    against: str | None = Field(None, description="another model, usually the dense one, to compare with")
    text: tuple[str, ...] | None = Field(
        None, description="wikitext2, ptb, c4, or files; None: wikitext2, or no text if there are tasks"
    )
    windows: int | None = Field(None, ge=1, description="windows of each text; None: all")
    seqlen: int = Field(2048, ge=2, description="tokens a window")
    bos: bool = Field(True, description="let windows begin as the tokenizer has texts begin, with BOS")
    tasks: tuple[str, ...] = Field((), description="lm-eval's names, paper (the paper's seven), or the folder's files")
    tasks_folder: Path | None = Field(None, description="folder with a .jsonl file a task, read instead of the hub")
    limit: int | None = Field(None, ge=2, description="examples of each task, at most")
    batch_size: int | None = Field(None, ge=1, description="windows computed together; None: chosen by the device")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 …")
    dtype: Dtype = Field("auto", description=f"compute dtype: {', '.join(DTYPES)}")

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts to measure."""
        if self.text is not None:
            return self.text
        return () if self.tasks or self.tasks_folder else ("wikitext2",)
