"""Shared by the benchmarks: the model, the machine, tables, the history of results."""

import json
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llm_barber import usage
from llm_barber.checkpoint.hub import resolve_model
from llm_barber.tools.demo import demo_model

HISTORY = Path(__file__).parent / "results" / "history.jsonl"


def model_folder(model: str | None) -> str:
    """An ordinary checkpoint folder: the named model, or SmolLM2-135M from its package."""
    return str(resolve_model(model or str(demo_model())))


def call(command: list[str], environment: dict[str, str] | None = None) -> str:
    """Run a command and return its output; where it fails, end the benchmark with its message."""
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{command[0]} failed:\n{done.stderr[-4000:]}")
    return done.stdout


def machine() -> str:
    """Processor, threads and versions, for the line under a table."""
    return f"{usage.machine()}; {', '.join(f'{package} {number}' for package, number in usage.versions().items())}"


def show(title: str, headings: list[str], rows: list[list[str]]) -> None:
    """Print a table and the machine."""
    console = Console(width=160, highlight=False)
    table = Table(title=title)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(machine())


def keep(benchmark: str, figures: dict[str, Any]) -> None:
    """Append measured figures to the history, with the date, the machine and versions."""
    HISTORY.parent.mkdir(exist_ok=True)
    entry = {"date": date.today().isoformat(), "benchmark": benchmark, "machine": machine(), **figures}
    with HISTORY.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
