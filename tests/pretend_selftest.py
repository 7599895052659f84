"""Checks of `llm-barber selftest` on the pretend GPU, and how often a step of decoding waits for it.

    python -m tests.pretend_selftest

prints a line of JSON for each finding: its text, and whether it passed. The last line is the number of waits.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from llm_barber.runtime.load import load
from llm_barber.tools.selftest.bench import TINY, Bench
from llm_barber.tools.selftest.graphs import Decoder
from llm_barber.tools.selftest.masks import check_masks
from tests import pretend_gpu
from tests.pretend_gpu import DEVICE, on_device


def main() -> None:
    library = torch.library.Library("aten", "IMPL")
    pretend_gpu._register(library)
    by_name = patch("llm_barber.loading.preparing.resolve_device", torch.device)
    with TemporaryDirectory() as folder, sdpa_kernel(SDPBackend.MATH), on_device(), by_name:
        bench = Bench(DEVICE, torch.float32, Path(folder), TINY)
        for finding in check_masks(bench):
            print(json.dumps([finding.text, finding.passed]), flush=True)
        print(waits_of_a_step(bench), flush=True)


@torch.no_grad()
def waits_of_a_step(bench: Bench) -> int:
    """Number of times that a step of decoding with packed weights waits for the device."""
    output, _, _ = bench.prune(torch.device("cpu"), initial="magnitude", rebuild=False, format="packed")
    with patch("llm_barber.runtime.load.resolve_device", torch.device):
        model = load(output, keep_packed=True, dtype=torch.float32, device=str(DEVICE))
    decoder = Decoder(model, torch.arange(8)[None].to(DEVICE), 4)
    decoder.step()
    before = pretend_gpu.waits[0]
    decoder.step()
    return pretend_gpu.waits[0] - before


if __name__ == "__main__":
    main()
