"""A decoder layer: its outputs, calls of its linears, and gradients compared with autograd."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from llm_barber.errors import ModelError
from llm_barber.masking.gradient_squares import FisherSums, GradientSquares
from llm_barber.model.architecture import ARCHITECTURES, LLAMA, Architecture, Block
from llm_barber.model.block import DecoderLayer
from llm_barber.model.gradients import block_gradients, loss_gradients, output_gradients, reconstruction_errors
from llm_barber.model.hooks import InputVisitor
from tests.conftest import make_model
from tests.model.reference import first_call

Case = tuple[nn.Module, Architecture, Tensor, dict]


@pytest.fixture(params=["llama", "opt"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    """A layer, its architecture, an input (sequences, tokens, hidden) and the arguments of its call."""
    folder = make_model(tmp_path / "model", request.param)
    model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    architecture = LLAMA if request.param == "llama" else ARCHITECTURES["opt"]
    tokens = torch.randint(0, 128, (4, 12), generator=torch.Generator().manual_seed(0))
    hidden, arguments = first_call(model, model.get_submodule(architecture.layers), 0, tokens)
    return model.get_submodule(architecture.layers)[0], architecture, hidden, arguments


def gradient_squares(case: Case, block: Block, sparse: Tensor, batch: int) -> dict[str, Tensor]:
    """Mean squares over sequences of the gradients by a block's weights, computed in batches."""
    module, architecture, hidden, arguments = case
    layer = DecoderLayer(module, architecture.linears, lambda *_: one_sequence(arguments))
    squares = {name: GradientSquares(tuple(layer.linears[name].weight.shape), hidden.device) for name in block.linears}
    for start in range(0, len(hidden), batch):
        part = slice(start, start + batch)
        block_gradients(layer, block, hidden[part], sparse[part], {}, squares)
    return {name: statistic.mean for name, statistic in squares.items()}


def one_sequence(arguments: dict) -> dict:
    """Arguments of a call with the positions of a single sequence, which fit any batch."""
    return {
        name: value[:1] if isinstance(value, Tensor) and value.dim() and len(value) == 4 else value
        for name, value in arguments.items()
    }


@pytest.mark.parametrize("index", [0, 1])
def test_gradients_equal_autograd_one_sequence_at_a_time(case: Case, index: int) -> None:
    module, architecture, hidden, arguments = case
    block = architecture.blocks[index]
    sparse = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    squares = gradient_squares(case, block, sparse, batch=4)
    outputs = []
    handle = module.get_submodule(block.output).register_forward_hook(lambda _, __, out: outputs.append(out))
    weights = [module.get_submodule(name).weight for name in block.linears]
    expected = [torch.zeros_like(weight) for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    for sequence, target in zip(hidden, sparse, strict=True):
        module(sequence[None], **one_sequence(arguments))
        output = outputs[-1] if isinstance(outputs[-1], Tensor) else outputs[-1][0]
        loss = nn.functional.mse_loss(output.reshape(target.shape), target)
        for total, gradient in zip(expected, torch.autograd.grad(loss, weights), strict=True):
            total += gradient**2 / len(hidden)
    handle.remove()
    for name, total in zip(block.linears, expected, strict=True):
        torch.testing.assert_close(squares[name], total, rtol=1e-4, atol=0)


@pytest.mark.parametrize("index", [0, 1])
def test_batch_size_does_not_change_the_statistics(case: Case, index: int) -> None:
    block = case[1].blocks[index]
    sparse = torch.randn(case[2].shape, generator=torch.Generator().manual_seed(1))
    whole = gradient_squares(case, block, sparse, batch=4)
    for batch in (1, 3):
        parts = gradient_squares(case, block, sparse, batch)
        for name in block.linears:
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-5, atol=0)


def test_half_precision_does_not_underflow(case: Case) -> None:
    """The loss gradient is 2 · 1e-5 / (12 · 32) = 5e-8, less than the least positive number of float16."""
    module, architecture, hidden, arguments = case
    block = architecture.blocks[1]
    float_arguments = one_sequence(arguments)
    module.half().float()  # rounds the weights, so that both dtypes have the same
    layer = DecoderLayer(module, architecture.linears, lambda *_: float_arguments)
    dense = layer.block_output(block, hidden, {})
    module.half()
    half_arguments = {
        name: tuple(tensor.half() for tensor in value) if name == "position_embeddings" else value
        for name, value in float_arguments.items()
    }
    layer = DecoderLayer(module, architecture.linears, lambda *_: half_arguments)
    half_dense = layer.block_output(block, hidden.half(), {}).float()
    sparse = half_dense - 1e-5 * torch.randn(dense.shape, generator=torch.Generator().manual_seed(1))
    difference = half_dense - sparse
    half_case = (module, architecture, hidden.half(), half_arguments)
    squares = gradient_squares(half_case, block, sparse, batch=4)
    module.float()
    exact = gradient_squares(case, block, dense - 1000 * difference, batch=4)
    for name in block.linears:
        ratio = 1000 * squares[name].sqrt().norm() / exact[name].sqrt().norm()
        assert 0.98 < ratio < 1.02, (name, ratio)


class Unusual(nn.Module):
    """Clamps a linear's outputs in place, as OLMo does, calls it twice, and ignores what another linear gives."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        for name in ("query", "output", "ignored"):
            self.add_module(name, Conv1D(8, 8) if transposed else nn.Linear(8, 8))

    def forward(self, hidden: Tensor) -> Tensor:
        states = self.query(hidden)
        states.clamp_(-0.5, 0.5)
        states = self.query(states)
        states.clamp_(-0.5, 0.5)
        self.ignored(states)
        return self.output(states)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_by_outputs_give_those_by_weights(transposed: bool) -> None:
    torch.manual_seed(0)
    layer = DecoderLayer(
        Unusual(transposed).requires_grad_(False), ("query", "output", "ignored"), lambda *_: {}, transposed
    )
    hidden = torch.randn(1, 12, 8)
    weights = {name: torch.randn(8, 8).requires_grad_() for name in layer.linears}
    loss = layer.output_with(weights, hidden).square().sum() / 2
    expected = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    parts, scale = output_gradients(
        layer, {name: weight.detach() for name, weight in weights.items()}, hidden, lambda output: output
    )
    gradients = {part.name: (part.gradients[0].t() @ part.inputs[0]) * scale for part in parts}
    assert set(gradients) == {"query", "output"}
    for name, gradient in zip(weights, expected, strict=True):
        assert (name in gradients) == (gradient is not None)
        if gradient is not None:
            torch.testing.assert_close(gradients[name], gradient)


def test_a_linear_that_the_output_does_not_depend_on_is_an_error(case: Case) -> None:
    module, architecture, hidden, arguments = case
    layer = DecoderLayer(module, architecture.linears, lambda *_: one_sequence(arguments))
    sums = {name: FisherSums(tuple(linear.weight.shape), hidden.device) for name, linear in layer.linears.items()}
    loss_gradients(layer, hidden, torch.ones_like(hidden), sums)
    (activation,) = (child for name, child in module.named_modules() if name.endswith(("act_fn", "activation_fn")))
    before = "gate_proj" if architecture is LLAMA else "fc1"
    activation.register_forward_hook(lambda _, __, output: torch.zeros_like(output))
    with pytest.raises(ModelError, match=f"no gradient by .*{before}") as caught:
        loss_gradients(layer, hidden, torch.ones_like(hidden), sums)
    assert "--exclude" in caught.value.hint


def test_replay_gives_the_layer_the_kept_output(case: Case) -> None:
    module, architecture, hidden, arguments = case
    layer = DecoderLayer(module, architecture.linears, lambda *_: one_sequence(arguments))
    attention, mlp = architecture.blocks
    kept = layer.block_output(attention, hidden, {})
    _, output = layer.final_output(hidden, mlp, {attention.output: kept})
    torch.testing.assert_close(output, layer.output(hidden), rtol=0, atol=0)
    _, other = layer.final_output(hidden, mlp, {attention.output: torch.zeros_like(kept)})
    assert not torch.equal(other, output)
    assert "forward" not in vars(module.get_submodule(attention.output))  # the replay is removed


def noting(seen: dict[str, Tensor]) -> InputVisitor:
    """Visitor that notes the inputs of each linear, (sequences, tokens, in)."""
    return seen.__setitem__


def test_all_linears_are_visited_and_the_layer_is_not_run_to_its_end(case: Case) -> None:
    module, architecture, hidden, arguments = case
    layer = DecoderLayer(module, architecture.linears, lambda *_: one_sequence(arguments))
    seen: dict[str, Tensor] = {}
    ended = []
    handle = module.register_forward_hook(lambda *_: ended.append(True))
    layer.visit_inputs(hidden, noting(seen))
    handle.remove()
    assert set(seen) == set(architecture.linears)
    assert not ended
    assert seen["self_attn.q_proj"] is seen["self_attn.k_proj"]
    assert all(inputs.shape[:2] == hidden.shape[:2] for inputs in seen.values())


def test_a_layer_that_is_run_to_its_end_gives_its_output(case: Case) -> None:
    module, architecture, hidden, arguments = case
    layer = DecoderLayer(module, architecture.linears, lambda *_: one_sequence(arguments))
    seen: dict[str, Tensor] = {}
    output = layer.visit_inputs(hidden, noting(seen), stop=False)
    assert output is not None
    assert torch.equal(output, layer.output(hidden))
    assert set(seen) == set(architecture.linears)
    assert layer.visit_inputs(hidden, noting(seen)) is None


def test_reconstruction_error_is_the_mean_square_by_sequence() -> None:
    dense, sparse = torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]]), torch.tensor([[[0.0, 0.0]], [[3.0, 1.0]]])
    assert reconstruction_errors(dense, sparse).tolist() == pytest.approx([2.5, 5.0])


class Skipping(nn.Module):
    """A layer that multiplies with a linear's weight without calling it, as fused kernels do."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.skipped = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(self.called(hidden), self.skipped.weight)


def test_a_linear_that_is_not_called_is_named() -> None:
    layer = DecoderLayer(Skipping(), ("called", "skipped"), lambda *_: {})
    with pytest.raises(ModelError, match="Skipping does not call skipped") as caught:
        layer.visit_inputs(torch.randn(2, 3, 4), lambda *_: None)
    assert "kernel" in caught.value.hint
