"""Rounding of kept values to int8 against a brute-force oracle, in exact arithmetic; hostile parts are refused."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_barber.checkpoint.encoding import Packed, pack, unpack
from llm_barber.checkpoint.rounding import (
    GROUP,
    LARGEST,
    Rounded,
    pack_rounded,
    relative_error,
    round_trip,
    unpack_rounded,
)
from llm_barber.masking.granularity import Granularity
from llm_barber.masking.initial import initial_mask
from llm_barber.masking.pattern import NofM, Unstructured
from llm_barber.masking.selection import apply_mask

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

pytestmark = pytest.mark.usefixtures("with_and_without_c")


def up_to_bfloat16(number: Fraction) -> Fraction:
    """The smallest bfloat16 that is at least a positive number, by trying the exponents."""
    exponent = -133
    while Fraction(2) ** exponent * 256 <= number:
        exponent += 1
    step = Fraction(2) ** exponent
    return -(-number // step) * step


def oracle(weight: Tensor, group: int) -> tuple[list[list[int]], list[list[Fraction]]]:
    """Values and scales of every weight, one by one. Each float32 operation is exact, and then rounded by NumPy."""
    quotients, scales = [], []
    for row in weight.tolist():
        quotients.append([])
        scales.append([])
        for start in range(0, len(row), group):
            part = [np.float32(value) for value in row[start : start + group]]
            largest = max(abs(value) for value in part)
            scale = Fraction(0) if largest == 0 else up_to_bfloat16(Fraction(float(largest / np.float32(LARGEST))))
            scale = max(scale, Fraction(2) ** -133) if largest else scale
            scales[-1].append(scale)
            # Python rounds to the nearest integer, ties to even.
            quotients[-1] += [round(float(value / np.float32(float(scale)))) if scale else 0 for value in part]
    return quotients, scales


def make_weight(rows: int, columns: int, density: float, dtype: torch.dtype, seed: int, size: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * size
    return weight.masked_fill(torch.rand(rows, columns, generator=generator) >= density, 0).to(dtype)


def dense_values(rounded: Rounded) -> Tensor:
    """Values where they belong, and zeros elsewhere."""
    return unpack(Packed(rounded.packed.shape, rounded.packed.encoding, rounded.packed.values, rounded.packed.places))


@given(
    rows=st.integers(1, 5), columns=st.integers(1, 40), group=st.sampled_from([1, 3, 8, 32, 128]),
    seed=st.integers(0, 10**6), dtype=st.sampled_from(DTYPES), density=st.floats(0, 0.8),
    size=st.sampled_from([1.0, 1e-6, 1e-38, 1e4, 1e38]),
)  # fmt: skip
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_values_and_scales_are_those_of_the_oracle(
    rows: int, columns: int, group: int, seed: int, dtype: torch.dtype, density: float, size: float
) -> None:
    weight = make_weight(rows, columns, density, dtype, seed, size)
    weight = weight.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    rounded = pack_rounded(weight, group)
    assert (rounded is None) == (pack(weight) is None)
    if rounded is None:
        return
    quotients, scales = oracle(weight, group)
    assert dense_values(rounded).tolist() == quotients
    assert [[Fraction(scale) for scale in row] for row in rounded.scales.tolist()] == scales
    restored = unpack_rounded(rounded)
    products = [
        [scales[row][column // group] * quotients[row][column] for column in range(columns)] for row in range(rows)
    ]
    exact = torch.tensor([[float(product) for product in row] for row in products], dtype=torch.float64)
    largest = torch.finfo(dtype).max
    expected = exact.clamp(-largest, largest).to(torch.float32).to(dtype)  # float32 holds all products exactly
    assert torch.equal(restored, expected)
    assert not torch.signbit(restored[restored == 0]).any()
    assert torch.equal(restored, round_trip(weight, group))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [32, GROUP, 1000])
def test_errors_are_at_most_half_a_step(dtype: torch.dtype, group: int) -> None:
    weight = make_weight(33, 300, 0.5, dtype, seed=1)
    rounded = pack_rounded(weight, group)
    assert rounded is not None
    restored = unpack_rounded(rounded)
    steps = rounded.scales.float().repeat_interleave(min(group, 300), 1)[:, :300]
    rounding = torch.finfo(dtype).eps * weight.float().abs()
    assert ((restored.float() - weight.float()).abs() <= steps * 0.5001 + rounding).all()
    assert ((weight == 0) <= (restored == 0)).all()
    exact = (restored.double() - weight.double()).norm() / weight.double().norm()
    assert relative_error(weight, restored) == pytest.approx(exact.item())
    assert 0 < exact < 0.01


def test_halves_go_to_the_even_number_and_zeros_stay_kept() -> None:
    row = [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 0.25, -0.0, 0, 0, 0, 0, 0, 0, 0, 0]
    weight = torch.tensor([row, [0.0] * 16, [0.0] * 16])
    rounded = pack_rounded(weight, 16)
    assert rounded is not None
    assert rounded.packed.values.tolist() == [127, 0, 2, 2, 0, -2, 0, 0]  # those that are 0 are kept, -0.0 too
    assert rounded.packed.places.tolist() == [255, 0, 0, 0, 0, 0]
    assert rounded.scales.tolist() == [[1], [0], [0]]  # a group of zeros has scale 0
    assert unpack_rounded(rounded)[0, :8].tolist() == [127, 0, 2, 2, 0, -2, 0, 0]


@pytest.mark.parametrize(
    ("pattern", "encoding"), [(NofM(2, 4), "2:4"), (NofM(4, 8), "4:8"), (Unstructured(0.5), "bitmask")]
)
def test_patterns_take_the_encoding_of_the_fewest_bytes(pattern: NofM | Unstructured, encoding: str) -> None:
    weight = torch.randn(64, 256).bfloat16()
    weight = apply_mask(weight, initial_mask(weight.float().abs(), pattern, Granularity.OUTPUT))
    rounded = pack_rounded(weight)
    assert rounded is not None
    assert rounded.packed.encoding == encoding
    share = {"2:4": 19 / 4, "4:8": 39 / 8, "bitmask": 5}[encoding] + 16 / GROUP  # bits of a weight
    assert rounded.bytes == pytest.approx(weight.numel() * share / 8, abs=8)
    assert torch.equal(unpack_rounded(rounded), round_trip(weight, GROUP))


def test_groups_that_keep_fewer_than_n_have_zeros_among_their_values() -> None:
    weight = torch.randn(8, 64).bfloat16().view(-1, 4)
    weight[:, 2:] = 0
    weight[::40, 0] = 0
    weight = weight.view(8, 64)
    rounded = pack_rounded(weight)
    assert rounded is not None
    assert rounded.packed.encoding == "2:4"
    assert len(rounded.packed.values) == 8 * 32
    assert torch.equal(unpack_rounded(rounded), round_trip(weight, GROUP))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_other_dtypes_are_not_rounded(dtype: torch.dtype) -> None:
    assert pack_rounded(torch.zeros(8, 64).to(dtype)) is None


def test_dense_weights_are_not_rounded() -> None:
    assert pack_rounded(torch.randn(8, 64).bfloat16()) is None


def test_hostile_parts_are_refused() -> None:
    rounded = pack_rounded(make_weight(8, 64, 0.5, torch.bfloat16, seed=2), 32)
    assert rounded is not None
    scales = rounded.scales

    def changed(number: float) -> Tensor:
        other = scales.clone()
        other[3, 1] = number
        return other

    values = rounded.packed.values.clone()
    values[5] = -128
    for problem, other in (
        ("a scale is", replace(rounded, scales=changed(-1.0))),
        ("a scale is", replace(rounded, scales=changed(-0.0))),
        ("a scale is", replace(rounded, scales=changed(float("inf")))),
        ("a scale is", replace(rounded, scales=changed(float("nan")))),
        ("do not fit shape", replace(rounded, scales=scales[:, :1])),
        ("do not fit shape", replace(rounded, scales=scales[:-1])),
        ("do not fit shape", replace(rounded, scales=scales.float())),
        ("do not fit shape", replace(rounded, group=64)),
        ("groups of 0", replace(rounded, group=0)),
        ("float64", replace(rounded, dtype=torch.float64)),
        ("below -127", replace(rounded, packed=replace(rounded.packed, values=values))),
        ("uint8", replace(rounded, packed=replace(rounded.packed, values=values.view(torch.uint8)))),
        ("places", replace(rounded, packed=replace(rounded.packed, values=values[1:]))),
        ("bytes of places", replace(rounded, packed=replace(rounded.packed, shape=(2**20, 2**20)))),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=problem):
            unpack_rounded(other)


def test_large_scales_give_the_largest_number() -> None:
    """A hostile scale, or one that was rounded up next to the largest number: nothing is infinite."""
    weight = torch.full((2, 16), torch.finfo(torch.float16).max).half()
    weight[:, 8:] = 0
    assert torch.isfinite(round_trip(weight, 16)).all()
    rounded = pack_rounded(weight, 16)
    assert rounded is not None
    hostile = replace(rounded, scales=torch.full_like(rounded.scales, torch.finfo(torch.bfloat16).max))
    assert unpack_rounded(hostile).unique().tolist() == [0, 65504]
