import pytest
import torch

from llm_barber.masking.gradient_squares import GradientSquares
from llm_barber.masking.gram import GramMatrix, TargetMoments
from llm_barber.masking.products import exact_half_products
from llm_barber.masking.statistics import InputMoments, InputSquares


def inputs(dtype: torch.dtype = torch.float32, features: int = 6) -> torch.Tensor:
    return torch.randn(5, 7, features, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("features", [1, 6, 64, 65, 200, 530])  # of 530 columns are 8 panels, of 200 four
def test_input_squares_and_gram_matrices_are_their_definitions(features: int) -> None:
    x, dense_inputs = inputs(features=features), inputs(features=features).flip(0)
    squares, gram = InputSquares(features, x.device), GramMatrix(features, x.device)
    moments = TargetMoments(features, x.device)
    before = x.clone()
    for part in (slice(0, 2), slice(2, 5)):
        squares.update(x[part])
        gram.update(x[part])
        moments.update(x[part], dense_inputs[part])
        # Looked at in between, they go on all the same.
        assert torch.isfinite(gram.mean).all()
        assert torch.isfinite(moments.difference).all()
    assert torch.equal(x, before)
    flat, dense_flat = x.reshape(-1, features).double(), dense_inputs.reshape(-1, features).double()
    exact = flat.t() @ flat
    torch.testing.assert_close(squares.mean.double(), flat.square().sum(0) / 5, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gram.mean.double(), 2 * exact / 5, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moments.gram.double(), exact / 35, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moments.difference.double(), (exact - dense_flat.t() @ flat) / 35, rtol=1e-5, atol=1e-5)


def test_input_moments_are_their_definitions() -> None:
    x = inputs(torch.bfloat16)
    moments = InputMoments(6, x.device)
    moments.update(x[:2])
    moments.update(x[2:])
    flat = x.reshape(-1, 6).double()
    torch.testing.assert_close(moments.mean.double(), flat.sum(0) / 5, rtol=1e-5, atol=1e-5)
    within = x.double().var(1, unbiased=False).mean(0)
    torch.testing.assert_close(moments.variance.double(), within, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(within, flat.var(0, unbiased=False), rtol=1e-2)


def test_gradient_squares_square_before_they_sum() -> None:
    x, gradient = inputs(), torch.randn(5, 7, 3, generator=torch.Generator().manual_seed(1))
    scale = torch.tensor([1.0, 2.0, 0.5, 4.0, 1.0])
    squares = GradientSquares((3, 6), x.device)
    squares.update(x, gradient, scale)
    expected = (
        sum((s * g.double().t() @ sequence.double()) ** 2 for sequence, g, s in zip(x, gradient, scale, strict=True))
        / 5
    )
    torch.testing.assert_close(squares.mean.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_squares_are_added_at_once_as_by_rows(dtype: torch.dtype) -> None:
    """A GPU's way, on the CPU; a model's gradients are as small as the factor makes them."""
    gradient = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    squares, scales = GradientSquares((3, 6), gradient.device), torch.tensor([2.0**-9, 2.0**-8])
    squares.update(inputs(dtype)[:2], gradient, scales, 2 / 300)
    products = gradient.double().transpose(1, 2) @ inputs(dtype)[:2].double() * scales.view(-1, 1, 1) * 2 / 300
    exact = products.square().sum(0)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(squares.total.double(), exact, rtol=tolerance, atol=1e-10)


def test_half_precision_products_do_not_overflow() -> None:
    x, gradient = torch.full((1, 64, 2), 60.0).half(), torch.full((1, 64, 2), 30.0).half()
    squares = GradientSquares((2, 2), x.device)
    squares.update(x, gradient, torch.ones(1))
    assert squares.mean.tolist() == [[(64 * 60 * 30) ** 2] * 2] * 2


def test_batches_do_not_change_a_bit() -> None:
    wide = inputs(torch.bfloat16, 200)
    for make in (lambda: InputSquares(200, wide.device), lambda: GramMatrix(200, wide.device)):
        whole, parts = make(), make()
        whole.update(wide)
        for part in (wide[:2], wide[2:3], wide[3:]):
            parts.update(part)
        assert torch.equal(whole.mean, parts.mean)
    x, gradient = inputs(torch.bfloat16), torch.randn(5, 7, 3, generator=torch.Generator().manual_seed(1)).bfloat16()
    whole, parts = GradientSquares((3, 6), x.device), GradientSquares((3, 6), x.device)
    whole.update(x, gradient, torch.ones(5))
    for part in (slice(0, 2), slice(2, 5)):
        parts.update(x[part], gradient[part], torch.ones(len(x[part])))
    assert torch.equal(whole.mean, parts.mean)


def _precisions() -> list[str]:
    """Formats of float32 products on CPUs and on GPUs."""
    return [getattr(torch.backends, backend).matmul.fp32_precision for backend in ("mkldnn", "cuda")]


def test_products_of_bfloat16_inputs_are_not_rounded() -> None:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(3, 400, 64, generator=generator).bfloat16()
    dense_inputs = (inputs.float() + 0.1 * torch.randn(3, 400, 64, generator=generator)).bfloat16()
    before = _precisions()
    gram, moments = GramMatrix(64, torch.device("cpu")), TargetMoments(64, torch.device("cpu"))
    gram.update(inputs)
    moments.update(inputs, dense_inputs)
    assert _precisions() == before
    values, dense_flat = inputs.double().flatten(0, 1), dense_inputs.double().flatten(0, 1)
    exact = values.t() @ values
    assert ((gram.mean * 1.5 - exact).abs().max() / exact.diagonal().mean()).item() < 5e-6  # rounded to bfloat16: 1e-3
    difference = (values - dense_flat).t() @ values / len(values)
    assert ((moments.difference - difference).abs().max() / exact.diagonal().mean() * len(values)).item() < 1e-5


def test_float32_products_take_a_form_that_holds_the_values_exactly() -> None:
    before = _precisions()
    precisions = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        with pytest.raises(KeyError), exact_half_products(dtype):
            precisions[dtype] = _precisions()
            raise KeyError  # settings come back, whatever happens
        assert _precisions() == before
    # Bits after the first: 7 of bfloat16, 10 of float16 and TF32.
    assert precisions == {torch.bfloat16: ["bf16", "tf32"], torch.float16: [before[0], "tf32"], torch.float32: before}
