"""RMS norms by PyTorch's kernel equal transformers' modules, and other modules are left alone."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm_barber.model.empty import empty_model
from llm_barber.model.fused_norms import fuse_norms, rms_norms
from llm_barber.model.skeleton import Skeleton
from llm_barber.model.structure import find_architecture
from tests.conftest import FAMILIES, make_config

FORM = {  # how families compute RMS norms; others round, and multiply by the weight
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text", "qwen3_5", "qwen3_5-whole", "qwen3_next"), "_offset_weight"),
    **dict.fromkeys(("gpt_oss", "nemotron_h", "olmo2", "olmo3"), "_weight_within"),
}
OTHERS = {  # have layer norms, or norms without a weight
    "bloom", "cohere", "cohere2", "falcon", "falcon-rw", "gpt2", "gpt_bigcode", "gpt_neox", "gptj",
    "modernbert-decoder", "mpt", "nemotron", "olmo", "opt", "opt-350m", "phi", "phimoe", "stablelm", "starcoder2",
}  # fmt: skip
FEATURES = 24


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_of_every_family_keep_their_bits(family: str) -> None:
    config = make_config(family)
    layers = empty_model(config, torch.float32).get_submodule(find_architecture(config).layers)
    norms = list(rms_norms(layers))
    forms = {norm.form.__name__ for norm in norms}
    assert forms == (set() if family in OTHERS else {FORM.get(family, "_weight_after")})
    named = (module for module in layers.modules() if type(module).__name__.endswith("RMSNorm"))
    assert len(norms) == sum(1 for module in named if list(module.parameters()))
    generator = torch.Generator().manual_seed(1)
    for norm in {type(norm.module): norm for norm in norms}.values():
        module, features = norm.module, norm.module.get_parameter("weight").numel()
        weight, hidden = torch.randn(features, generator=generator), torch.randn(2, 50, features, generator=generator)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            module.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
            for size in (1e-4, 1.0, 100.0):
                inputs = [(size * hidden).to(dtype).requires_grad_() for _ in range(2)]
                outputs = module(inputs[0]), norm.form(inputs[1], module.weight, norm.epsilon)
                assert torch.equal(*outputs)
                of_module, gradient = (
                    torch.autograd.grad(output.sum(), read)[0] for output, read in zip(outputs, inputs, strict=True)
                )
                torch.testing.assert_close(gradient, of_module)


class Norm(nn.Module):
    """What RMS norms compute, with one thing changed."""

    def __init__(self, change: str = "") -> None:
        super().__init__()
        self.weight, self.eps, self.change = nn.Parameter(torch.ones(FEATURES)), 1e-6, change
        if change == "bias":
            self.bias = nn.Parameter(torch.zeros(FEATURES))
        if change == "two numbers":
            self.scale = 1.0

    def forward(self, hidden: Tensor) -> Any:
        squares = hidden.float().pow(2)
        if self.change == "centred":
            squares = (hidden - hidden.mean(-1, keepdim=True)).float().pow(2)
        mean = squares.sum(-1, keepdim=True) if self.change == "sum" else squares.mean(-1, keepdim=True)
        inverse = 1 / (mean.sqrt() + self.eps) if self.change == "after the root" else torch.rsqrt(mean + self.eps)
        assert self.change != "asserts", "not this one"
        normalised = self.weight * (hidden.float() * inverse).to(hidden.dtype)
        if self.change == "wants a matrix":
            return normalised + hidden.view(2, 2, -1)
        return (normalised,) if self.change == "tuple" else normalised


class Gated(Norm):
    def forward(self, hidden: Tensor, gate: Tensor | None = None) -> Tensor:
        normalised: Tensor = super().forward(hidden)
        return normalised if gate is None else normalised * gate


@pytest.mark.parametrize(
    "change", ["bias", "two numbers", "centred", "sum", "after the root", "wants a matrix", "tuple", "asserts"]
)
def test_a_norm_that_computes_something_else_is_left_alone(change: str) -> None:
    assert len(list(rms_norms(nn.ModuleList([Norm()])))) == 1
    assert not list(rms_norms(nn.ModuleList([Norm(change), Gated(), nn.LayerNorm(FEATURES)])))


def test_modules_with_other_settings_are_tried_apart() -> None:
    norms = nn.ModuleList([Norm(), Norm("sum"), Norm()])
    assert [norm.module for norm in rms_norms(norms)] == [norms[0], norms[2]]
    with torch.device("meta"):
        assert len(list(rms_norms(norms))) == 2
    norms[0].eps = -1.0
    assert len(list(rms_norms(norms))) == 1


def test_a_fused_norm_keeps_its_hooks_and_other_dtypes() -> None:
    norm, seen = Norm(), []
    norm.register_forward_hook(lambda *_: seen.append(1))
    hidden, calls = torch.randn(2, FEATURES), []
    expected, original = norm(hidden), norm.forward
    norm.forward = lambda hidden: calls.append(1) or original(hidden)
    fuse_norms(norm)
    for noted in (calls, seen):  # the norm was tried
        noted.clear()
    torch.testing.assert_close(norm(hidden), expected)
    assert not calls
    assert len(seen) == 1
    assert torch.equal(norm(hidden=hidden), expected)
    assert norm(hidden.bfloat16()).dtype == original(hidden.bfloat16()).dtype  # by the module: its weight is float32
    assert calls


def test_a_cpu_computes_transformers_own_norms() -> None:
    config = make_config("llama")
    skeleton = Skeleton(config, find_architecture(config), torch.device("cpu"), torch.float32)
    assert not any("forward" in vars(module) for module in skeleton.layers.modules())
