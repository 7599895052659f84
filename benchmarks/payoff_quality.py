"""Perplexity and KL of the quantised dense models, on the windows of the kept results of pruned ones."""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import show
from kept import kept_cell
from payoff_cells import Cells
from payoff_peers import CONTEXT, INSTALL, TYPES, Llama, file_of_type
from payoff_sides import DENSE, Side, Source, sources
from torch import Tensor

from llm_barber.cli.progress import ConsoleProgress
from llm_barber.evaluation.predictions import HiddenStates, measure_predictions
from llm_barber.evaluation.texts import evaluation_text, evaluation_windows
from llm_barber.loading.tokenizer import load_tokenizer

ROOT = Path(__file__).parent / "results"
# Results of pruned models, by the name of the model here.
KEPT = {
    "smollm2-135m": "smollm2-135m-64x1024",
    "gemma3-270m": "gemma3-270m-32x512",
    "qwen2.5-coder-0.5b": "qwen2.5-coder-0.5b",
    "qwen2.5-coder-1.5b": "qwen2.5-coder-1.5b-32x512",
}
PRESETS = ("mask", "best")
WITHOUT_PRESETS = ("sparsegpt-updates", "wanda")  # shown of a sparsity for which the kept results have no preset
TEXT = "text/wikitext2-raw-test.txt"
SOURCES = ("evaluation",)  # folders of the package that the results depend on
QUICK = {"windows": 1}
SEQLEN = 1024
POSITIONS = 128  # whose logits are compared at once
CLOSE = 0.01  # most relative difference of the dense perplexity here and in the kept results


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help=f"folder with {TEXT}")
    parser.add_argument(
        "--model", action="append", default=[], metavar="NAME=GGUF",
        help="a GGUF file beside SmolLM2-135M from its package; repeat for more",
    )  # fmt: skip
    parser.add_argument("--windows", type=int, help=f"of {SEQLEN} tokens (default: as in the kept results)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, default=Path("build/payoff"), help="folder for quantised models")
    parser.add_argument("--llama", metavar="PYTHON", help="the Python that has llama-cpp-python")


def run(options: argparse.Namespace, folder: Path | None) -> None:
    """Measure all cells that are not kept, and print the table."""
    if not options.llama:
        raise SystemExit(INSTALL)
    cells, llama = Cells("quality", folder, SOURCES), Llama(options.llama)
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    rows = []
    with torch.inference_mode(), ConsoleProgress() as progress:
        for source in sources(options.model, options.work, without_random=True):
            kept = kept_rows(source.name)
            windows = options.windows or (kept[0].windows if kept else 16)
            for kind in TYPES:
                progress.stage(f"{source.name} {kind}")
                settings = {"windows": windows, "seqlen": SEQLEN, "text": TEXT, "about": llama.about}
                measure = measurement(source, kind, windows, options, llama, progress)
                rows.append([source.name, kind, *columns(cells.result(f"{source.name} {kind}", settings, measure))])
            rows += [[source.name, row.name, f"{row.perplexity:.2f}", f"{row.dense:.2f}", f"{row.divergence:.4f}"]
                     for row in kept]  # fmt: skip
    llama.close()
    show(
        f"{TEXT}, windows of {SEQLEN} tokens; pruned rows: kept results",
        ["model", "side", "perplexity", "dense, PyTorch", "KL, nats"],
        rows,
    )


def measurement(
    source: Source, kind: str, windows: int, options: argparse.Namespace, llama: Llama, progress: Any
) -> Callable[[], dict[str, Any]]:
    """Make the function that measures one quantised model against the dense one in bfloat16."""

    def measure() -> dict[str, Any]:
        if source.gguf is None:
            raise SystemExit(f"{source.name}: give its GGUF file")
        path = file_of_type(llama, source.gguf, options.work, kind, options.threads)
        llama.ask("load", path=str(path), threads=options.threads, context=CONTEXT)
        tokenizer = load_tokenizer(source.folder)
        tokens = evaluation_windows(TEXT, evaluation_text(str(options.data / TEXT)), tokenizer, SEQLEN, windows)
        dense = Side(DENSE, source.folder).load("bfloat16")
        scratch = options.work / "logits.npy"
        perplexity, against = measure_predictions(
            TEXT,
            tokens,
            states_of(Lazy(lambda number: llama.logits(tokens[number].tolist(), scratch), len(tokens))),
            states_of(Lazy(lambda number: dense(tokens[number : number + 1], use_cache=False).logits[0], len(tokens))),
            progress,
        )
        assert against is not None
        check_dense(source.name, against.perplexity, windows)
        return {
            "perplexity": perplexity,
            "dense": against.perplexity,
            "divergence": against.divergence,
            "top_agreement": against.top_agreement,
            "windows": len(tokens),
            "disk": path.stat().st_size,
        }

    return measure


class Lazy:
    """A sequence whose items are computed when they are asked for; the last one is kept."""

    def __init__(self, compute: Callable[[int], Tensor], length: int) -> None:
        self._compute, self._length = compute, length
        self._last: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> Tensor:
        if self._last is None or self._last[0] != number:
            self._last = number, self._compute(number)
        return self._last[1]


class Logits:
    """A model for `measure_predictions` whose logits are there already."""

    positions_at_once = POSITIONS

    def logits(self, states: Tensor, where: str) -> Tensor:
        """Float32 copies of logits, since the caller overwrites them."""
        return states.float().clone()


def states_of(logits: Lazy) -> HiddenStates:
    """Logits of each window in place of hidden states."""
    return HiddenStates(Logits(), logits)


@dataclass(frozen=True)
class KeptRow:
    """Kept result of a pruned model: its preset or method, its target, perplexities, KL in nats, windows."""

    preset: str
    target: str
    perplexity: float
    dense: float
    divergence: float
    windows: int

    @property
    def name(self) -> str:
        """Name of the row."""
        return f"{self.preset} {self.target}"


def kept_rows(model: str, targets: tuple[str, ...] = ("0.5", "0.7", "2:4")) -> list[KeptRow]:
    """Kept results of a model's presets, first seed; none where the model has none."""
    if model not in KEPT:
        return []
    folder = ROOT / KEPT[model] / "cells"
    rows = list(_kept_rows(folder, PRESETS, targets))
    left = tuple(target for target in targets if target not in {row.target for row in rows})
    return rows + list(_kept_rows(folder, WITHOUT_PRESETS, left))


def _kept_rows(folder: Path, methods: tuple[str, ...], targets: tuple[str, ...]) -> Iterator[KeptRow]:
    for preset in methods:
        for target in targets:
            if cell := kept_cell(folder, preset, target):
                text = cell["evaluation"]["texts"][0]
                against = text["against"]
                yield KeptRow(
                    preset, target, text["perplexity"], against["perplexity"], against["divergence"], text["windows"]
                )


def check_dense(model: str, perplexity: float, windows: int) -> None:
    """Refuse numbers whose windows or dense model are not those of the kept results."""
    for row in kept_rows(model):
        if row.windows == windows and abs(perplexity / row.dense - 1) > CLOSE:
            raise SystemExit(f"{model}: dense perplexity {perplexity:.2f} here, {row.dense:.2f} in the kept results")


def columns(result: dict[str, Any]) -> list[str]:
    """Columns of a quantised model: its perplexity, the dense one's, KL."""
    return [f"{result['perplexity']:.2f}", f"{result['dense']:.2f}", f"{result['divergence']:.4f}"]
