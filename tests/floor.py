"""Print constraints for pip: the oldest release of each dependency that pyproject.toml allows."""

import re
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def oldest() -> list[str]:
    """Constraints such as `torch==2.9.*` and, for `datasets>=3`, `datasets==3.0.*`, for each dependency."""
    bounds = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    found = [re.fullmatch(r"([\w.-]+)>=([\d.]+)", bound) for bound in bounds]
    return [f"{match[1]}=={match[2] if '.' in match[2] else match[2] + '.0'}.*" for match in found if match]


if __name__ == "__main__":
    print("\n".join(oldest()))
