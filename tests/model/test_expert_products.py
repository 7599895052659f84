"""Experts that are computed together give what experts one by one give, forward and backward."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm_barber.model import expert_products
from llm_barber.model.expert_products import LARGE_WEIGHT, Products, choose_products
from llm_barber.model.experts import DOWN, Experts
from llm_barber.model.routes import FEWEST_ROWS, Routes, join_experts, take
from tests.helpers.experts import EXPERTS, FAMILIES, HIDDEN, TOGETHER, Operations, split

# Of the largest value: sums are ordered otherwise; in bfloat16 each product is rounded to 2^-9.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def spread(tokens: int) -> Tensor:
    """Two experts for each token, at random; the last one has no token."""
    scores = torch.rand(tokens, EXPERTS - 1, generator=torch.Generator().manual_seed(tokens))
    return scores.topk(2).indices


ROUTES: dict[str, tuple[int, Tensor]] = {  # by name: sequences, and the experts of each token
    "spread": (1, spread(30)),
    "spread over sequences": (3, spread(30)),
    "all on one": (1, torch.full((30, 1), 4)),
    "all on one, over sequences": (3, torch.full((30, 1), 0)),
    "one token": (1, spread(1)),
    "more experts than tokens": (2, spread(2)),
    "two kinds of loads": (3, torch.cat([torch.full((90, 1), 1), spread(90)[:, :1] % 2 + 2], 1)),
}


def inputs(index: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """States of tokens, and weights of their experts."""
    made = torch.Generator().manual_seed(1)
    return torch.randn(len(index), HIDDEN, generator=made).to(dtype), torch.rand(index.shape, generator=made).to(dtype)


def route_by_route(experts: Experts, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The definition: each token by itself, through each of its experts."""
    outputs = []
    for token, state in enumerate(hidden):
        output = torch.zeros_like(state)
        for choice, number in enumerate(index[token].tolist()):
            expert: Any = experts[number]
            inner = experts.combine(lambda name, rows, expert=expert: expert[name](rows), state.unsqueeze(0))
            output = output + weights[token, choice] * expert[DOWN](inner)[0]
        outputs.append(output)
    return torch.stack(outputs)


def with_gradients(compute: Callable[..., Tensor], experts: Experts, hidden: Tensor, *rest: Tensor) -> list[Tensor]:
    """Output, and gradients by the states and all weights; zeros by weights that no token reaches."""
    weights = [linear.weight for linear in experts.modules() if isinstance(linear, nn.Linear)]
    variables = [hidden.clone().requires_grad_(), *(weight.requires_grad_() for weight in weights)]
    output = compute(variables[0], *rest)
    made = torch.Generator().manual_seed(2)
    direction = torch.randn(output.shape, generator=made).to(output.dtype)
    gradients = torch.autograd.grad(output, variables, direction, allow_unused=True)
    experts.requires_grad_(False)
    return [
        output.detach(),
        *(
            torch.zeros_like(of) if gradient is None else gradient
            for gradient, of in zip(gradients, variables, strict=True)
        ),
    ]


def assert_close(results: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for result, of in zip(results, expected, strict=True):
        assert result.dtype == of.dtype
        torch.testing.assert_close(result, of, rtol=0, atol=tolerance * float(of.abs().max().clamp_min(1)))


@pytest.mark.parametrize("routes", ROUTES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("products", [Products.LOOP, Products.PADDED])  # PyTorch's grouped_mm has no float64
def test_experts_are_their_definition(
    family: str, routes: str, products: Products, force_products: Callable[[Products], None]
) -> None:
    experts = split(family, torch.float64)
    experts.sequences, index = ROUTES[routes]
    hidden, weights = inputs(index, torch.float64)
    force_products(products)
    results = with_gradients(experts, experts, hidden, index, weights)
    expected = with_gradients(lambda *arguments: route_by_route(experts, *arguments), experts, hidden, index, weights)
    assert_close(results, expected, TOLERANCE[torch.float64])
    assert experts.tokens.tolist() == index.flatten().bincount(minlength=EXPERTS).tolist()


@pytest.mark.parametrize("routes", ROUTES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("products", TOGETHER)
def test_together_equals_one_by_one_and_itself(
    family: str, routes: str, dtype: torch.dtype, products: Products, force_products: Callable[[Products], None]
) -> None:
    experts = split(family, dtype)
    experts.sequences, index = ROUTES[routes]
    hidden, weights = inputs(index, dtype)
    force_products(Products.LOOP)
    expected = with_gradients(experts, experts, hidden, index, weights)
    force_products(products)
    results, again = (with_gradients(experts, experts, hidden, index, weights) for _ in range(2))
    assert_close(results, expected, TOLERANCE[dtype])
    assert all(map(torch.equal, results, again))
    assert experts.tokens.tolist() == (3 * index.flatten().bincount(minlength=EXPERTS)).tolist()


@pytest.mark.parametrize("routes", ROUTES)
@pytest.mark.parametrize("products", [Products.LOOP, *TOGETHER])
def test_listeners_get_each_sequence_of_each_expert(
    routes: str, products: Products, force_products: Callable[[Products], None]
) -> None:
    """Rows of tokens in their order, then zeros; the linears that read the same rows get the same objects."""
    experts = split("gpt_oss", torch.float32)
    experts.sequences, index = ROUTES[routes]
    hidden, weights = inputs(index, torch.float32)
    force_products(products)
    read: dict[str, dict[int, Tensor]] = {}
    objects: list[Any] = []

    def listen(linear: str, rows: Tensor, output: Tensor | None, view: Any) -> None:
        assert (output is None) is before
        parts = view(rows)
        objects.append([tensor for _, tensor in parts])
        assert all(a is b for a, b in zip(objects[-1], [tensor for _, tensor in view(rows)], strict=True))
        for numbers, part in parts:
            assert part.shape[:2] == (len(numbers), experts.sequences)
            read.setdefault(linear, {}).update(zip(numbers, part, strict=True))

    for before in (True, False):
        read.clear()
        handle = experts.listen(listen, before)
        experts(hidden, index, weights)
        handle.remove()
        assert all(sorted(of_linear) == list(range(EXPERTS)) for of_linear in read.values())
        states = hidden.view(experts.sequences, -1, HIDDEN)
        chosen = index.view(experts.sequences, -1, index.shape[1])
        for number, rows in read["gate_up_proj"].items():
            for sequence, of_sequence in enumerate(rows):
                expected = states[sequence][(chosen[sequence] == number).any(1)]
                assert torch.equal(of_sequence[: len(expected)], expected)
                assert not of_sequence[len(expected) :].any()
                assert not read["down_proj"][number][sequence, len(expected) :].any()  # in spite of biases
    objects.clear()
    experts(hidden, index, weights)
    assert not objects


def test_padding_is_bounded() -> None:
    """All rows together: less than twice what they would be one by one, and `FEWEST_ROWS` for each expert."""
    made = torch.Generator().manual_seed(0)
    for experts, tokens, chosen, sequences in ((128, 2048, 8, 1), (64, 512, 2, 4), (8, 64, 2, 1), (256, 8, 8, 8)):
        for skew in (0.0, 1.0, 4.0):
            load = torch.arange(1, experts + 1).float().pow(-skew)
            index = load.expand(tokens, experts).multinomial(chosen, generator=made)
            routes = Routes(index, experts, sequences)
            alone, together = routes.padded(False), routes.padded(True)
            assert len(alone.buckets) == experts
            assert len(together.buckets) <= (tokens // sequences).bit_length()
            assert sorted(number for bucket in together.buckets for number in bucket.experts) == list(range(experts))
            assert len(together.routes) < 2 * len(alone.routes) + FEWEST_ROWS * experts * sequences
            assert len(alone.routes) <= sequences * (index.numel() + experts)
            for layout in (alone, together, routes.sorted()):
                assert sum(bucket.rows for bucket in layout.buckets) == len(layout.routes)
                assert torch.equal(layout.routes[layout.slots.flatten()], torch.arange(index.numel()))
    assert len(Routes(torch.zeros(2048, 1, dtype=torch.int64), 128, 1).padded(True).routes) <= 2048 + 127


def test_experts_share_a_bucket_with_experts_of_their_size() -> None:
    assert join_experts([1, 16, 17, 32, 33, 1000, 64]) == [(0, 1), (2, 3), (4, 6), (5,)]
    assert join_experts([]) == []


@pytest.mark.parametrize("gaps", [False, True])
def test_taking_rows_goes_back_by_the_same_way(gaps: bool) -> None:
    rows = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([4, 0, 1, 1, 2, 3] + ([-1] if gaps else []))
    back = torch.tensor([[1, -1], [2, 3], [4, -1], [5, -1], [0, -1]])
    taken = take(rows, index, back, gaps, True)
    expected = rows[index.clamp_min(0)] * (index >= 0).unsqueeze(1)
    assert torch.equal(taken, expected)
    assert torch.autograd.gradcheck(lambda values: take(values, index, back, gaps, True), rows)


def test_products_are_chosen_by_device_dtype_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(768, 2048), (2048, 768)]
    assert choose_products(torch.zeros(4, 2048), shapes) is Products.LOOP  # a CPU
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)

    def on_gpu(dtype: torch.dtype) -> Any:
        return SimpleNamespace(device=torch.device("cuda:0"), dtype=dtype, element_size=lambda: dtype.itemsize)

    monkeypatch.setattr(expert_products.nn.functional, "grouped_mm", lambda *_: None, raising=False)
    for capability in ((8, 0), (9, 0), (10, 3), (12, 0)):
        fast = Products.GROUPED if capability == (9, 0) else Products.PADDED
        assert choose_products(on_gpu(torch.bfloat16), shapes) is fast
        assert choose_products(on_gpu(torch.float32), shapes) is Products.PADDED
        assert choose_products(on_gpu(torch.bfloat16), [(768, 2052)]) is Products.PADDED  # strides of 16 bytes
        assert choose_products(on_gpu(torch.bfloat16), [(4096, LARGE_WEIGHT // 4096)]) is fast
        assert choose_products(on_gpu(torch.bfloat16), [(4096, LARGE_WEIGHT // 4096 + 8)]) is Products.LOOP
    monkeypatch.delattr(expert_products.nn.functional, "grouped_mm")  # before torch 2.10
    assert choose_products(on_gpu(torch.bfloat16), shapes) is Products.PADDED


@pytest.mark.parametrize("products", TOGETHER)
def test_operations_do_not_grow_with_the_number_of_experts(
    products: Products, force_products: Callable[[Products], None]
) -> None:
    """Forward and back; one by one, each expert adds some."""
    counts: dict[Products, list[int]] = {Products.LOOP: [], products: []}
    for way, of_way in counts.items():
        force_products(way)
        for number in (4, 32):
            experts = split("qwen3_moe", torch.float32, num_experts=number)
            index = (torch.arange(128) % number).view(64, 2)  # as many tokens for each
            hidden, weights = inputs(index, torch.float32)
            with Operations() as counted:
                with_gradients(experts, experts, hidden, index, weights)
            of_way.append(counted.count)
    assert counts[products][0] == counts[products][1]
    assert counts[Products.LOOP][1] > 4 * counts[products][1]
