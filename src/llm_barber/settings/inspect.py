"""Settings of `inspect`."""

from pydantic import Field

from llm_barber.settings.checked import Settings


class InspectConfig(Settings):
    """Settings of `inspect`."""

    model: str = Field(description="folder, hub id or GGUF file")
    dense: str | None = Field(None, description="the dense model, to compare bit by bit")
    revision: str | None = Field(None, description="of MODEL, if it is a hub id")
    dense_revision: str | None = Field(None, description="of DENSE, if it is a hub id")
