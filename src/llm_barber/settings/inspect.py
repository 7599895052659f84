"""Settings of `inspect`."""

from collections.abc import Iterator

from pydantic import Field

from llm_barber.messages import Message, message
from llm_barber.settings.checked import Rule, Settings


class InspectConfig(Settings):
    """Settings of `inspect`: the checkpoint, and the dense model to verify it with.

    Raises:
        SettingsError: any of them is wrong; all wrong ones are named.
    """

    model: str = Field(description="Folder, hub id (org/name[@revision]) or GGUF file")
    dense: str | None = Field(None, description="Dense model to compare kept weights with, bit for bit or rounded")
    revision: str | None = Field(None, description="Revision of `model`, if it is a hub id")
    dense_revision: str | None = Field(None, description="Revision of `dense`, if it is a hub id")

    def rules(self) -> list[Rule]:
        """A revision belongs to a model."""
        return [*super().rules(), self._revision_has_a_model]

    def _revision_has_a_model(self) -> Iterator[Message]:
        if self.dense_revision is not None and self.dense is None:
            yield message("{dense_revision} needs {dense}")
