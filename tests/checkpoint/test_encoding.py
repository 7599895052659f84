import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_barber.checkpoint.encoding import Encoding, Packed, pack, places_bytes, unpack
from llm_barber.masking.granularity import Granularity
from llm_barber.masking.initial import initial_mask
from llm_barber.masking.pattern import NofM, Unstructured
from llm_barber.masking.selection import apply_mask

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


pytestmark = pytest.mark.usefixtures("with_and_without_c")


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    kind = INTEGERS[first.element_size()]
    return first.dtype == second.dtype and torch.equal(first.contiguous().view(kind), second.contiguous().view(kind))


@given(
    rows=st.integers(1, 9), columns=st.integers(1, 40), density=st.floats(0, 1), seed=st.integers(0, 10**6),
    dtype=st.sampled_from(DTYPES), group=st.sampled_from([None, (2, 4), (4, 8), (1, 4)]),
)  # fmt: skip
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_round_trip_of_any_bits(
    rows: int, columns: int, density: float, seed: int, dtype: torch.dtype, group: tuple[int, int] | None
) -> None:
    generator = np.random.default_rng(seed)
    size = torch.empty(0, dtype=dtype).element_size()
    if group is not None:
        columns = -(-columns // group[1]) * group[1]
    weight = torch.from_numpy(generator.integers(0, 256, (rows, columns * size), dtype=np.uint8)).view(dtype)
    keep = torch.from_numpy(generator.random((rows, columns)) < density)
    if group is not None:
        keep = initial_mask(torch.rand(rows, columns), NofM(*group), Granularity.OUTPUT)
    weight = weight.view(INTEGERS[size]).masked_fill(~keep, 0).view(dtype)
    packed = pack(weight)
    if packed is None:
        return
    assert packed.bytes < weight.numel() * size
    assert same_bits(unpack(packed), weight)


@pytest.mark.parametrize(
    ("target", "encoding", "share"),
    [(Unstructured(0.5), "bitmask", 0.5625), (Unstructured(0.7), "bitmask", 0.3625), (NofM(2, 4), "2:4", 0.546875),
     (NofM(4, 8), "4:8", 0.5546875), (NofM(1, 4), "bitmask", 0.3125)],
)  # fmt: skip
def test_sizes_and_the_smallest_encoding(target: Unstructured | NofM, encoding: str, share: float) -> None:
    weight = torch.randn(96, 640).bfloat16()
    weight[weight == 0] = 1
    packed = pack(apply_mask(weight, initial_mask(weight.float().abs(), target, Granularity.OUTPUT)))
    assert packed is not None
    assert packed.encoding == encoding
    assert packed.bytes == pytest.approx(share * weight.numel() * 2, abs=8)


def test_layout_by_hand() -> None:
    bits = pack(torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.0]]))
    assert bits is not None
    assert (bits.encoding, bits.places.tolist(), bits.values.tolist()) == ("bitmask", [0b10, 0b10], [1.0, 2.0])
    # Ways to keep 2 of 4: 01 02 03 12 13 23, so 12 is code 3 and 03 is code 2; the third group keeps one, and a zero.
    rest = [1.0, 1.0, 0.0, 0.0] * 29
    codes = pack(torch.tensor([[0.0, 5.0, 6.0, 0.0, 7.0, 0.0, 0.0, 8.0, 0.0, 0.0, 9.0, 0.0, *rest]]).bfloat16())
    assert codes is not None
    assert codes.encoding == "2:4"
    assert codes.values.tolist()[:6] == [5.0, 6.0, 7.0, 8.0, 0.0, 9.0]  # 02 is the first way that keeps number 2
    first = 3 | 2 << 3 | 1 << 6
    assert codes.places.tolist() == [*first.to_bytes(3, "little"), *[0] * 9]


@pytest.mark.parametrize("encoding", [Encoding.TWO_OF_FOUR, Encoding.FOUR_OF_EIGHT])
def test_every_way_to_keep(encoding: Encoding) -> None:
    codes = encoding.group_codes
    assert codes is not None
    n, m = codes.n, codes.m
    ways = list(itertools.combinations(range(m), n))
    weight = torch.zeros(len(ways), m)
    for row, way in enumerate(ways):
        weight[row, list(way)] = torch.arange(1.0, n + 1)
    packed = pack(weight.bfloat16().repeat(1, 8))
    assert packed is not None
    assert packed.encoding is encoding
    assert torch.equal(unpack(packed), weight.bfloat16().repeat(1, 8))


def test_weights_that_would_not_become_smaller_are_not_packed() -> None:
    assert pack(torch.ones(4, 8)) is None
    assert pack(torch.ones(4, 8).to(torch.float8_e4m3fn).float()) is None
    zeros = pack(torch.zeros(4, 8))
    assert zeros is not None
    assert zeros.values.numel() == 0
    assert torch.equal(unpack(zeros), torch.zeros(4, 8))
    negative = pack(torch.tensor([[-0.0, 0.0, 0.0, 0.0] * 4]))
    assert negative is not None
    assert negative.values.numel() == 4  # −0.0 is kept, bit for bit


def change(packed: Packed, **changes: object) -> Packed:
    return Packed(**{**packed.__dict__, **changes})


def test_parts_that_do_not_fit_together_are_refused() -> None:
    weight = torch.randn(3, 9)
    packed = pack(apply_mask(weight, (torch.arange(9) % 3 == 0).expand(3, 9)))
    assert packed is not None
    huge = (2**20, 2**20)
    for changes, problem in (
        ({"shape": huge}, "bytes of places"),
        ({"shape": (-3, -9)}, "empty or negative"),
        ({"shape": (9, 3), "places": packed.places[:-1]}, "bytes of places"),
        ({"values": packed.values[:-1]}, "values, 9 places"),
        ({"values": packed.values.view(3, 3)}, "values, 9 places"),
        ({"places": packed.places | torch.tensor([0, 0, 0, 128], dtype=torch.uint8)}, "beyond the last weight"),
        ({"places": packed.places.to(torch.int16)}, "bytes of places"),
    ):
        with pytest.raises(ValueError, match=problem):
            unpack(change(packed, **changes))
    pair = pack(torch.tensor([[1.0, 0, 2, 0] * 15] * 2).bfloat16())
    assert pair is not None
    assert pair.encoding is Encoding.TWO_OF_FOUR
    with pytest.raises(ValueError, match="a code of a group of 4 does not exist"):
        unpack(change(pair, places=torch.tensor([7, *[0] * 11], dtype=torch.uint8)))
    with pytest.raises(ValueError, match="codes beyond the last group"):
        unpack(change(pair, places=torch.tensor([*[0] * 11, 255], dtype=torch.uint8)))
    with pytest.raises(ValueError, match="does not divide a row of 3"):
        unpack(change(pair, shape=(40, 3)))
    assert places_bytes(Encoding.TWO_OF_FOUR, 24) == 3
