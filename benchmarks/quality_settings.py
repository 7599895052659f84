"""Settings of `quality.py`: texts, targets, extra rows, and the chosen settings of the rebuild."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from llm_barber.masking.granularity import Granularity
from llm_barber.settings.compare import PEERS, CompareRow

ROOT = Path(__file__).parent.parent
CALIBRATION, VALIDATION, TEST = "text/c4-sample.txt", "text/wikitext2-validation.txt", "text/wikitext2-raw-test.txt"
TASKS = ("arc_easy", "hellaswag")
TARGETS = ("0.5", "0.6", "0.7", "2:4", "4:8")
TASK_TARGETS = ("0.5", "2:4")
CALIBRATION_SEQUENCES = (4, 8, 16, 32, 64, 128)
DEFAULT_NAME, DEFAULT_TITLE = "smollm2-135m", "SmolLM2-135M-Instruct (from a 4-bit GGUF)"
# Rows beside the paper's method and its peers: ADMM as a baseline, and the presets.
BEYOND = (CompareRow.ALPS, CompareRow.MASK, CompareRow.BEST)
REBUILT = "+rebuild"

RebuildSettings = dict[CompareRow, tuple[Granularity, float]]


@dataclass(frozen=True)
class Rows:
    """Extra rows: a method at some targets with some seeds; with `rebuild` its masks are rebuilt, too."""

    method: CompareRow
    targets: tuple[str, ...]
    seeds: tuple[int, ...]
    rebuild: bool

    @classmethod
    def read(cls, text: str, seeds: tuple[int, ...]) -> "Rows":
        """Parse METHOD[+rebuild]=TARGET,…[@SEED,…]; `seeds` where it names none."""
        row, _, row_seeds = text.partition("@")
        method, _, targets = row.partition("=")
        name = method.removesuffix(REBUILT)
        rows = cls(
            CompareRow(name),
            tuple(targets.split(",")),
            read_numbers(row_seeds) if row_seeds else seeds,
            name != method,
        )
        if unknown := set(rows.targets) - set(TARGETS):
            raise ValueError(f"no target {', '.join(map(repr, sorted(unknown)))}")
        if rows.rebuild and rows.method.preset is not None:
            raise ValueError(f"{rows.method} is a preset, which rebuilds or does not")
        return rows

    def __str__(self) -> str:
        method = f"{self.method}{REBUILT * self.rebuild}"
        return f"{method}={','.join(self.targets)}@{','.join(map(str, self.seeds))}"


@dataclass(frozen=True)
class Setup:
    """A model's benchmark.

    `model`: folder. `name`: of the results. `seeds`: calibration seeds of the main tables. `samples`, `seqlen`: number
    and tokens of the calibration windows. `windows`: of each text. `limit`: examples of each of the `tasks`; 0: none.
    `counts`: numbers of calibration windows to compare. `rebuild_settings`: chosen on another model; None: choose.
    """

    model: str
    name: str
    seeds: tuple[int, ...]
    samples: int = 16
    seqlen: int = 512
    windows: int = 16
    limit: int = 300
    tasks: tuple[str, ...] = TASKS
    targets: tuple[str, ...] = TARGETS
    counts: tuple[int, ...] = CALIBRATION_SEQUENCES
    methods: tuple[CompareRow, ...] = PEERS
    rows: tuple[Rows, ...] = field(default=())
    rebuild_settings: RebuildSettings | None = None

    @property
    def output(self) -> Path:
        """Folder of the results."""
        return results_folder(self.name)


def results_folder(name: str) -> Path:
    """Folder of a model's results."""
    return ROOT / "benchmarks" / "results" / name


def read_numbers(text: str) -> tuple[int, ...]:
    """Parse numbers with commas between them."""
    return tuple(int(number) for number in text.split(","))


def with_kept_rows(path: Path, rows: tuple[Rows, ...]) -> tuple[Rows, ...]:
    """Add rows to those that the model's page has already, and keep all of them in the file."""
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    together = list(dict.fromkeys([*kept, *map(str, rows)]))
    if together:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(together, indent=1) + "\n", encoding="utf-8")
    return tuple(Rows.read(text, ()) for text in together)


def write_settings(name: str, settings: RebuildSettings) -> None:
    """Keep the chosen settings of the rebuild, for other models."""
    path = results_folder(name) / "settings.json"
    path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def read_settings(name: str) -> RebuildSettings:
    """Read the settings that `write_settings` kept."""
    kept = json.loads((results_folder(name) / "settings.json").read_text(encoding="utf-8"))
    return {CompareRow(method): (Granularity(granularity), ratio) for method, (granularity, ratio) in kept.items()}
