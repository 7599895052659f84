"""Tensors in huge pages are ordinary tensors: each has its values and a storage of its own."""

import copy
import gc
from pathlib import Path

import pytest
import torch

from llm_barber.checkpoint.memory import copied
from llm_barber.runtime import huge_pages
from llm_barber.runtime.huge_pages import ALIGNMENT, HugePages

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
needs_huge_pages = pytest.mark.skipif(
    not SETTING.exists() or "[never]" in SETTING.read_text(), reason="the system has no huge pages"
)


def test_values_stay_when_the_memory_s_owner_goes() -> None:
    pages, tensors = HugePages(), []
    for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.uint8, torch.bool):
        tensors += [torch.randint(0, 2, shape).to(dtype) for shape in ((3, 5), (1,), (7, 64), ())]
        tensors.append(torch.randint(0, 2, (6, 4)).to(dtype).t())
    moved = [pages.moved(tensor) for tensor in tensors]
    del pages
    gc.collect()
    for tensor, value in zip(tensors, moved, strict=True):
        assert torch.equal(tensor, value)
        assert (value.dtype, value.shape) == (tensor.dtype, tensor.shape)
        assert value.is_contiguous()
        assert value.data_ptr() % ALIGNMENT == 0
        assert value.untyped_storage().nbytes() <= tensor.numel() * tensor.element_size() + ALIGNMENT
    before = moved[0].clone()
    copy.deepcopy(moved[0]).zero_()
    assert torch.equal(moved[0], before)


def test_tensors_do_not_overlap_in_any_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "CHUNK", 2**21)
    pages = HugePages()
    values = [pages.moved(torch.full((400_000,), number, dtype=torch.float32)) for number in range(8)]
    values.append(pages.moved(torch.full((3_000_000,), 8, dtype=torch.float32)))  # longer than a chunk
    assert all((value == number).all() for number, value in enumerate(values))


def test_what_is_on_another_device_or_there_already_is_left_alone() -> None:
    pages = HugePages()
    values = pages.moved(torch.ones(3))
    for tensor in (torch.empty(3, device="meta"), values, values[1:]):
        assert pages.moved(tensor) is tensor
    assert pages.moved(torch.empty(0, 4)).shape == (0, 4)


def test_a_system_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "AVAILABLE", False)
    tensor = torch.arange(12.0).view(3, 4).t()
    assert HugePages().moved(tensor) is tensor
    copy_of_it = copied(tensor, HugePages().empty)
    assert copy_of_it.is_contiguous()
    assert copy_of_it.data_ptr() != tensor.data_ptr()
    assert torch.equal(copy_of_it, tensor)
