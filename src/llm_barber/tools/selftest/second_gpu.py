"""Runs and products on another GPU than the current one."""

from collections.abc import Iterator

import torch

from llm_barber.tools.selftest.bench import Bench
from llm_barber.tools.selftest.masks import MASK_CHECKS, judge_masks
from llm_barber.tools.selftest.products import judge_packed
from llm_barber.tools.selftest.result import Finding, NotRunError

ON_BOTH = ("wanda", "mask")  # methods of which both GPUs make masks


def check_second_gpu(bench: Bench) -> Iterator[Finding]:
    """Prune and multiply on another GPU; the current GPU stays the first one.

    Raises:
        NotRunError: there is no other GPU.
    """
    if not bench.on_gpu:
        raise NotRunError("the device is the CPU")
    count = torch.cuda.device_count()
    if count < 2:
        raise NotRunError(f"PyTorch sees {count} GPU")
    first = torch.device("cuda", bench.device.index or 0)
    second = torch.device("cuda", 1 if first.index == 0 else 0)
    for name in ON_BOTH:
        method = MASK_CHECKS[name]
        reference, _, _ = bench.prune(first, **method.settings, dtype="float32")
        with torch.cuda.device(first):
            output, report, _ = bench.prune(second, **method.settings, dtype="float32")
            stays = torch.cuda.current_device() == first.index
        finding = judge_masks(f"{name}, float32, {report.device} against {first}", reference, output, method.float32)
        yield finding.model_copy(update={"passed": finding.passed and stays and report.device == str(second)})
    with torch.cuda.device(first):
        finding = judge_packed(second, bench.dtype, rounded=False)
    yield finding.model_copy(update={"text": f"{second}: {finding.text}"})
