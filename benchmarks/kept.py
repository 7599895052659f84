"""Which of the kept cells of a comparison tables and figures show."""

import json
from pathlib import Path
from typing import Any

TASK_EXAMPLES = 300  # of the cells that the tables have; cells with more are second runs


def kept_cell(cells: Path, method: str, target: str) -> dict[str, Any] | None:
    """The cell of a method's newest revision, first seed; None: it was not measured.

    Args:
        cells: folder of the kept cells.
        method: a row, as cells are named by it.
        target: sparsity or N:M.
    """
    paths = sorted(cells.glob(f"{method}-{target.replace(':', 'of')}-seed0-*.json"))
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    shown = [cell for cell in found if all(task[2] <= TASK_EXAMPLES for task in cell["key"].get("tasks") or [])]
    return max(shown, key=lambda cell: cell["key"].get("revision", 1), default=None)
