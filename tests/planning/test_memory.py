"""Peak memory of a run, by hand."""

from dataclasses import replace

import pytest

from llm_barber.masking.granularity import Granularity
from llm_barber.masking.pattern import NofM
from llm_barber.planning import memory
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
        held = peak_footprint(wide, replace(small, method=method)).host
        assert held == streams_and_masks + grams + 4 * working


def test_a_gpu_needs_memory_to_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    """12 bytes a weight beside a sort and 32 for each weight sorted together: a long group is sorted as a whole.

    Rows and columns are sorted a few at a time, into one more array of 4 bytes a weight. The scores of a block are
    joined in one more array of 4 bytes a weight.
    """
    block = BlockShapes("mlp", ((5000, 4096), (4096, 5000)), 0)
    weights, linear = 2 * 5000 * 4096, 5000 * 4096
    model = ModelShapes(64, 10, 64, 0, 0, (LayerShapes((block,), 0),))
    recipe = replace(PAPER, sequences=1, tokens=1, batch=1, on_cpu=False)
    streams, masks, rebuilding = 3 * 64 * 2, 5 * weights, (4 + 4 + 5) * weights
    shard = 2 * 2**26  # of 41 MB each
    for granularity, ranking in (
        (Granularity.OUTPUT, (12 + 4) * linear + 32 * 2**24),
        (Granularity.INPUT, (12 + 4) * linear + 32 * 2**24),
        (Granularity.LINEAR, 44 * linear),
        (Granularity.BLOCK, (44 + 4) * weights),
    ):
        held = peak_footprint(model, replace(recipe, granularity=granularity))
        assert held.device == masks + rebuilding + ranking
        # A layer's pruned weights on their way to a file, in pinned blocks; the layer's input while it is written.
        assert held.host == streams + shard + 64 * 2
    for ranked, ranking in ((Granularity.LINEAR, 44 * linear), (Granularity.OUTPUT, (12 + 4) * linear + 32 * 2**24)):
        held = peak_footprint(model, replace(recipe, granularity=None, initial_granularity=ranked))
        assert held.device == masks + ranking
    on_cpu = peak_footprint(model, replace(recipe, granularity=Granularity.BLOCK, on_cpu=True))
    assert on_cpu.host == streams + masks + rebuilding + (24 + 4) * weights
    monkeypatch.setattr(memory, "LONGEST_ON_GPU", linear)
    held = peak_footprint(model, replace(recipe, granularity=Granularity.BLOCK))
    assert held.device == masks + rebuilding + (24 + 4) * weights
    assert held.host == streams + 8 * weights + shard + 64 * 2


def test_alps_sorts_a_linear_on_a_gpu_beside_its_arrays() -> None:
    """By hand: 5 copies of a Gram matrix, 8 of the linear, 32 bytes for each weight that is sorted; the head, too."""
    layer = LayerShapes((BlockShapes("mlp", ((128, 64),), 0),), 0)
    model = ModelShapes(64, 512, 64, 0, 0, (layer,))
    recipe = replace(PAPER, granularity=None, sequences=1, tokens=1, batch=1, method=Initial.ALPS, on_cpu=False)
    gram, solving = 4 * 64**2, 4 * 5 * 64**2
    for pattern, sorting in ((None, 32), (NofM(2, 4), 0)):
        held = peak_footprint(model, replace(recipe, pattern=pattern)).device
        assert held == 128 * 64 * 7 + gram + solving + (8 * 4 + sorting) * 128 * 64
    with_head = peak_footprint(model, replace(recipe, prunes_head=True)).device
    assert with_head == 512 * 64 * 5 + gram + solving + (8 * 4 + 32) * 512 * 64


def test_attention_that_stores_its_scores_takes_memory() -> None:
    block = BlockShapes("attention", ((64, 64), (64, 64)), 64)
    recipe = replace(PAPER, sequences=4, tokens=100, batch=2)
    plain, stored = (memory._batch(replace(block, score_bytes=score_bytes), recipe) for score_bytes in (0, 24))
    assert stored - plain == 2 * 100 * 100 * 24


def test_a_shard_that_is_written_takes_memory() -> None:
    """On a GPU the whole layer on the host, its linears in pinned blocks; on a CPU pruned weights take no more."""
    block = BlockShapes("mlp", ((64, 64), (64, 64)), 0)
    weights, others = 2 * 64 * 64, 5000
    for on_cpu, shard in ((True, 2 * others), (False, 2 * (weights + others))):
        recipe = replace(PAPER, sequences=1, tokens=1, batch=1, on_cpu=on_cpu, room=2**30)
        layer = LayerShapes((block,), weights + others)
        assert memory._shard(layer, recipe) == shard
        held = peak_footprint(ModelShapes(64, 10, 64, 0, 0, (layer,)), recipe)
        # A GPU has the arrays; on the host are a copy of the input, two layers, and pages of the one that is read.
        assert on_cpu or held.host == 64 * 2 + 3 * 2 * (weights + others) + shard
