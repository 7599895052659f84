"""Keep finished measurements of the payoff benchmark, and time sides in turn."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import llm_barber
from llm_barber import native, usage
from llm_barber.checkpoint.durable import write_durably

RESULTS = Path(__file__).parent / "results" / "payoff"
SOURCES = Path(llm_barber.__file__).parent


@dataclass(frozen=True)
class Spread:
    """The minimum, median and maximum of several measurements."""

    minimum: float
    median: float
    maximum: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarise measurements.

        Example: 3, 1, 2, 10 -> 1, 2.5, 10.
        """
        return cls(min(values), median(values), max(values))

    def shown(self, scale: float = 1, digits: int = 0) -> str:
        """Format as "minimum / median / maximum", each times `scale`."""
        values = self.minimum, self.median, self.maximum
        return " / ".join(f"{value * scale:,.{digits}f}" for value in values)


class Cells:
    """Finished cells of a part of the benchmark, in one file.

    A cell is measured again if its settings, the machine, its instructions, the versions or the measured code differ
    from what was kept; its result then takes the place of the old one.

    Args:
        part: name of the file, `PART.json`.
        folder: None: nothing is read or kept.
        sources: folders of the package whose files the results depend on.
    """

    def __init__(self, part: str, folder: Path | None, sources: Sequence[str]) -> None:
        self._path = None if folder is None else folder / f"{part}.json"
        self._around = {**surroundings(), "code": digest_of_sources(sources)}
        self._cells: dict[str, dict[str, Any]] = read_cells(self._path) if self._path else {}

    def result(self, name: str, settings: Mapping[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a cell's result: the kept one, or else measure and keep it."""
        expected = json.loads(json.dumps({"settings": settings, **self._around}))
        kept = self._cells.get(name)
        if kept is not None and {key: kept.get(key) for key in expected} == expected:
            return kept["result"]
        result: dict[str, Any] = json.loads(json.dumps(measure()))
        self._cells[name] = {**expected, "date": datetime.now(UTC).isoformat(timespec="seconds"), "result": result}
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(self._path, (json.dumps(self._cells, indent=1) + "\n").encode())
        return result


def read_cells(path: Path) -> dict[str, dict[str, Any]]:
    """Read the kept cells of a part by name; none if there is no file."""
    cells: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return cells


def newest_code(cells: Mapping[str, Mapping[str, Any]]) -> str:
    """Digest of the measured code of the newest cell: cells with another were measured with an earlier version."""
    return str(max(cells.values(), key=lambda cell: cell["date"])["code"])


def surroundings() -> dict[str, Any]:
    """Machine, instructions of the products, and versions."""
    return {
        "machine": usage.machine().rpartition(",")[0],  # without the number of threads, which is a setting
        "instructions": native.instructions().name.lower() if native.library() else "numpy",
        "versions": usage.versions(),
    }


def digest_of_sources(folders: Sequence[str]) -> str:
    """Digest of the package's Python and C files, headers too, in some of its folders."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted((SOURCES / folder).rglob("*")):
            if path.suffix in (".py", ".c", ".h"):
                digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def in_turn(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, dict[str, float]]:
    """Measure sides in turn, so that a busy moment meets all of them.

    Args:
        sides: by name, a function that works and returns its seconds.
        rounds: measurements of each; a first one, which warms up, does not count.

    Returns:
        For each side the fields of `Spread`, in seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, work in sides.items():
            taken = work()
            if number:
                seconds[name].append(taken)
    return {name: asdict(Spread.of(values)) for name, values in seconds.items()}


def timed(work: Callable[[], object]) -> Callable[[], float]:
    """Make a function for `in_turn` from something to call."""

    def measure() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return measure
