"""Settings of `report`."""

from pathlib import Path

from pydantic import Field

from llm_barber.settings.checked import Settings


class ReportConfig(Settings):
    """Settings of `report`: the folder of a finished run, and the page to write.

    Raises:
        SettingsError: any of them is wrong; all wrong ones are named.
    """

    folder: Path = Field(description="Folder that prune or rebuild wrote")
    output: Path | None = Field(None, description="HTML file to write (default: report.html in `folder`)")
