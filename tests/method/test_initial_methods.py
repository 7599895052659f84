"""What settings and plans know about each method of the initial mask agrees with what it does."""

import importlib
import inspect
import sys
from pathlib import Path

import pytest
import torch

from llm_barber.errors import NotFiniteError
from llm_barber.masking.gram import GramMatrix
from llm_barber.masking.granularity import Granularity
from llm_barber.masking.pattern import NofM, Unstructured
from llm_barber.method.initial_methods import MASK_METHODS, MaskMethod, PrunableLinear, Pruned, prune_linear
from llm_barber.settings.presets import METHOD_FACTS, Initial

WEIGHT = torch.arange(32.0).view(4, 8)
LINEAR = PrunableLinear("layer 0 mlp.up", WEIGHT, Unstructured(0.5), Granularity.OUTPUT)


@pytest.mark.parametrize(
    ("module", "table"),
    [("llm_barber.settings.presets", "METHOD_FACTS"), ("llm_barber.method.initial_methods", "MASK_METHODS")],
)
def test_a_method_that_a_table_lacks_is_named(
    module: str, table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = inspect.getsource(sys.modules[module])
    (tmp_path / "without_ria.py").write_text(source.replace("    Initial.RIA: M", "    # Initial.RIA: M"))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(LookupError, match=f"^{table} lacks ria$"):
        importlib.import_module("without_ria")


def test_each_method_has_its_facts_and_its_function() -> None:
    assert set(METHOD_FACTS) == set(MASK_METHODS) == set(Initial)


def test_limits_of_memory_count_the_gram_matrices_of_each_method_that_gathers_them() -> None:
    gathering = {method for method in Initial if MASK_METHODS[method].statistic is GramMatrix}
    assert gathering == {method for method in Initial if method.has_updates}


@pytest.mark.parametrize("method", Initial)
def test_facts_agree_with_the_function(method: Initial) -> None:
    how = MASK_METHODS[method]
    assert method.reads_inputs == (how.statistic is not None)
    torch.manual_seed(0)
    weight = torch.randn(8, 16)
    prepared = None
    if how.statistic is not None:
        statistic = how.statistic(16, weight.device)
        statistic.update(torch.randn(4, 32, 16))
        prepared = how.prepare(statistic, "a linear")
    for target in (Unstructured(0.5), NofM(2, 4)):
        linear = PrunableLinear("a linear", weight, target, Granularity.LINEAR)
        keep, updated = prune_linear(method, linear, prepared)
        assert keep.dtype == torch.bool
        assert method.has_updates == (updated is not None)
        assert int(keep.sum()) == keep.numel() // 2
        again, _ = prune_linear(method, linear, prepared)
        assert torch.equal(keep, again), "the same linear got another mask: give a generator a fixed seed"
        rows, _ = how.prune(PrunableLinear("a linear", weight, target, Granularity.OUTPUT), prepared)
        assert torch.equal(rows, keep) is (method.fixes_groups or isinstance(target, NofM))


@pytest.mark.parametrize("method", Initial)
def test_zeros_among_weights_and_inputs_leave_the_number_of_kept_weights(method: Initial) -> None:
    """A score that divides by a sum of weights or inputs must not be NaN there."""
    how = MASK_METHODS[method]
    torch.manual_seed(0)
    weight, inputs = torch.randn(8, 16), torch.randn(4, 32, 16)
    weight[2] = weight[:, 3] = 0
    inputs[..., 5] = 0
    prepared = None
    if how.statistic is not None:
        statistic = how.statistic(16, weight.device)
        statistic.update(inputs)
        prepared = how.prepare(statistic, "a linear")
    for target in (Unstructured(0.5), NofM(2, 4)):
        linear = PrunableLinear("a linear", weight, target, Granularity.OUTPUT)
        keep, updated = prune_linear(method, linear, prepared)
        assert int(keep.sum()) == keep.numel() // 2
        assert updated is None or updated.isfinite().all()


@pytest.mark.parametrize(
    ("pruned", "message"),
    [
        ((WEIGHT, None), r"wanda: the keep mask of layer 0 mlp.up is float32 \(4, 8\), not bool \(4, 8\)"),
        ((WEIGHT.T > 3, None), r"wanda: the keep mask of layer 0 mlp.up is bool \(8, 4\), not bool \(4, 8\)"),
        ((WEIGHT > 3, WEIGHT), "wanda returned weights, but METHOD_FACTS has has_updates=False"),
    ],
)
def test_what_a_method_returns_is_checked(pruned: Pruned, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MASK_METHODS, Initial.WANDA, MaskMethod(lambda *_: pruned))
    with pytest.raises(TypeError, match=message):
        prune_linear(Initial.WANDA, LINEAR, None)


@pytest.mark.parametrize(
    ("updated", "message"),
    [
        (None, "sparsegpt returned no weights, but METHOD_FACTS has has_updates=True"),
        (WEIGHT.T, r"sparsegpt: the weights of layer 0 mlp.up are float32 \(8, 4\), not \(4, 8\)"),
    ],
)
def test_updated_weights_are_checked(
    updated: torch.Tensor | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MASK_METHODS, Initial.SPARSEGPT, MaskMethod(lambda *_: (WEIGHT > 3, updated)))
    with pytest.raises(TypeError, match=message):
        prune_linear(Initial.SPARSEGPT, LINEAR, None)


def test_scores_are_checked() -> None:
    with pytest.raises(TypeError, match=r"scores of layer 0 mlp.up are float64 \(4, 8\), not float32 \(4, 8\)"):
        LINEAR.best(WEIGHT.double())
    with pytest.raises(TypeError, match=r"are float32 \(8, 4\), not float32 \(4, 8\)"):
        LINEAR.best(WEIGHT.T)
    scores = WEIGHT.clone()
    scores[1, 2] = torch.nan
    with pytest.raises(NotFiniteError, match="a score of layer 0 mlp.up holds NaN"):
        LINEAR.best(scores)


@pytest.mark.parametrize("method", [method for method in Initial if MASK_METHODS[method].statistic is GramMatrix])
def test_inputs_that_overflow_are_named(method: Initial) -> None:
    gram = GramMatrix(4, torch.device("cpu"))
    gram.update(torch.full((1, 2, 4), 1e30))
    with pytest.raises(NotFiniteError, match="the input of layer 3 mlp"):
        MASK_METHODS[method].prepare(gram, "layer 3 mlp")
