"""Gradients use PyTorch's deterministic mode on a GPU; on CPUs it gives the same."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llm_barber import PruneConfig, prune
from llm_barber.method import allocation
from llm_barber.model.fixed_order import FixedOrder, in_fixed_order
from llm_barber.model.skeleton import Skeleton
from tests.conftest import Listener, make_model, save_tokens
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import SETTINGS, read_untimed_files

MESSAGE = "cumsum_cuda_kernel does not have a deterministic implementation, but you set …"


def mode() -> tuple[bool, bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )


def test_the_mode_is_as_it_was_afterwards() -> None:
    assert mode() == (False, False, True)
    assert FixedOrder().compute(mode, lambda: None) == (False, False, True)
    assert FixedOrder(enabled=True).compute(mode, lambda: None) == (True, False, False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with pytest.raises(KeyError), in_fixed_order():
            assert mode() == (True, False, False)
            raise KeyError
        assert mode() == (True, True, True)
    finally:
        torch.use_deterministic_algorithms(False)


def on_device(monkeypatch: pytest.MonkeyPatch, possible: bool) -> list[bool]:
    """Treat models as on a device from now on; return the mode in which each gradient is taken."""
    grad, made, modes = torch.autograd.grad, Skeleton.__init__, []

    def noted(*arguments: Any, **named: Any) -> Any:
        if len(arguments) > 2:  # not of the loss by the last states
            modes.append(torch.are_deterministic_algorithms_enabled())
            if modes[-1] and not possible:
                raise RuntimeError(MESSAGE)
        return grad(*arguments, **named)

    def make(skeleton: Skeleton, *arguments: Any) -> None:
        made(skeleton, *arguments)
        skeleton.order.enabled = True

    monkeypatch.setattr(torch.autograd, "grad", noted)
    monkeypatch.setattr(Skeleton, "__init__", make)
    return modes


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("preset", ["paper", "best"])
@pytest.mark.parametrize("possible", [True, False], ids=["", "an operation without order"])
def test_every_gradient_of_a_run_on_a_device(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, family: str, preset: str, possible: bool
) -> None:
    model = make_model(tmp_path / "dense", family)
    settings: dict[str, Any] = {"model": model, "calibration": tokens, "preset": preset, **SETTINGS}
    prune(PruneConfig(output=tmp_path / "plain", **settings))
    modes, heard = on_device(monkeypatch, possible), Listener()
    prune(PruneConfig(output=tmp_path / "ordered", **settings), heard)
    assert len(modes) >= 8
    assert modes == [True] * len(modes) if possible else [True] + [False] * (len(modes) - 1)
    assert len([message for message in heard.warnings if "no fixed order" in message]) == (0 if possible else 1)
    assert mode() == (False, False, True)
    assert read_untimed_files(tmp_path / "ordered") == read_untimed_files(tmp_path / "plain")


def test_processes_find_out_by_themselves(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocation looks at windows that only the first process has."""
    tokens = save_tokens(tmp_path / "tokens.safetensors", sequences=6)
    monkeypatch.setattr(allocation, "LOSS_TOKENS", 48)
    settings: dict[str, Any] = {"model": llama, "calibration": tokens, "preset": "best", "tune_passes": 2, **SETTINGS}
    prune(PruneConfig(output=tmp_path / "plain", **settings))
    on_device(monkeypatch, possible=False)
    assert run_ranks(2, lambda _: prune(PruneConfig(output=tmp_path / "ordered", **settings)), tmp_path) == [0, 0]
    assert read_untimed_files(tmp_path / "ordered") == read_untimed_files(tmp_path / "plain")


def test_other_errors_are_raised(tmp_path: Path, llama: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("another error" if torch.are_deterministic_algorithms_enabled() else MESSAGE)

    monkeypatch.setattr(torch.autograd, "grad", broken)
    with pytest.raises(RuntimeError, match="deterministic implementation"):  # which nobody had asked for
        prune(PruneConfig(model=llama, output=tmp_path / "out", calibration=tokens, preset="paper", report=False))
    with pytest.raises(RuntimeError, match="another error"):
        FixedOrder(enabled=True).compute(broken, lambda: None)
