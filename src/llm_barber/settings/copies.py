"""Settings of the commands that write a copy of a model in another form: `pack`, `unpack` and `convert`."""

from functools import partial

from pydantic import Field

from llm_barber.settings.base import OutputFolder, same_folder
from llm_barber.settings.checked import Rule, Settings


class CopySettings(Settings):
    """Of what writes a copy of a model in another form."""

    model: str = Field(description="folder")
    output: OutputFolder = Field(description="folder to write; it appears when it is complete")
    overwrite: bool = Field(default=False, description="replace OUT, once the new one is complete")

    def rules(self) -> list[Rule]:
        """The output is another folder."""
        return [*super().rules(), partial(same_folder, "model", self.model, self.output)]


class PackConfig(CopySettings):
    """Settings of `pack` and `unpack`."""

    model: str = Field(description="folder to pack or unpack")


class ConvertConfig(CopySettings):
    """Settings of `convert`."""

    model: str = Field(description="folder or hub id with pytorch_model*.bin")
    revision: str | None = Field(None, description="of a hub id")
