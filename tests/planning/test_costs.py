"""Work of each stage of a run, against torch's own counter and by hand."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from llm_barber.masking.granularity import Granularity
from llm_barber.masking.pattern import NofM
from llm_barber.planning.costs import run_costs
from llm_barber.planning.initial_costs import ranking_work
from llm_barber.planning.memory import peak_footprint
from llm_barber.planning.passes import forward_work
from llm_barber.planning.recipe import Recipe
from llm_barber.planning.shapes import BlockShapes, LayerShapes, ModelShapes
from llm_barber.planning.work import NO_WORK, Work
from llm_barber.settings.initial import Initial
from llm_barber.settings.presets import Allocation
from llm_barber.settings.prune import PruneConfig
from llm_barber.settings.refining import RefineSettings
from tests.conftest import FAMILIES
from tests.helpers.plans import ATTENTION, MASK, MODEL, PAPER, shapes_of


def test_dsnot_costs_sorts_in_attention_alone() -> None:
    """MLPs keep Wanda's masks."""
    wanda, dsnot = (
        run_costs(MODEL, replace(PAPER, method=method)).initial for method in (Initial.WANDA, Initial.DSNOT)
    )
    # Two sorts of every weight of attention's three linears, 4 a row, in both layers.
    assert dsnot.ordered - wanda.ordered == 2 * 2 * 3 * 16 * 2


def test_forward_equals_the_flop_counter_of_torch() -> None:
    """Eager attention computes all pairs of tokens, of which half are counted here, since kernels skip the others."""
    config = LlamaConfig(**{**FAMILIES["llama"], "attn_implementation": "eager"})
    model = AutoModelForCausalLM.from_config(config).eval()
    tokens = torch.zeros(3, 16, dtype=torch.int64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(tokens, use_cache=False)
    shapes = shapes_of(FAMILIES["llama"])
    recipe = Recipe(**{**PAPER.__dict__, "sequences": 3, "tokens": 16})
    total = sum((forward_work(block, recipe, 48) for layer in shapes.layers for block in layer.blocks), Work())
    head = 2 * 48 * 128 * 32
    # The rotary frequencies of 8 features a head: a product of positions with 4 frequencies, which is left out.
    rotary = counter.get_total_flops() - (total.products + 2 * total.attention + head)
    assert 0 <= rotary <= 2 * 48 * 4
    assert total.products == 2 * 48 * shapes.weights


def test_the_passes_of_the_paper_by_hand() -> None:
    costs = run_costs(MODEL, PAPER)
    tokens = 60
    # A layer has 48 + 64 weights; the pass for the inputs' statistics does without the last 32.
    assert costs.initial.products == 2 * (2 * tokens * (112 - 32))
    # Sparse and dense; back to q, k and up stop at their outputs: through the last linears only, 16 and 32.
    assert costs.rebuild.products == 2 * (2 * tokens * (2 * 112 + 48))
    assert costs.rebuild.gradients == 2 * (2 * tokens * 112)
    # Causal: half of 60 · 10 pairs, two products of width 4; two forwards and 2.5 of one back.
    assert costs.rebuild.attention == 2 * 4.5 * (2 * 2 * tokens * 10 * 4 / 2)
    assert costs.propagate.products == 2 * (2 * tokens * 112)
    assert costs.refine == costs.tune == costs.allocate == Work()
    assert costs.read.read == 2 * 117 * 2
    assert costs.write.written == 2 * 117 * 2
    # What the second layer starts from: 60 tokens of 4 features in 2 bytes.
    assert costs.keep == Work(kept=60 * 4 * 2)
    assert costs.embed.read == costs.embed.written == 84 * 2
    # Both sorts of the rebuild: elements times log2 of the row: rows of 4 but for down's 8, counted as the block's 4.
    assert costs.rebuild.sorted == 2 * 2 * 112 * 2


def test_refining_by_hand() -> None:
    costs = run_costs(MODEL, MASK)
    tokens, held_out = 60, 20
    # The dense stream once, the sparse one without the blocks' last linears, three passes over held-out windows.
    assert costs.refine.products == 2 * (2 * tokens * 112 + 2 * tokens * (112 - 16 - 32) + 3 * 2 * held_out * 112)
    # Two matrices for each tensor that linears read: 4, 4, 4 and 8 features.
    assert costs.refine.grams == 2 * (2 * 2 * tokens * (16 + 16 + 16 + 64))
    # 25, 25 and 50 swaps; a row of 160 weights has 10 that gain, and one stage more to find that out.
    assert MASK.swap_stages == (25, 25, 50)
    assert MASK.rounds(4096) == pytest.approx(3 + 100 / 14)
    assert MASK.rounds(160) == pytest.approx(2 + 10 / 14)
    # What the next layer starts from, of the dense model, too.
    assert costs.keep.kept == 2 * 60 * 4 * 2


def test_tuning_counts_three_forwards_a_pass() -> None:
    settings = RefineSettings(100, 1.0, True, held_out=0, passes=8, tunes_weights=True)
    costs = run_costs(MODEL, Recipe(**{**MASK.__dict__, "refine": settings}))
    # And one more for the inputs' mean squares, up to the input of the last linear, (4, 8).
    assert costs.tune.products + costs.tune.gradients == 2 * (8 * 3 * (2 * 60 * 112) + 2 * 60 * (112 - 32))


def test_the_output_head_by_hand() -> None:
    """10 × 4, Wanda: a statistic of 60 tokens; swaps: Gram matrices of both streams and what follows from them."""
    assert run_costs(MODEL, PAPER).head == Work()
    with_head = {"prunes_head": True}
    alone = run_costs(MODEL, Recipe(**{**PAPER.__dict__, **with_head})).head
    assert (alone.read, alone.written, alone.flops) == (2 * 84, 0, 0)
    assert alone.copied == 2 * 84 + 60 * 4 * 2
    tied = ModelShapes(**{**MODEL.__dict__, "tied": True})
    assert run_costs(tied, Recipe(**{**PAPER.__dict__, **with_head})).head.written == 2 * 40
    refined = run_costs(MODEL, Recipe(**{**MASK.__dict__, **with_head}))
    assert refined.head.grams == 2 * 60 * 4**2 * 2
    assert refined.head.copied == 2 * 84 + 3 * 60 * 4 * 2
    assert refined.refine == run_costs(MODEL, MASK).refine
    assert peak_footprint(MODEL, Recipe(**{**MASK.__dict__, **with_head})).host >= peak_footprint(MODEL, MASK).host


def test_the_allocation_looks_at_4096_tokens() -> None:
    recipe = Recipe(**{**MASK.__dict__, "allocation": Allocation.LOSS, "sequences": 128, "tokens": 2048})
    costs = run_costs(MODEL, recipe)
    # Three forward equivalents, and the output head forward and back to its input.
    assert costs.allocate.products == 2 * 3 * 2 * 4096 * 112 + 2 * 2 * 4096 * 10 * 4
    assert costs.allocate.read == 2 * 2 * 117 * 2  # a head that is pruned is read for it, others before
    pruned = run_costs(MODEL, replace(recipe, prunes_head=True)).allocate
    assert pruned.read == costs.allocate.read + 40 * 2


def test_the_allocation_by_outliers_runs_each_layer_once() -> None:
    costs = run_costs(MODEL, replace(PAPER, allocation=Allocation.OWL))
    assert costs.allocate.products == 2 * (2 * 60 * 112)
    assert costs.allocate.read == 2 * 117 * 2


def test_the_allocation_reads_layers_once_that_stay_on_a_device() -> None:
    on_host = Recipe(**{**MASK.__dict__, "allocation": Allocation.LOSS, "on_cpu": False})
    size, arrays = 2 * 117 * 2, 3 * 60 * 4 * 2  # of both layers; of the activations while allocating
    by_room = [run_costs(MODEL, replace(on_host, room=room)).allocate for room in (0, arrays + size // 2, 10**6)]
    assert [costs.read for costs in by_room] == [2 * size, 1.5 * size, size]
    peaks = [peak_footprint(MODEL, replace(on_host, room=room)).device for room in (arrays, arrays + size)]
    assert peaks[1] >= peaks[0]


def test_an_order_of_channels_takes_one_pass_over_the_dense_model() -> None:
    costs = run_costs(MODEL, replace(MASK, reorders=True))
    assert costs.reorder.products == 2 * (2 * 60 * 112)
    assert costs.reorder.read == 2 * 117 * 2
    # Each column of the blocks' last linears is compared with the groups that are taken together, in every row.
    wider = replace(
        MODEL, layers=(LayerShapes((ATTENTION, BlockShapes("mlp", ((16, 4), (4, 16)), 0)), 48 + 128 + 5),) * 2
    )
    more = run_costs(wider, replace(MASK, reorders=True)).reorder.moved - costs.reorder.moved
    assert more > 2 * 8 * 3 * 4 * 256 * 4
    assert run_costs(MODEL, MASK).reorder == NO_WORK


def test_the_target_takes_no_pass_of_its_own_where_the_masks_take_one() -> None:
    settings = RefineSettings(0, 0.5, False, held_out=0, passes=1, tunes_masks=True)
    recipe = Recipe(**{**MASK.__dict__, "refine": settings})
    wanda = run_costs(MODEL, recipe)
    magnitude = run_costs(MODEL, replace(recipe, method=Initial.MAGNITUDE))
    layer = 2 * 60 * 112
    assert (wanda.initial.products, magnitude.initial.products) == (2 * layer, 0)
    assert magnitude.tune.products - wanda.tune.products == 2 * layer
    all_dense = replace(recipe, refine=replace(settings, target_mix=1.0))  # which needs no dense layer on the input
    assert run_costs(MODEL, all_dense).initial.products == 2 * (2 * 60 * (112 - 32))


@pytest.mark.parametrize("recipe", [PAPER, MASK])
def test_processes_share_the_sequences_and_nothing_else(recipe: Recipe) -> None:
    alone, shared = run_costs(MODEL, recipe), run_costs(MODEL, recipe.among(2))
    assert alone.total.reduced == 0
    assert shared.total.reduced > 0
    assert shared.write == alone.write
    assert shared.keep == alone.keep + Work(reduced=alone.keep.kept / 2)
    assert shared.propagate.products == alone.propagate.products / 2
    assert shared.refine.grams == alone.refine.grams / 2
    for name in ("searched", "sorted", "exact"):
        assert getattr(shared.total, name) == getattr(alone.total, name)
    assert recipe.among(4).local_sequences == 2  # of six: the busiest has two
    assert peak_footprint(MODEL, recipe.among(2)).host < peak_footprint(MODEL, recipe).host


@pytest.mark.parametrize(
    ("on_cpu", "by_c", "rows", "selecting", "sorts_linears"),
    [(True, True, 1, 16, False), (True, False, 64, 0, True), (False, True, 64, 32, True), (False, True, 63, 0, True)],
)
def test_borders_of_rows_are_selected_by_c_or_by_a_gpu_that_has_rows_enough(
    monkeypatch: pytest.MonkeyPatch, on_cpu: bool, by_c: bool, rows: int, selecting: int, sorts_linears: bool
) -> None:
    """A GPU sorts what is compared in a linear."""
    monkeypatch.setattr("llm_barber.planning.initial_costs.can_select", lambda: by_c)
    block, weights = BlockShapes("mlp", ((rows, 8),), 0), rows * 8
    recipe = replace(PAPER, on_cpu=on_cpu)
    by_row = ranking_work(block, recipe)
    assert by_row.moved == (60 + selecting) * weights
    assert by_row.sorted == (0 if selecting else 3 * weights)  # log2 of 8
    in_linears = (replace(recipe, method=Initial.RIA), replace(recipe, initial_granularity=Granularity.LINEAR))
    for sorting in (ranking_work(block, recipe).sorted for recipe in in_linears):
        assert sorting == (weights * math.log2(weights) if sorts_linears else 0)
    by_rows = replace(recipe, method=Initial.RIA, initial_granularity=Granularity.OUTPUT)
    assert ranking_work(block, by_rows) == by_row


def test_a_pattern_is_ranked_without_sorting() -> None:
    costs = run_costs(MODEL, Recipe(**{**PAPER.__dict__, "pattern": NofM(2, 4)}))
    assert costs.initial.sorted == 0
    assert costs.initial.moved > run_costs(MODEL, PAPER).initial.moved


@pytest.mark.parametrize("initial", list(Initial))
def test_every_method_is_counted(initial: Initial) -> None:
    recipe = Recipe.of(
        PruneConfig(model="m", output=Path("o"), initial=initial), 1, torch.float32, torch.float32, torch.device("cpu")
    )
    assert run_costs(MODEL, recipe).initial.moved > 0
