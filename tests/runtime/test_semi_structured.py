"""Choice of semi-structured linears, on the CPU; the product itself needs a GPU and is not tested."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

from llm_barber import load
from llm_barber.errors import ModelError, SettingsError
from llm_barber.runtime.semi_structured import MULTIPLES, check_device, convert, why_dense


def two_of_four(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.tensor([0.0, 1.0, 2.0, 0.0]).repeat(rows, columns // 4).to(dtype)


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (two_of_four(32, 64), None),
        (two_of_four(96, 128, torch.float16), None),
        (two_of_four(32, 64) * 0, None),
        (two_of_four(32, 64, torch.float32), "float32 is not float16 or bfloat16"),
        (two_of_four(48, 64), "shape is not a multiple of 32 × 64"),
        (two_of_four(32, 96), "shape is not a multiple of 32 × 64"),
        (torch.ones(32, 64).bfloat16(), "2:4 does not hold"),
        (two_of_four(32, 64).roll(1, 1).roll(1, 1).view(64, 32).T.contiguous(), "2:4 does not hold"),
        (torch.empty(0, 64).bfloat16(), "shape is not a multiple of 32 × 64"),
    ],
)
def test_why_dense(weight: torch.Tensor, reason: str | None) -> None:
    assert why_dense(weight) == reason


def test_the_multiples_suit_both_backends_of_torch() -> None:
    for kind in (SparseSemiStructuredTensorCUTLASS, SparseSemiStructuredTensorCUSPARSELT):
        for dtype, (rows, columns) in MULTIPLES.items():
            needed = kind._DTYPE_SHAPE_CONSTRAINTS[dtype]
            assert rows % needed.sparse_min_rows == 0
            assert columns % needed.sparse_min_cols == 0


def test_devices() -> None:
    check_device(torch.device("cuda"), (8, 0))
    check_device(torch.device("cuda"), (9, 0))
    for device, capability, problem in (
        ("cpu", None, "needs CUDA, not cpu"),
        ("cuda", (7, 5), "not 7.5"),
        ("cuda", None, "not unknown"),
    ):
        with pytest.raises(SettingsError, match=problem) as caught:
            check_device(torch.device(device), capability)
        assert "keep_packed" in caught.value.hint


def model() -> nn.Sequential:
    sparse, ragged, dense, tied = nn.Linear(64, 32), nn.Linear(64, 8), nn.Linear(64, 32), nn.Linear(64, 32)
    refused = nn.Linear(128, 32)
    whole = nn.Sequential(sparse, ragged, dense, tied, nn.Embedding(32, 64), refused).bfloat16()
    for linear in (sparse, ragged, tied, refused):
        linear.weight.data = two_of_four(*linear.weight.shape)
    whole[4].weight = tied.weight
    return whole


def test_what_can_be_is_converted_and_the_rest_is_named() -> None:
    whole, seen = model(), []

    def convert_weight(weight: torch.Tensor) -> torch.Tensor:
        if weight.shape[1] == 128:
            raise RuntimeError("no such kernel\nand more")
        seen.append(weight)
        return weight + 1

    with pytest.warns(UserWarning, match="1 linears are semi-structured, 4 dense"):
        result = convert(whole, convert_weight)
    assert result.converted == ("0",)
    assert result.dense == {
        "1": "shape is not a multiple of 32 × 64",
        "2": "2:4 does not hold",
        "3": "shared with another module",
        "5": "PyTorch refuses it (no such kernel)",
    }
    assert torch.equal(whole[0].weight, seen[0] + 1)
    assert torch.equal(whole[3].weight, two_of_four(32, 64))


def test_nothing_to_convert_and_bad_settings(llama: Path) -> None:
    with pytest.raises(ModelError, match="2:4 does not hold: 0") as caught:
        convert(nn.Sequential(nn.Linear(64, 32)).bfloat16())
    assert "--pattern 2:4" in caught.value.hint
    with pytest.raises(SettingsError, match="exclude each other"):
        load(llama, keep_packed=True, semi_structured=True)
    with pytest.raises(SettingsError, match="needs CUDA, not cpu"):
        load(llama, semi_structured=True)
