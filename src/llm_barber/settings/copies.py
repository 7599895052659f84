"""Settings of the commands that write a copy of a model in another form: `pack`, `unpack` and `convert`."""

from enum import StrEnum
from functools import partial

from pydantic import Field

from llm_barber.settings.base import OutputFolder, same_folder
from llm_barber.settings.checked import Rule, Settings


class CopySettings(Settings):
    """A model, and the folder of its copy."""

    model: str = Field(description="Folder of the model")
    output: OutputFolder = Field(description="Folder to write; it appears when it is complete")
    overwrite: bool = Field(default=False, description="Replace `output` when the new copy is complete")

    def rules(self) -> list[Rule]:
        """Refuse to write a copy into its model's folder."""
        return [*super().rules(), partial(same_folder, "model", self.model, self.output)]


class Values(StrEnum):
    """Stored values of kept weights: exact, or rounded."""

    EXACT = "exact"
    INT8 = "int8"


class UnpackConfig(CopySettings):
    """Settings of `unpack`.

    Raises:
        SettingsError: any of them is wrong; all wrong ones are named.
    """

    model: str = Field(description="Folder of a packed model")


class PackConfig(UnpackConfig):
    """Settings of `pack`; `unpack` takes them, too.

    Raises:
        SettingsError: any of them is wrong; all wrong ones are named.
    """

    model: str = Field(description="Folder of a pruned model")
    values: Values = Field(Values.EXACT, description="Kept weights as they are, or rounded: smaller, another model")


class ConvertConfig(CopySettings):
    """Settings of `convert`.

    Raises:
        SettingsError: any of them is wrong; all wrong ones are named.
    """

    model: str = Field(description="Folder or hub id of a model with pytorch_model*.bin")
    revision: str | None = Field(None, description="Revision of a hub id")
