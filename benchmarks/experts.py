"""Measure a layer's experts: one by one, sorted for grouped_mm, and padded to buckets for bmm.

It prints milliseconds, forward, and forward and back with the gradients of all weights, by the shapes of models and the
number of tokens. Each figure is the least of several trials, which alternate between the ways of computing. On a CPU
with one thread it is time of the processor, so that other work on the machine hardly shows. Beside it are the
operations that PyTorch starts, without views: on a GPU each is a launch or more.

    python benchmarks/experts.py
    python benchmarks/experts.py --device cuda --tokens 2048,8192
"""

import argparse
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from common import keep, show
from llm_barber.model.expert_products import Products
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from llm_barber.model.experts import Experts, split_experts

# Hidden features, features inside an expert, experts, experts of a token.
SHAPES = {
    "64 tiny experts": (128, 64, 64, 4),
    "Granite 3.1 3B-A800M": (1536, 512, 40, 8),
    "OLMoE 1B-7B": (2048, 1024, 64, 8),
    "Qwen3-30B-A3B": (2048, 768, 128, 8),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Operations(TorchDispatchMode):
    """Counts operations that are not views."""

    count = 0

    def __torch_dispatch__(self, function: Any, _: Any, arguments: tuple[Any, ...] = (), named: Any = None) -> Any:
        returned = function._schema.returns
        views = [value.alias_info is not None and not value.alias_info.is_write for value in returned]
        self.count += not views or not all(views)
        return function(*arguments, **(named or {}))


def make_experts(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Experts:
    """Experts with random weights."""
    hidden, inner, count, chosen = shape
    config = AutoConfig.for_model(
        "qwen3_moe", hidden_size=hidden, moe_intermediate_size=inner, num_experts=count, num_experts_per_tok=chosen
    )
    parent = nn.Module()
    with torch.device("meta"):
        parent.experts = Qwen3MoeExperts(config)
    split_experts(parent)
    experts = parent.experts.to(dtype).to_empty(device=device)
    assert isinstance(experts, Experts)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, 0, 0.02)
    return experts


def make_inputs(
    shape: tuple[int, int, int, int], tokens: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """States of one sequence, and its routes: some experts get several times as many tokens as others."""
    hidden, _, count, chosen = shape
    made = torch.Generator().manual_seed(0)
    liked = torch.randn(count, generator=made) / 2
    scores, index = (torch.randn(tokens, count, generator=made) + liked).topk(chosen)
    states = torch.randn(tokens, hidden, generator=made)
    return states.to(device, dtype), index.to(device), scores.softmax(-1).to(device, dtype)


def least_milliseconds(calls: dict[str, Callable[[], object]], trials: int, device: torch.device) -> dict[str, float]:
    """Least milliseconds of each call; the calls alternate."""
    least = dict.fromkeys(calls, float("inf"))
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    for _ in range(trials + 1):  # the first call allocates
        for name, call in calls.items():
            start = clock()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            least[name] = min(least[name], 1000 * (clock() - start))
    return least


def measure(experts: Experts, inputs: tuple[Tensor, Tensor, Tensor], backward: bool, trials: int) -> list[str]:
    """Milliseconds, and operations, of each way of computing."""
    states, index, weights = inputs
    variables = [states.requires_grad_(backward), *experts.requires_grad_(backward).parameters()]

    def call(products: Products) -> None:
        with patch("llm_barber.model.experts.choose_products", lambda *_: products), torch.set_grad_enabled(backward):
            output = experts(states, index, weights)
            if backward:
                torch.autograd.grad(output, variables, torch.ones_like(output), allow_unused=True)

    ways = [way for way in Products if way is not Products.GROUPED or hasattr(nn.functional, "grouped_mm")]
    operations = {}
    for way in ways:
        with Operations() as counted:
            call(way)
        operations[way.name] = counted.count
    least = least_milliseconds({way.name: lambda way=way: call(way) for way in ways}, trials, states.device)
    return [f"{least[way.name]:.1f} ({operations[way.name]})" if way in ways else "–" for way in Products]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="names of shapes")
    parser.add_argument("--tokens", default="128,2048")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--trials", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    rows = []
    for dtype in options.dtypes.split(","):
        for name in options.shapes.split(","):
            experts = make_experts(SHAPES[name], DTYPES[dtype], device)
            for tokens in map(int, options.tokens.split(",")):
                inputs = make_inputs(SHAPES[name], tokens, DTYPES[dtype], device)
                for backward in (False, True):
                    label = [name, dtype, str(tokens), "and back" if backward else "forward"]
                    rows.append(label + measure(experts, inputs, backward, options.trials))
    title = f"milliseconds (operations) of a layer's experts, {options.device}, {options.threads} threads"
    headings = ["experts", "dtype", "tokens", "", *(way.value for way in Products)]
    keep("experts", {"title": title, "headings": headings, "rows": rows})
    show(title, headings, rows)


if __name__ == "__main__":
    main()
