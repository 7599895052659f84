"""A GPU's run uses PyTorch's deterministic mode; a CPU's leaves it as it is."""

import pytest
import torch

from llm_barber.model.fixed_order import fixed_order


def mode() -> tuple[bool, bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )


@pytest.mark.parametrize(("device", "within"), [("cpu", (False, False, True)), ("cuda", (True, True, False))])
def test_the_mode_is_as_it_was_afterwards(device: str, within: tuple[bool, bool, bool]) -> None:
    assert mode() == (False, False, True)
    with pytest.raises(KeyError), fixed_order(torch.device(device)):
        assert mode() == within
        raise KeyError
    assert mode() == (False, False, True)
