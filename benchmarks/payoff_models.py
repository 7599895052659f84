"""Whole models: decode and prefill, memory and loading; packed against dense PyTorch, and llama.cpp beside them."""

import argparse
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from common import show
from payoff_cells import Cells, Spread, in_turn, timed
from payoff_kernels import numbers
from payoff_peers import CONTEXT, INSTALL, TYPES, Llama, file_of_type, write_gguf
from payoff_sides import (
    DENSE,
    KINDS,
    PROMPT,
    Side,
    Source,
    decoding,
    packed,
    prefill,
    sources,
)

from llm_barber import native

SOURCES = ("native", "runtime", "checkpoint", "loading")  # folders of the package that the results depend on
QUICK = {"targets": "0.5", "kinds": "packed", "threads": "1", "decode": 8, "prefill": 64, "rounds": 2,
         "loads": 1, "without_random": True}  # fmt: skip
HEADINGS = [
    "model", "side", "threads", "disk MB", "memory MB", "load s", "decode: dense", "tokens/s", "ratio",
    "prefill: dense", "tokens/s", "ratio",
]  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", action="append", default=[], metavar="NAME=SOURCE",
        help="a folder, hub id or GGUF file beside SmolLM2-135M from its package; repeat for more",
    )  # fmt: skip
    parser.add_argument("--without-random", action="store_true", help="leave out the random layers of a 7B model")
    parser.add_argument("--targets", default="0.5,0.7,2:4", help="sparsities and N:M patterns")
    parser.add_argument("--kinds", default=",".join(KINDS), help="how packed models are loaded")
    parser.add_argument("--dtypes", default="bfloat16", help="of the weights in memory")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--decode", type=int, default=24, help="new tokens")
    parser.add_argument("--prefill", type=int, default=256, help="tokens")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each side")
    parser.add_argument("--loads", type=int, default=3, help="loads of each side; the fastest counts")
    parser.add_argument("--work", type=Path, default=Path("build/payoff"), help="folder for pruned and packed models")
    parser.add_argument("--llama", metavar="PYTHON", help="the Python that has llama-cpp-python")
    parser.add_argument("--without-c", action="store_true", help="as where the C extension was not built")


def run(options: argparse.Namespace, folder: Path | None) -> None:
    """Measure all cells that are not kept, and print the table."""
    if options.without_c:
        native.library = lambda: None
    cells = Cells("models", folder, SOURCES)
    llama = Llama(options.llama) if options.llama else None
    options.work.mkdir(parents=True, exist_ok=True)
    rows = []
    with torch.inference_mode():
        for source in sources(options.model, options.work, options.without_random):
            for dtype in options.dtypes.split(","):
                measured = Measured(source, dtype, options, cells, llama)
                rows += measured.rows()
    if llama is not None:
        llama.close()
    show(
        f"Decode: batch 1, {options.decode} tokens after {len(PROMPT)}; prefill: {options.prefill}; the fastest of "
        f"{options.rounds}, each side in turn with dense PyTorch",
        HEADINGS,
        rows,
    )
    if llama is None:
        print(INSTALL)


class Measured:
    """The cells of a model in a dtype."""

    def __init__(
        self, source: Source, dtype: str, options: argparse.Namespace, cells: Cells, llama: Llama | None
    ) -> None:
        self._source, self._dtype, self._options, self._cells, self._llama = source, dtype, options, cells, llama
        self._settings = {"decode": options.decode, "prefill": options.prefill, "rounds": options.rounds}
        self._dense_side = Side(DENSE, source.folder)
        self._dense = cache(lambda: self._dense_side.load(dtype))

    def rows(self) -> Iterator[list[str]]:
        """Rows of the table, one for each side and number of threads."""
        dense = self._loading(self._dense_side)
        yield [self._name, f"{DENSE} {self._dtype}", "", *loading_columns(dense), *[""] * 6]
        options = self._options
        for target in options.targets.split(","):
            for kind in options.kinds.split(","):
                yield from self._rows_of(Side(kind, packed(self._source, target, kind, options.work), target))
        if self._llama is not None and self._dtype == "bfloat16":
            for kind in TYPES:
                yield from self._rows_of_llama(kind)

    @property
    def _name(self) -> str:
        return self._source.name

    def _rows_of(self, side: Side) -> Iterator[list[str]]:
        loading = self._loading(side)
        for threads in numbers(self._options.threads):
            load = cache(lambda: side.load(self._dtype))  # again, since `auto` chooses for a number of threads

            def works(tokens: int, kind: Callable[..., Callable[[], object]]) -> Callable[[], float]:
                return timed(kind(load(), tokens))  # noqa: B023

            yield self._row(side.name, threads, loading, works)

    def _rows_of_llama(self, kind: str) -> Iterator[list[str]]:
        llama = self._llama
        assert llama is not None
        source = self._source.gguf or self._gguf_of_checkpoint()
        if source is None:
            return
        name = f"llama.cpp {kind}"

        @cache
        def loaded() -> dict[str, float]:
            threads = max(numbers(self._options.threads))
            path = file_of_type(llama, source, self._options.work, kind, threads)
            seconds = [llama.ask("load", path=str(path), threads=threads, context=CONTEXT) for _ in range(2)]
            return {**seconds[1], "disk": path.stat().st_size}

        loading = self._cell(f"{name} loading", {}, loaded)
        for threads in numbers(self._options.threads):

            def works(tokens: int, kind: Callable[..., Callable[[], object]]) -> Callable[[], float]:
                loaded()
                llama.ask("threads", count=threads)  # noqa: B023
                if kind is decoding:
                    return llama.decoding(PROMPT, tokens)
                return llama.decoding(list(range(100, 100 + tokens)), 1)

            yield self._row(name, threads, loading, works)

    def _gguf_of_checkpoint(self) -> Path | None:
        """Write the GGUF file of a checkpoint without one, if it has no tokenizer: then only its speed is measured."""
        if (self._source.folder / "tokenizer.json").exists():
            print(f"{self._name}: llama.cpp is left out, since the model was not given as a GGUF file")
            return None
        target = self._options.work / f"{self._name}.gguf"
        return target if target.exists() else write_gguf(self._source.folder, target)

    def _row(self, name: str, threads: int, loading: dict[str, float], works: Callable[..., Any]) -> list[str]:
        def measure() -> dict[str, Any]:
            torch.set_num_threads(threads)
            return {
                work.__name__: in_turn(
                    {DENSE: timed(work(self._dense(), tokens)), "side": works(tokens, work)}, self._options.rounds
                )
                for work, tokens in ((decoding, self._options.decode), (prefill, self._options.prefill))
            }

        result = self._cell(f"{name} threads {threads}", self._settings, measure)
        return [
            self._name, name, str(threads), *loading_columns(loading),
            *speed_columns(result["decoding"], self._options.decode),
            *speed_columns(result["prefill"], self._options.prefill),
        ]  # fmt: skip

    def _loading(self, side: Side) -> dict[str, float]:
        settings = {"loads": self._options.loads}
        return self._cell(f"{side.name} loading", settings, lambda: side.loading(self._dtype, self._options.loads))

    def _cell(self, name: str, settings: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        print(f"{self._name} {self._dtype} {name} …", flush=True)
        return self._cells.result(f"{self._name} {self._dtype} {name}", settings, measure)


def loading_columns(loading: dict[str, float]) -> list[str]:
    """Megabytes on disk and in memory, seconds of loading."""
    return [f"{loading['disk'] / 1e6:,.0f}", f"{loading['memory'] / 1e6:,.0f}", f"{loading['seconds']:.1f}"]


def speed_columns(seconds: dict[str, dict[str, float]], tokens: int) -> list[str]:
    """Tokens per second of both sides, and their ratio, from the fastest measurements."""
    dense, side = (Spread(**seconds[name]).minimum for name in (DENSE, "side"))
    digits = 0 if tokens / dense >= 100 else 1
    return [f"{tokens / dense:,.{digits}f}", f"{tokens / side:,.{digits}f}", f"{dense / side:.2f}"]
