"""The file that says how channels were reordered: read as it was written, applied, and refused if damaged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_barber.checkpoint.channel_order import ORDER_NAME, ChannelOrder, Reordered, read_order
from llm_barber.checkpoint.locations import TensorInfo
from llm_barber.errors import ModelError

ORDER = ChannelOrder(
    reordered=(
        Reordered(tensors={"up.weight": 0, "up.bias": 0, "down.weight": 1}, order=(2, 0, 1)),
        Reordered(tensors={"v.weight": 0}, order=(1, 0)),
    )
)
SHAPES = {"up.weight": (3, 5), "up.bias": (3,), "down.weight": (5, 3), "v.weight": (2, 5)}


def tensors(**changes: tuple[int, ...]) -> dict[str, TensorInfo]:
    shapes = SHAPES | {name.replace("_", "."): shape for name, shape in changes.items()}
    return {name: TensorInfo("model.safetensors", shape, "F32") for name, shape in shapes.items()}


def test_written_and_read(tmp_path: Path) -> None:
    assert read_order(tmp_path) is None
    (tmp_path / ORDER_NAME).write_bytes(ORDER.to_json())
    assert read_order(tmp_path) == ORDER
    assert ChannelOrder.from_json(ORDER.to_json()).to_json() == ORDER.to_json()


def test_each_place_takes_the_dense_channel_that_is_named() -> None:
    weight = torch.arange(15.0).view(3, 5)
    assert ORDER.apply("up.weight", weight).equal(weight[[2, 0, 1]])
    assert ORDER.apply("up.bias", torch.tensor([7.0, 8.0, 9.0])).tolist() == [9, 7, 8]
    assert ORDER.apply("down.weight", weight.t()).equal(weight.t()[:, [2, 0, 1]])
    assert ORDER.apply("other.weight", weight) is weight


def test_the_inverse_undoes_it() -> None:
    weight = torch.rand(5, 3)
    back = ORDER.apply("down.weight", weight)[:, torch.tensor(ORDER.reordered[0].order).argsort()]
    assert back.equal(weight)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda content: content["reordered"][0].update(order=[0, 0, 1]), "the order of up.weight is no permutation"),
        (lambda content: content["reordered"][0].update(order=[0, 1, 3]), "no permutation"),
        (lambda content: content["reordered"][0].update(order=[0, 1, 2.5]), "valid integer"),
        (lambda content: content["reordered"][0].update(order=["0", 1, 2]), "valid integer"),
        (lambda content: content["reordered"][0].update(tensors={}), "at least 1 item"),
        (lambda content: content["reordered"][1].update(tensors={"up.bias": 0}), "a tensor is reordered twice"),
        (lambda content: content["reordered"][1].update(tensors={"v.weight": -1}), "greater than or equal to 0"),
        (lambda content: content.update(version=2), "Input should be 1"),
        (lambda content: content.clear(), "Field required"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, change: Any, problem: str) -> None:
    content = json.loads(ORDER.to_json())
    change(content)
    (tmp_path / ORDER_NAME).write_text(json.dumps(content))
    with pytest.raises(ModelError, match=rf"channel-order.json is damaged: .*{problem}"):
        read_order(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"{", ORDER.to_json()[:-20]])
def test_a_file_that_is_cut_short_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ORDER_NAME).write_bytes(content)
    with pytest.raises(ModelError, match="is damaged"):
        read_order(tmp_path)


def test_the_order_of_another_model_is_refused() -> None:
    ORDER.check(tensors(), "model")
    for change in ({"up_weight": (4, 5)}, {"down_weight": (3,)}):
        with pytest.raises(ModelError, match=r"model has no (up|down).weight with 3 channels in dimension [01]"):
            ORDER.check(tensors(**change), "model")
    with pytest.raises(ModelError, match=r"no v.weight with 2 channels"):
        ORDER.check({name: info for name, info in tensors().items() if name != "v.weight"}, "model")
