"""Write a comparison's files: `comparison.json`, `.csv`, `.md`, `.svg` and `.html`."""

from pathlib import Path

from llm_barber.checkpoint.durable import write_durably
from llm_barber.comparison.page import comparison_page, comparison_picture
from llm_barber.comparison.result import Comparison
from llm_barber.comparison.written import comma_separated, markdown

NAME = "comparison"


def write_files(comparison: Comparison, folder: Path) -> None:
    """Write all files, each whole or not at all."""
    contents = {
        "json": comparison.model_dump_json(indent=1) + "\n",
        "csv": comma_separated(comparison),
        "md": markdown(comparison),
        "svg": comparison_picture(comparison),
        "html": comparison_page(comparison),
    }
    for ending, content in contents.items():
        path = folder / f"{NAME}.{ending}"
        if content is None:  # an earlier comparison had something to draw
            path.unlink(missing_ok=True)
        else:
            write_durably(path, content.encode())
