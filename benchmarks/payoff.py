"""Measure what a pruned model gains: speed, bytes, memory and quality, against dense and quantised models. Resumable.

    python benchmarks/payoff.py kernels              # products of single linears
    python benchmarks/payoff.py models --llama LLAMA/bin/python --model gemma3-270m=GGUF
    python benchmarks/payoff.py quality --data DATA --llama LLAMA/bin/python --model gemma3-270m=GGUF
    python benchmarks/payoff.py page                 # docs/results/payoff*.md, from what was kept

Each prints a table. Finished cells are kept in `benchmarks/results/payoff/INSTRUCTIONS/PART.json`, those of quality,
which does not hang on instructions, in `benchmarks/results/payoff/quality.json`. They are measured again when settings,
machine, versions or the measured code change. `--quick` takes two minutes and keeps nothing. Masks are by magnitude:
sizes and speeds depend on the share of pruned weights, not on which these are. `LLM_BARBER_ISA=avx2` measures the path
for processors without AVX-512, and `models --without-c` NumPy alone.
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
    """Folder of the kept cells: speeds have one for each set of instructions."""
    if options.part in ("quality", "page"):
        return RESULTS
    with_c = native.library() is not None and not getattr(options, "without_c", False)
    return RESULTS / (native.instructions().name.lower() if with_c else "numpy")


if __name__ == "__main__":
    main()
