"""Measure the time of exact swaps and of the Gram matrix that they need, on a large random linear.

Goal: 100 swaps a row take about as long as the Gram matrix; with N:M the default is 400. It prints seconds by target.

    python benchmarks/swaps.py
    python benchmarks/swaps.py --shape 4096x4096 --samples 128 --seqlen 2048 --threads 2
"""

import argparse
import time
from collections.abc import Callable

import torch
from common import keep, show

from llm_barber.masking.gram import GramMatrix, gram_flops
from llm_barber.masking.granularity import Granularity
from llm_barber.masking.initial import initial_mask
from llm_barber.masking.pattern import NofM, Pattern, Unstructured
from llm_barber.masking.saliency import wanda
from llm_barber.masking.swaps import swap_pairs

TARGETS: dict[str, Pattern] = {
    "50 %": Unstructured(0.5),
    "70 %": Unstructured(0.7),
    "2:4": NofM(2, 4),
    "4:8": NofM(4, 8),
}


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4096x4096", help="OUTxIN")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--swaps", default="100,400", help="most swaps a row")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    height, width = map(int, options.shape.split("x"))
    made = torch.Generator().manual_seed(0)
    weight = torch.randn(height, width, generator=made)
    mixing = torch.randn(width // 4, width, generator=made)  # what makes inputs correlated
    statistic = GramMatrix(width, weight.device)
    seconds = 0.0
    for _ in range(options.samples):
        inputs = torch.randn(1, options.seqlen, width, generator=made)
        inputs += torch.randn(1, options.seqlen, width // 4, generator=made) @ mixing / (width // 4) ** 0.5
        batch = inputs.bfloat16()
        seconds += timed(lambda: statistic.update(batch))  # noqa: B023
    gram = statistic.mean
    rate = gram_flops(options.samples * options.seqlen, width) / seconds / 1e9
    rows = [["the Gram matrix", "", f"{seconds:.1f}", "", f"{rate:.0f} GFLOP/s"]]
    for name, pattern in TARGETS.items():
        mask = initial_mask(wanda(weight, gram.diagonal()), pattern, Granularity.OUTPUT)
        n_of_m = pattern if isinstance(pattern, NofM) else None
        for swaps in map(int, options.swaps.split(",")):
            results: list[torch.Tensor] = []
            took = timed(lambda: results.extend(swap_pairs(mask, weight, gram, swaps, pattern=n_of_m)))  # noqa: B023
            rows.append(
                [name, str(swaps), f"{took:.1f}", f"{took / seconds:.2f}", f"{results[1].float().mean():.0f} a row"]
            )
    title = f"swaps of a {options.shape} linear, {options.samples} × {options.seqlen} tokens, {options.threads} threads"
    headings = ["", "at most", "seconds", "of the Gram matrix's", ""]
    keep("swaps", {"title": title, "headings": headings, "rows": rows})
    show(title, headings, rows)


if __name__ == "__main__":
    main()
