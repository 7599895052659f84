"""Stacks of experts' linears give each linear what it would get by itself."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llm_barber.masking.pattern import NofM
from llm_barber.method import stacks
from llm_barber.method.pruned_linear import PrunedLinear
from llm_barber.method.stacks import stack_linears
from tests.conftest import make_model, read_folder, save_tokens
from tests.helpers.tuned_runs import run

EXPERTS = "mlp.experts"


def linear(
    seed: int, shape: tuple[int, int] = (4, 8), fixed: bool = False, pattern: NofM | None = None
) -> PrunedLinear:
    generator = torch.Generator().manual_seed(seed)
    values, keep = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator) < 0.5
    stays = torch.rand(shape, generator=generator) < 0.1 if fixed else None
    return PrunedLinear(keep, values * keep, values, pattern, stays)


def equal(left: PrunedLinear, right: PrunedLinear) -> bool:
    return left.pattern == right.pattern and all(
        (one is None and other is None) or torch.equal(one, other)
        for one, other in (
            (left.keep, right.keep), (left.weight, right.weight), (left.values, right.values), (left.fixed, right.fixed)
        )
    )  # fmt: skip


def test_linears_of_one_place_and_shape_are_stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    linears = {
        "self_attn.q_proj": linear(0),
        f"{EXPERTS}.0.up_proj": linear(1),
        f"{EXPERTS}.0.down_proj": linear(2, (8, 4)),
        f"{EXPERTS}.1.up_proj": linear(3),
        f"{EXPERTS}.1.down_proj": linear(4, (8, 4), pattern=NofM(2, 4)),
        "mlp.shared_expert.up_proj": linear(5),
    }
    alone = stack_linears(linears, [EXPERTS])
    assert [stack.names for stack in alone] == [(name,) for name in linears]
    monkeypatch.setattr(stacks, "is_stacked", lambda _: True)
    stacked = {stack.name: stack for stack in stack_linears(linears, [EXPERTS])}
    assert {name: stack.names for name, stack in stacked.items() if len(stack.names) > 1} == {
        "mlp.experts.*.up_proj": (f"{EXPERTS}.0.up_proj", f"{EXPERTS}.1.up_proj")
    }
    assert sum(len(stack.names) for stack in stacked.values()) == len(linears)


@pytest.mark.parametrize("fixed", [(False, False), (True, False), (True, True)])
def test_linears_come_back_as_they_were(fixed: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "is_stacked", lambda _: True)
    linears = {f"{EXPERTS}.{number}.up_proj": linear(number, fixed=fixed[number]) for number in range(2)}
    (stack,) = stack_linears(linears, [EXPERTS])
    back = stack.linears()
    for name, original in linears.items():
        if original.fixed is None and any(fixed):
            original = PrunedLinear(
                original.keep, original.weight, original.values, None, torch.zeros_like(original.keep)
            )
        assert equal(back[name], original)
    values = {name: original.values for name, original in linears.items()}
    assert torch.equal(stack.join(values), stack.linear.values)
    name, of_last = values.popitem()
    joined = stack.split(stack.join(values))
    assert torch.equal(joined[name], torch.zeros_like(of_last))
    assert all(torch.equal(joined[name], each) for name, each in values.items())


def test_large_weights_and_those_of_a_cpu_are_not_stacked() -> None:
    assert not stacks.is_stacked(torch.empty(2, 2))
    assert stacks.is_stacked(torch.empty(2, 2, device="meta"))
    assert not stacks.is_stacked(torch.empty(2**13, 2**12, device="meta"))


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("mixtral", {"preset": "mask"}),
        ("mixtral", {"preset": "best"}),
        ("mixtral", {"preset": "mask", "pattern": "2:4"}),
        ("qwen2_moe", {"preset": "best", "guard": 0}),
    ],
    ids=str,
)
def test_a_tuned_mixture_has_the_same_bytes(
    family: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some experts have few tokens, and stay out of the stacks."""
    model = make_model(tmp_path / "model", family, torch.bfloat16)  # computed in float32
    text = save_tokens(tmp_path / "text.safetensors", 6, 24)
    common: dict[str, Any] = {"tune_passes": 2, **settings}
    run(model, tmp_path / "alone", text, **common)
    sizes: list[int] = []
    made = stacks._stack
    monkeypatch.setattr(stacks, "_stack", lambda names, linears: sizes.append(len(names)) or made(names, linears))
    monkeypatch.setattr(stacks, "is_stacked", lambda _: True)
    report = run(model, tmp_path / "stacked", text, **common)
    assert max(sizes) > 1
    assert sum(sizes) < sum(len(layer.linears) for layer in report.layers)
    alone, stacked = read_folder(tmp_path / "alone"), read_folder(tmp_path / "stacked")
    assert alone.keys() == stacked.keys()
    assert all(torch.equal(tensor, stacked[name]) for name, tensor in alone.items())
