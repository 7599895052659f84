"""Seconds that a run waits for its files, compared with a run that is played through layer by layer."""

from dataclasses import replace

import pytest

from llm_barber.planning.costs import Costs, run_costs
from llm_barber.planning.rates import Rates
from llm_barber.planning.waiting import LAYER_STAGES, waiting_seconds, with_files_kept
from llm_barber.planning.work import Work
from tests.helpers.plans import MODEL, PAPER, RATES

GPU = replace(PAPER, on_cpu=False)
DEEP = replace(MODEL, layers=MODEL.layers * 16)


def played(layers: int, of_a_layer: float, of_a_shard: float) -> float:
    """Seconds of waiting for shards: the next one is begun when the one before is durable, the run ends with all."""
    time = durable = waited = 0.0
    for _ in range(layers):
        time += of_a_layer
        start = max(time, durable)
        waited += start - time
        time, durable = start, start + of_a_shard
    return waited + durable - time


@pytest.mark.parametrize("written", [1e4, 1e6, 2e6, 3e6, 1e8])
def test_a_gpu_waits_for_slow_shards_and_the_last_one(written: float) -> None:
    costs = run_costs(DEEP, GPU)
    rates = replace(RATES, written=written, moved=1e6)
    layer = sum(sum(rates.seconds(getattr(costs, name)).values()) for name in LAYER_STAGES) / 32
    shard = 117 * 2 / written
    waited = waiting_seconds(costs, DEEP, rates, GPU)
    assert waited["write"]["disk"] == pytest.approx(played(32, layer, shard))
    assert waited["write"]["link"] == 32 * 117 * 2 / rates.copied  # off the device before
    assert waited["keep"]["disk"] == 0


@pytest.mark.parametrize("changes", [{"on_cpu": True}, {"repeatable": False}], ids=["CPU", "not repeatable"])
def test_all_seconds_count_where_the_run_waits_for_everything(changes: dict[str, bool]) -> None:
    recipe = replace(GPU, **changes)
    costs = run_costs(DEEP, recipe)
    waited = waiting_seconds(costs, DEEP, RATES, recipe)
    assert waited["write"]["disk"] == pytest.approx(32 * 117 * 2 / RATES.written)
    assert waited["keep"]["disk"] == pytest.approx(31 * 60 * 4 * 2 / RATES.kept)


@pytest.mark.parametrize(("of_a_file", "layers_between"), [(0.01, 1), (0.4, 4), (0.7, 7), (0.9, 8), (7, 8), (20, 20)])
def test_activations_count_as_often_as_they_are_written(of_a_file: float, layers_between: float) -> None:
    """A layer takes a second."""
    rates = Rates(**{**RATES.__dict__, "products": 1.0, "kept": 1.0})
    costs = Costs(propagate=Work(products=32), keep=Work(kept=32 * of_a_file))
    assert with_files_kept(costs, DEEP, rates, GPU).keep.kept == pytest.approx(32 * of_a_file / layers_between)
    assert with_files_kept(costs, DEEP, rates, replace(GPU, repeatable=False)) == costs
