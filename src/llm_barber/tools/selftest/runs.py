"""Runs that are repeated, and that run out of memory."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from llm_barber.tools.selftest.bench import Bench, Size
from llm_barber.tools.selftest.masks import MASK_CHECKS, judge_masks
from llm_barber.tools.selftest.result import Finding, NotRunError

# Runs that are repeated: every step of the presets, experts, and N:M.
REPEATED: dict[str, dict[str, Any]] = {
    "paper": {"preset": "paper", "rebuild_ratio": 0.5},
    "mask": {"preset": "mask", "tune_passes": 1},
    "best": {"preset": "best", "tune_passes": 1},
    "experts, 2:4": {"family": "mixtral", "preset": "mask", "pattern": "2:4", "tune_passes": 1},
}
# Windows long enough that a batch of them takes far more memory than a window, and than the weights.
ROOMY = Size(256, 704, 2, 8, 4, 512, windows=16, tokens=1024)


def check_repeat(bench: Bench) -> Iterator[Finding]:
    """Run twice, and compare every file on which a loaded model depends."""
    for name, settings in REPEATED.items():
        runs = [bench.prune(bench.device, **settings) for _ in range(2)]
        files = [report.files for _, report, _ in runs]
        changed = sorted(path for path in files[0] if files[0][path] != files[1].get(path))
        unordered = any("no fixed order" in warning for _, _, heard in runs for warning in heard)
        shown = f"other bytes in {', '.join(changed)}" if changed else f"{len(files[0])} files, the same bytes"
        text = f"{name}: {shown}"
        if unordered:
            text += "; PyTorch has no fixed order for an operation of its gradients"
        yield Finding(text=text, passed=not changed and files[0].keys() == files[1].keys() and not unordered)


def check_memory(bench: Bench) -> Iterator[Finding]:
    """Run with less memory than all windows together take, and compare the masks with those of an unlimited run.

    Raises:
        NotRunError: the device is a CPU, or more windows take hardly more memory.
    """
    if not bench.on_gpu:
        raise NotRunError("a CPU's memory has no such limit")
    method = MASK_CHECKS["paper"]
    settings = {
        **method.settings, "dtype": "float32",
        "model": bench.model(size=ROOMY), "calibration": bench.windows(size=ROOMY),
    }  # fmt: skip
    small, _, _ = _reserved(bench, **settings, batch_size=1, activations_off_device=True)
    large, reference, _ = _reserved(bench, **settings, batch_size=ROOMY.windows)
    if large < 1.5 * small:
        raise NotRunError(f"{ROOMY.windows} windows took {large / 2**20:.0f} MiB, one {small / 2**20:.0f} MiB")
    limit = math.sqrt(small * large)
    with limited_memory(bench.device, limit):
        _, output, heard = _reserved(bench, **settings, batch_size=ROOMY.windows)
    recovered = [warning for warning in heard if "memory is too small" in warning]
    sizes = f"{limit / 2**20:.0f} MiB where {large / 2**20:.0f} were taken"
    yield Finding(
        text=f"{sizes}: {'; '.join(recovered) or 'the limit was never reached, so that nothing was recovered from'}",
        passed=bool(recovered),
    )
    yield judge_masks("paper, float32, after it ran out", reference, output, method.float32)


def _reserved(bench: Bench, **settings: Any) -> tuple[int, Path, list[str]]:
    """Prune; returns the bytes of the GPU that PyTorch took at the peak, the output, and warnings."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(bench.device)
    output, _, heard = bench.prune(bench.device, **settings)
    return torch.cuda.max_memory_reserved(bench.device), output, heard


@contextmanager
def limited_memory(device: torch.device, limit: float) -> Iterator[None]:
    """Let this process take so many bytes of a GPU within the context."""
    before = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)(device)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(limit / total, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)
        torch.cuda.empty_cache()
