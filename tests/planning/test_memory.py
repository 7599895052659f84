"""Peak memory of a run, by hand."""

from dataclasses import replace

from llm_barber.planning.memory import peak_footprint
from llm_barber.planning.shapes import BlockShapes, LayerShapes, ModelShapes
from llm_barber.settings.initial import Initial
from tests.helpers.plans import PAPER


def test_gram_matrices_of_all_blocks_are_held_at_once() -> None:
    attention, mlp = BlockShapes("attention", ((64, 64), (64, 64)), 64), BlockShapes("mlp", ((128, 64), (64, 128)), 0)
    wide = ModelShapes(64, 10, 64, 0, 0, (LayerShapes((attention, mlp), 0),))
    small = replace(PAPER, granularity=None, sequences=1, tokens=1, batch=1)
    streams_and_masks = 3 * 64 * 2 + (2 * 64 * 64 + 2 * 64 * 128) * 7  # pruned and updated weights, those before, masks
    grams = 4 * (64 * 64 + 64 * 64 + 64 * 64 + 128 * 128)
    for method, working in (
        (Initial.SPARSEGPT, 4 * 128 * 128 + 5 * 64 * 128),
        (Initial.ALPS, 5 * 128 * 128 + 8 * 64 * 128),
    ):
        held = peak_footprint(wide, replace(small, initial=method)).host
        assert held == streams_and_masks + grams + 4 * working
