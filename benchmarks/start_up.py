"""Measure the time until the command line answers: help, the version, a wrong option or setting.

None of these loads PyTorch. Each command runs in a process of its own; the first run, which fills the disk's cache,
is not counted.

    python benchmarks/start_up.py
"""

import statistics
import subprocess
import sys
import time

from common import show

RUNS = 5
COMMANDS = {
    "--help": ["--help"],
    "--version": ["--version"],
    "prune --help": ["prune", "--help"],
    "a usage error": ["prune", "--nothing"],
    "a wrong setting": ["prune", "model", "out", "--guard=2"],
}


def seconds(arguments: list[str]) -> float:
    """Wall time of one process that runs the command line."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "llm_barber", *arguments], capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    """Time each command and print the table."""
    rows = []
    for name, arguments in COMMANDS.items():
        seconds(arguments)
        times = [seconds(arguments) for _ in range(RUNS)]
        rows.append([name, *(f"{value:.2f}" for value in (min(times), statistics.median(times), max(times)))])
    show(f"seconds of {RUNS} runs", ["llm-barber", "minimum", "median", "maximum"], rows)


if __name__ == "__main__":
    main()
