"""Time to find the border of each row, the score of its k-th lowest member: numpy's sort against C.

    python benchmarks/borders.py [--threads 2]

Prints nanoseconds a score, the least of four runs: the sort; C on one thread and on several; and the whole mask of
`lowest` with C. Scores are random with a long tail, and half of each row is marked.
"""

import argparse
import time
from collections.abc import Callable

import torch

from llm_barber.masking.selection import lowest, sort_values
from llm_barber.native.borders import find_borders

SHAPES = ((576, 576), (8960, 1536), (1536, 8960), (1, 1536 * 8960))
RUNS = 4


def nanoseconds(function: Callable[[], object], scores: torch.Tensor) -> float:
    """Nanoseconds a score, the least of a few runs."""
    times = []
    for _ in range(RUNS):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return min(times) / scores.numel() * 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of C; default: PyTorch's")
    threads = parser.parse_args().threads
    torch.manual_seed(0)
    print(
        f"| rows | sort | C, 1 thread | C, {threads} threads | `lowest`, {threads} threads |\n|---|---:|---:|---:|---:|"
    )
    for rows, columns in SHAPES:
        scores, counts = torch.randn(rows, columns).exp(), torch.full((rows,), columns // 2)
        figures = [nanoseconds(lambda scores=scores: sort_values(scores), scores)]
        for count in (1, threads):
            torch.set_num_threads(count)
            figures.append(nanoseconds(lambda scores=scores, counts=counts: find_borders(scores, counts), scores))
        figures.append(nanoseconds(lambda scores=scores, counts=counts: lowest(scores, counts), scores))
        print(f"| {rows} × {columns} |", " | ".join(f"{figure:.1f}" for figure in figures), "|", flush=True)


if __name__ == "__main__":
    main()
