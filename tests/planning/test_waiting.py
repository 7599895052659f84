"""Seconds that a run waits for its files, compared with a run that is played through layer by layer."""

from dataclasses import replace

import pytest

from llm_barber.planning.costs import Costs, run_costs
from llm_barber.planning.waiting import LAYER_STAGES, waiting_seconds
from llm_barber.planning.work import Work
from llm_barber.settings.presets import Allocation
from tests.helpers.plans import MODEL, PAPER, RATES

GPU = replace(PAPER, on_cpu=False)
DEEP = replace(MODEL, layers=MODEL.layers * 16)


def played(layers: int, reading: float, of_a_layer: float, writing: float) -> float:
    """Seconds of waiting for a disk that serves one request after the other.

    The next layer is asked for when a layer is taken. A shard is begun when the one before is durable; the run ends
    when all are.
    """
    time = durable = 0.0
    idle = read = reading  # when the disk is idle, and the next layer there
    for index in range(layers):
        time = max(time, read)
        if index + 1 < layers:
            idle = read = max(idle, time) + reading
        time = max(time + of_a_layer, durable)
        idle = durable = max(idle, time) + writing
    return durable - layers * of_a_layer


@pytest.mark.parametrize("read", [1e2, 1e3, 1e5, 1e9])
@pytest.mark.parametrize("written", [1e2, 1e3, 1e6, 1e8])
def test_a_gpu_waits_for_a_slow_disk_the_first_layer_and_the_last_shard(written: float, read: float) -> None:
    costs = run_costs(DEEP, GPU)
    rates = replace(RATES, written=written, read=read, moved=1.6e6, launches=1e12)
    layer = sum(sum(rates.seconds(getattr(costs, name)).values()) for name in LAYER_STAGES) / 32
    reading, writing = costs.read.read / 32 / read, 117 * 2 / written
    waited = waiting_seconds(costs, DEEP, rates, GPU)
    expected = played(32, reading, layer, writing)
    assert waited["read"]["disk"] + waited["write"]["disk"] == pytest.approx(expected, rel=0.03)
    assert waited["write"]["link"] == 32 * 117 * 2 / rates.copied  # off the device before
    assert waited["keep"]["disk"] == 0


def test_a_gpu_waits_for_launches_that_take_longer_than_its_work() -> None:
    """Two seconds of products; launches of one second are hidden behind them, and of five seconds three are not."""
    for launches, waited in ((10, 0), (50, 3)):
        costs = Costs(tune=Work(products=2, launches=launches))
        seconds = waiting_seconds(costs, DEEP, replace(RATES, products=1.0, launches=10.0), GPU)["tune"]
        assert (seconds["compute"], seconds["launches"]) == (2, waited)


def test_an_allocation_waits_for_its_first_layer_and_a_slow_disk() -> None:
    costs = Costs(allocate=Work(read=32.0, products=64.0))
    for read, waited in ((1.0, 1.0), (0.25, 4 + 64 * 31 / 32)):
        rates = replace(RATES, products=1.0, read=read)
        assert waiting_seconds(costs, DEEP, rates, GPU)["allocate"]["disk"] == pytest.approx(waited)


def test_the_first_layer_is_read_while_an_allocation_goes_back_through_layers_on_the_device() -> None:
    """An allocation of nine seconds goes back for six of them, in which it reads no layer."""
    rates = replace(RATES, products=1.0, read=1.0)
    for allocating, changes, waited, waited_before in (
        (9, {"room": 10**6}, 0.0, 1 + 29 * 31 / 32),
        (0.9, {"room": 10**6}, 0.4, 1 + 31.7 * 31 / 32),
        (9, {"room": 0}, 1.0, 1 + 23 * 31 / 32),
        (9, {"room": 10**6, "allocation": Allocation.UNIFORM}, 1.0, 1 + 23 * 31 / 32),
    ):
        costs = Costs(allocate=Work(read=32, products=allocating), read=Work(read=32), propagate=Work(products=64))
        seconds = waiting_seconds(costs, DEEP, rates, replace(GPU, **{"allocation": Allocation.LOSS, **changes}))
        assert seconds["read"]["disk"] == pytest.approx(waited)
        assert seconds["allocate"]["disk"] == pytest.approx(waited_before)


@pytest.mark.parametrize("changes", [{"on_cpu": True}, {"repeatable": False}], ids=["CPU", "not repeatable"])
def test_all_seconds_of_writing_count_where_the_run_waits_for_it(changes: dict[str, bool]) -> None:
    recipe = replace(GPU, **changes)
    costs = run_costs(DEEP, recipe)
    waited = waiting_seconds(costs, DEEP, RATES, recipe)
    assert waited["write"]["disk"] == pytest.approx(32 * 117 * 2 / RATES.written)
    assert waited["keep"]["disk"] == pytest.approx(31 * 60 * 4 * 2 / RATES.kept)
    reading = costs.read.read / RATES.read
    assert waited["read"]["disk"] == pytest.approx(reading if recipe.on_cpu else reading / 32)
