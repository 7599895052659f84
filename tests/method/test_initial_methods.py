"""What settings and plans know about each method of the initial mask agrees with what it does."""

import pytest
import torch

from llm_barber.errors import NotFiniteError
from llm_barber.masking.gram import GramMatrix
from llm_barber.masking.granularity import Granularity
from llm_barber.masking.pattern import NofM, Unstructured
from llm_barber.method.initial_methods import MASK_METHODS, PrunableLinear
from llm_barber.settings.initial import METHOD_FACTS, Initial


def test_each_method_has_its_facts_and_its_function() -> None:
    assert set(METHOD_FACTS) == set(MASK_METHODS) == set(Initial)


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
        keep, updated = how.prune(PrunableLinear("a linear", weight, target, Granularity.LINEAR), prepared)
        assert keep.dtype == torch.bool
        assert int(keep.sum()) == keep.numel() // 2
        assert method.has_updates == (updated is not None)
        rows, _ = how.prune(PrunableLinear("a linear", weight, target, Granularity.OUTPUT), prepared)
        assert torch.equal(rows, keep) is (method.fixes_groups or isinstance(target, NofM))


@pytest.mark.parametrize("method", [Initial.SPARSEGPT, Initial.ALPS])
def test_inputs_that_overflow_are_named(method: Initial) -> None:
    gram = GramMatrix(4, torch.device("cpu"))
    gram.update(torch.full((1, 2, 4), 1e30))
    with pytest.raises(NotFiniteError, match="the input of layer 3 mlp"):
        MASK_METHODS[method].prepare(gram, "layer 3 mlp")
