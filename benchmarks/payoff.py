"""Measure what a pruned model gains: speed, bytes, memory and quality, against dense and quantised models. Resumable.

    python benchmarks/payoff.py kernels              # products of single linears
    python benchmarks/payoff.py models --llama LLAMA/bin/python --model gemma3-270m=GGUF
    python benchmarks/payoff.py quality --data DATA --llama LLAMA/bin/python --model gemma3-270m=GGUF
    python benchmarks/payoff.py page                 # docs/results/payoff*.md, from what was kept

Each prints a table. Finished cells are kept in `benchmarks/results/payoff`, those of speed in a folder by the
instructions that the processor has, and measured again when settings, machine, versions or the measured code change.
`--quick` takes two minutes and keeps nothing. Masks are by magnitude: sizes and speeds depend on the share of pruned
weights, not on which these are. `LLM_BARBER_ISA=avx2` measures the path for processors without AVX-512, and `models
--without-c` NumPy alone; their cells go to folders of their own.
"""

import argparse
from pathlib import Path

import payoff_kernels
import payoff_models
import payoff_page
import payoff_quality
from payoff_cells import RESULTS

from llm_barber import native

PARTS = {"kernels": payoff_kernels, "models": payoff_models, "quality": payoff_quality, "page": payoff_page}


def main() -> None:
    options = make_parser().parse_args()
    quick = getattr(options, "quick", False)
    if quick:
        vars(options).update(PARTS[options.part].QUICK)
    PARTS[options.part].run(options, None if quick else folder_of_results(options))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="part", required=True)
    for name, module in PARTS.items():
        command = commands.add_parser(name, help=(module.__doc__ or "").splitlines()[0])
        if hasattr(module, "QUICK"):
            command.add_argument("--quick", action="store_true", help="two minutes, with small settings; keeps nothing")
        module.add_options(command)
    return parser


def folder_of_results(options: argparse.Namespace) -> Path:
    """Folder of the kept cells: speeds have one by the processor's instructions, in it one where fewer are forced."""
    if options.part in ("quality", "page"):
        return RESULTS
    present = native.processor_instructions()
    folder = RESULTS / present.name.lower()
    if native.library() is None or getattr(options, "without_c", False):
        return folder / "numpy"
    used = native.instructions()
    return folder if used == present else folder / used.name.lower()


if __name__ == "__main__":
    main()
