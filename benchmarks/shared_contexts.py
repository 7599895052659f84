"""Tasks whose endings share their context, computed ending by ending and together: tokens, seconds, scores.

    python benchmarks/shared_contexts.py --tasks-folder DATA/tasks --limit 60

CPU seconds of one thread, reading the model included. `scores that differ` counts examples whose accuracy is another.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from common import model_folder, show

from llm_barber.evaluation.branches import Batch
from llm_barber.evaluation.harness import run_tasks
from llm_barber.evaluation.language_model import StreamedLanguageModel
from llm_barber.evaluation.streamed import StreamedModel
from llm_barber.evaluation.tasks import Task, TaskRun, find_tasks
from llm_barber.loading.tokenizer import load_tokenizer
from llm_barber.progress import Silent


class CountingModel(StreamedModel):
    """Counts the tokens that it computes, padding included."""

    tokens = 0

    def hidden_states(self, batches: Any, progress: Any) -> list[torch.Tensor]:
        batches = list[Batch](batches)
        self.tokens += sum(batch.tokens.numel() for batch in batches)
        return super().hidden_states(batches, progress)


def measure(
    folder: Path, task: Task, limit: int | None, dtype: torch.dtype, shares: bool
) -> tuple[int, float, TaskRun]:
    """Tokens, CPU seconds and scores of a task."""
    StreamedLanguageModel.shares_contexts = shares
    begun = time.process_time()
    model = CountingModel(str(folder), torch.device("cpu"), dtype)
    scores = run_tasks(model, load_tokenizer(folder), [task], limit, None, Silent())
    return model.tokens, time.process_time() - begun, scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, hub id or GGUF file; default: SmolLM2-135M from its package")
    parser.add_argument("--tasks-folder", type=Path, required=True)
    parser.add_argument("--tasks", default="", help="names with commas; default: all of the folder")
    parser.add_argument("--limit", type=int, help="most examples of each task")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder, dtype = Path(model_folder(options.model)), getattr(torch, options.dtype)
    rows = []
    for task in find_tasks(tuple(filter(None, options.tasks.split(","))), options.tasks_folder, None):
        (tokens, seconds, scores), (fewer, shorter, shared) = (
            measure(folder, task, options.limit, dtype, shares) for shares in (False, True)
        )
        different = [
            sum(one != other for one, other in zip(scores.by_example[key], shared.by_example[key], strict=True))
            for key in scores.by_example
        ]
        metrics = ", ".join(f"{result.metric} {result.value:.3f}" for result in shared.results)
        times = f"{seconds:.1f}", f"{shorter:.1f}", f"{seconds / shorter:.2f}"
        examples = str(scores.results[0].examples)
        rows.append([task.name, examples, f"{tokens:,}", f"{fewer:,}", *times, str(max(different)), metrics])
    headings = ["task", "examples", "tokens", "shared", "seconds", "shared", "times", "scores that differ", ""]
    show(f"Contexts shared by endings: {folder.name}, {options.dtype}, one thread", headings, rows)


if __name__ == "__main__":
    main()
