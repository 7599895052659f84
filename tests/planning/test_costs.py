"""`llm-barber plan`: what is counted, against torch's own counter and by hand, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from llm_barber.cli import _main
from llm_barber.errors import BarberError, ModelError, SettingsError
from llm_barber.masking.granularity import Granularity
from llm_barber.masking.pattern import NofM
from llm_barber.model.device import experts_per_token
from llm_barber.model.skeleton import Skeleton
from llm_barber.model.structure import find_architecture
from llm_barber.planning.costs import run_costs
from llm_barber.planning.forecast import Forecast
from llm_barber.planning.limits import DEVICE_LIBRARIES, DEVICE_MARGIN
from llm_barber.planning.memory import peak_footprint
from llm_barber.planning.passes import forward_work
from llm_barber.planning.plan import VOCABULARY_BYTES, plan
from llm_barber.planning.rates import KINDS, named_rates
from llm_barber.planning.recipe import Recipe
from llm_barber.planning.shapes import BlockShapes, LayerShapes, ModelShapes, model_shapes
from llm_barber.planning.table import amount, duration
from llm_barber.planning.work import Work
from llm_barber.settings.initial import Initial
from llm_barber.settings.plan import PlanConfig
from llm_barber.settings.presets import Allocation
from llm_barber.settings.prune import PruneConfig
from llm_barber.settings.refining import RefineSettings
from llm_barber.text.calibration import READ_BYTES, READING_BYTES, token_shape
from tests.conftest import FAMILIES, Listener, save_tokens

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
    "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
LLAMA_70B = {
    **LLAMA_8B, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
}  # fmt: skip

# One layer by hand: two (4, 4) linears read one tensor, then (4, 4); up (8, 4), down (4, 8); 5 more parameters.
ATTENTION = BlockShapes("attention", ((4, 4), (4, 4), (4, 4)), 4)
MLP = BlockShapes("mlp", ((8, 4), (4, 8)), 0)
LAYER = LayerShapes((ATTENTION, MLP), 48 + 64 + 5)
MODEL = ModelShapes(hidden=4, vocabulary=10, head=4, embedding=40, outside=84, layers=(LAYER, LAYER))
PAPER = Recipe(
    sequences=6, tokens=10, batch=2, itemsize=2, stored=2, on_cpu=True, initial=Initial.WANDA, pattern=None,
    allocation=Allocation.UNIFORM, granularity=Granularity.OUTPUT, refine=None,
)  # fmt: skip
RATES = named_rates(4e14, None, 2e12, 1e10, 5e9, 2e9, torch.bfloat16)
MASK = Recipe(**{**PAPER.__dict__, "granularity": None, "refine": RefineSettings(100, 0.5, False, held_out=2)})


def shapes_of(settings: dict[str, Any], family: str = "llama") -> ModelShapes:
    given = {**settings}
    config = AutoConfig.for_model(given.pop("model_type", family), **given)
    architecture = find_architecture(config)
    return model_shapes(Skeleton(config, architecture, torch.device("cpu"), torch.float32))


def test_dsnot_is_counted_where_it_works() -> None:
    """MLPs keep Wanda's masks."""
    wanda, dsnot = (run_costs(MODEL, replace(PAPER, initial=one)).initial for one in (Initial.WANDA, Initial.DSNOT))
    # Two sorts of every weight of attention's three linears, 4 a row, in both layers.
    assert dsnot.ordered - wanda.ordered == 2 * 2 * 3 * 16 * 2


def test_forward_against_the_flop_counter_of_torch() -> None:
    """Eager attention computes all pairs of tokens, of which half are counted here, since kernels skip the others."""
    config = LlamaConfig(**{**FAMILIES["llama"], "attn_implementation": "eager"})
    model = AutoModelForCausalLM.from_config(config).eval()
    tokens = torch.zeros(3, 16, dtype=torch.int64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(tokens, use_cache=False)
    found = shapes_of(FAMILIES["llama"])
    recipe = Recipe(**{**PAPER.__dict__, "sequences": 3, "tokens": 16})
    total = sum((forward_work(block, recipe, 48) for layer in found.layers for block in layer.blocks), Work())
    head = 2 * 48 * 128 * 32
    # The rotary frequencies of 8 features a head: a product of positions with 4 frequencies, which is left out.
    rotary = counter.get_total_flops() - (total.products + 2 * total.attention + head)
    assert 0 <= rotary <= 2 * 48 * 4
    assert total.products == 2 * 48 * found.weights


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
    assert costs.keep == Work(written=60 * 4 * 2)
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
    assert costs.keep.written == 2 * 60 * 4 * 2


def test_tuning_counts_three_forwards_a_pass() -> None:
    settings = RefineSettings(100, 1.0, True, held_out=0, passes=8, tunes_weights=True)
    costs = run_costs(MODEL, Recipe(**{**MASK.__dict__, "refine": settings}))
    # And one more for the inputs' mean squares.
    assert costs.tune.products + costs.tune.gradients == 2 * (8 * 3 + 1) * (2 * 60 * 112)


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


def test_the_allocation_looks_at_4096_tokens() -> None:
    recipe = Recipe(**{**MASK.__dict__, "allocation": Allocation.LOSS, "sequences": 128, "tokens": 2048})
    costs = run_costs(MODEL, recipe)
    # Three forward equivalents, and the output head forward and back to its input.
    assert costs.allocate.products == 2 * 3 * 2 * 4096 * 112 + 2 * 2 * 4096 * 10 * 4
    assert costs.allocate.read == 2 * 2 * 117 * 2 + 84 * 2


@pytest.mark.parametrize("recipe", [PAPER, MASK])
def test_processes_share_the_sequences_and_nothing_else(recipe: Recipe) -> None:
    alone, shared = run_costs(MODEL, recipe), run_costs(MODEL, recipe.among(2))
    assert alone.total.reduced == 0
    assert shared.total.reduced > 0
    assert shared.write == alone.write + Work(reduced=alone.keep.written / 2)
    assert shared.keep == alone.keep
    assert shared.propagate.products == alone.propagate.products / 2
    assert shared.refine.grams == alone.refine.grams / 2
    for name in ("searched", "sorted", "exact"):
        assert getattr(shared.total, name) == getattr(alone.total, name)
    assert recipe.among(4).local_sequences == 2  # of six: the busiest has two
    assert peak_footprint(MODEL, recipe.among(2)).host < peak_footprint(MODEL, recipe).host


def test_a_pattern_is_ranked_without_sorting() -> None:
    costs = run_costs(MODEL, Recipe(**{**PAPER.__dict__, "pattern": NofM(2, 4)}))
    assert costs.initial.sorted == 0
    assert costs.initial.moved > run_costs(MODEL, PAPER).initial.moved


@pytest.mark.parametrize(
    ("settings", "parameters", "weights"),
    [(LLAMA_8B, 8_030_261_248, 6_979_321_856), (LLAMA_70B, 70_553_706_496, 68_451_041_280)],
)
def test_llama_3_to_the_digit(settings: dict[str, Any], parameters: int, weights: int) -> None:
    found = shapes_of(settings)
    assert (found.parameters, found.weights) == (parameters, weights)
    recipe = Recipe(**{**PAPER.__dict__, "sequences": 128, "tokens": 2048})
    # 128 · 2048 tokens through all linears: 2 FLOPs a weight and token.
    assert run_costs(found, recipe).propagate.products == 2 * 128 * 2048 * weights
    peak = peak_footprint(found, Recipe(**{**recipe.__dict__, "on_cpu": False, "batch": 8}))
    stream = 128 * 2048 * found.hidden * 2
    assert 3 * stream < peak.host < 3 * stream + 4 * found.layers[0].parameters * 2 + 3 * 2**30
    # Weights and pruned ones in two bytes, masks, squares of gradients in four.
    assert 6 * found.layers[0].weights < peak.device < 50 * found.layers[0].weights


def test_experts_are_given_their_share_of_the_tokens() -> None:
    """Qwen2-MoE's shapes: a dense layer, and one of four experts, two for each token, with a shared one."""
    found = shapes_of(FAMILIES["qwen2_moe"], "qwen2_moe")
    dense, mixture = found.layers
    assert [block.copies for block in dense.blocks] == [1, 1]
    (attention, *parts) = mixture.blocks
    experts, shared = sorted(parts, key=lambda one: -one.copies)
    assert (experts.copies, experts.share, experts.linears) == (4, 0.5, ((16, 32), (16, 32), (32, 16)))
    assert (shared.copies, shared.share, shared.linears) == (1, 1, ((48, 32), (48, 32), (32, 48)))
    assert experts.beside == shared.weights
    assert shared.beside == experts.all_weights == 4 * experts.weights
    assert mixture.weights == attention.weights + 4 * experts.weights + shared.weights
    tokens = PAPER.sequences * PAPER.tokens
    active = attention.weights + 2 * experts.weights + shared.weights
    assert run_costs(found, PAPER).propagate.products == 2 * tokens * (dense.weights + active)
    assert run_costs(found, MASK).total.flops > run_costs(found, PAPER).total.flops
    assert peak_footprint(found, PAPER).host > 0


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_architecture_has_shapes(family: str) -> None:
    found = shapes_of(FAMILIES[family], family)
    assert found.hidden == 32
    assert found.vocabulary == 128
    assert all(layer.weights <= layer.parameters for layer in found.layers)
    attending = [block.attention_width for layer in found.layers for block in layer.blocks if block.name == "attention"]
    assert set(attending) <= {32}
    assert run_costs(found, MASK).total.flops > 0


def test_a_plan_of_a_folder_a_file_and_a_named_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(LLAMA_8B))
    found: list[Forecast] = [
        plan(PlanConfig(model=str(place), flops=400e12, processes="1,2,4,8", preset="paper"))
        for place in (tmp_path, config)
    ]
    assert found[0].runs == found[1].runs
    assert [run.processes for run in found[0].runs] == [1, 2, 4, 8]
    seconds = [run.seconds for run in found[0].runs]
    assert seconds == sorted(seconds, reverse=True)
    assert found[0].device == "cuda"
    assert not found[0].measured
    # Twice the disk's bandwidth: half the time to read.
    fast = plan(PlanConfig(model=str(config), flops=400e12, bandwidth=4e9, link=1e18, preset="paper"))
    slow = plan(PlanConfig(model=str(config), flops=400e12, bandwidth=2e9, link=1e18, preset="paper"))
    reads = [next(stage for stage in one.runs[0].stages if stage.name == "read").seconds for one in (slow, fast)]
    assert reads[0] == pytest.approx(2 * reads[1])
    assert plan(PlanConfig(model=str(config), flops=1e9, preset="paper")).runs[0].bottleneck == "compute"
    assert plan(PlanConfig(model=str(config), flops=1e18, bandwidth=1e6)).runs[0].bottleneck == "disk"


def test_what_is_kept_while_layers_are_computed_takes_time_where_the_disk_is_slower(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    # 31 layers' inputs of 128 × 2048 tokens, 4096 features in 2 bytes.
    kept = 31 * 128 * 2048 * 4096 * 2
    for bandwidth in (2e9, 2e8):
        (run,) = plan(PlanConfig(model=str(tmp_path), flops=400e12, bandwidth=bandwidth, preset="paper")).runs
        stages = {one.name: one for one in run.stages}
        layers = sum(stages[name].seconds for name in ("initial", "rebuild", "propagate"))
        assert stages["keep"].bytes_written == kept
        assert stages["keep"].seconds == pytest.approx(max(0, kept / bandwidth - layers))
        assert run.seconds == pytest.approx(sum(one.seconds for one in run.stages))
    alone: dict[str, Any] = {"initial": "sparsegpt", "rebuild": False}  # waits for it: nobody writes what it ran
    for settings, waited in ((alone, kept / 2e9), ({**alone, "keep_updates": True}, 0)):
        (run,) = plan(PlanConfig(model=str(tmp_path), flops=400e12, bandwidth=2e9, **settings)).runs
        assert next(one for one in run.stages if one.name == "keep").seconds == pytest.approx(waited)


def test_text_takes_memory_and_tokens_of_a_file_do_not(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_barber.planning.plan.current_memory", lambda: 2**28)
    monkeypatch.setattr("llm_barber.planning.plan.measured_rates", lambda *_: RATES)
    (tmp_path / "short.txt").write_text("a" * 1000)
    (tmp_path / "long.txt").write_text("a" * 10**7)
    tokens = save_tokens(tmp_path / "tokens.safetensors", sequences=4)
    seqlen = token_shape(tokens)[1]
    none, short, long = (
        plan(PlanConfig(model=str(llama), samples=4, seqlen=seqlen, calibration=str(one))).runs[0].host_memory
        for one in (tokens, tmp_path / "short.txt", tmp_path / "long.txt")
    )
    tokenizer = VOCABULARY_BYTES * AutoConfig.from_pretrained(llama).vocab_size
    assert short - none == tokenizer + READ_BYTES * 1000
    assert long == 2**28 + tokenizer + READING_BYTES * 10**7  # while it is read


def test_a_file_of_tokens_is_planned_with_the_windows_it_has(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_barber.planning.plan.measured_rates", lambda *_: RATES)
    tokens = save_tokens(tmp_path / "tokens.safetensors", sequences=4)
    found = plan(PlanConfig(model=str(llama), calibration=str(tokens)))
    assert (found.sequences, found.tokens) == token_shape(tokens)
    with pytest.raises(SettingsError, match="5 processes cannot share 4 windows"):
        plan(PlanConfig(model=str(llama), calibration=str(tokens), processes=(5,)))


def test_a_named_gpu_computes_as_many_windows_together_as_it_holds(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    every, some = (
        plan(PlanConfig(model=str(tmp_path), flops=400e12, device_memory=memory)) for memory in (None, "12GiB")
    )
    assert 1 <= some.batch_size < every.batch_size
    few, all_of_them = some.runs[0].device_memory, every.runs[0].device_memory
    assert few is not None
    assert all_of_them is not None
    assert few < all_of_them
    told = Listener()
    plan(PlanConfig(model=str(tmp_path), flops=400e12, device_memory="4GiB"), told)
    assert any("--device-memory: 4.0 GiB of the GPU's memory will hardly do" in line for line in told.warnings)


def test_what_is_left_out_is_counted_and_told_of(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    told, silent = Listener(), Listener()
    all_of_it = plan(PlanConfig(model=str(tmp_path), flops=400e12), silent)
    without = plan(PlanConfig(model=str(tmp_path), flops=400e12, exclude=("down_proj",)), told)
    assert without.runs == all_of_it.runs
    assert [line for line in told.warnings if "as if every linear were pruned" in line]
    assert not silent.warnings


def test_activations_stay_on_a_device_that_has_room(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))

    def planned(memory: float) -> Any:
        settings: dict[str, Any] = {"preset": "paper", "batch_size": 1, "bandwidth": 1e18}
        return plan(PlanConfig(model=str(tmp_path), flops=400e12, device_memory=int(memory), **settings)).runs[0]

    array = 128 * 2048 * 4096 * 2  # bytes; a power of two, so that pinned memory takes no more
    none = planned(2**30)
    held = none.device_memory
    some, every = planned(DEVICE_LIBRARIES + DEVICE_MARGIN * held + 1.5 * array), planned(80e9)
    assert (some.device_memory - held, every.device_memory - held) == (array, 3 * array)
    assert (none.on_device, some.on_device, every.on_device) == (0, array, 3 * array)
    # Off the device are copies of what a layer starts from, for as long as they are written.
    assert none.host_memory == some.host_memory == every.host_memory + 2 * array
    link = [
        sum(stage.seconds_by_kind["link"] for stage in one.stages if stage.name in ("initial", "rebuild", "propagate"))
        for one in (none, some, every)
    ]
    assert link[2] == 0
    assert link[1] == pytest.approx(2 / 3 * link[0])


@pytest.mark.parametrize("name", ["num_experts_per_tok", "moe_topk", "moe_k"])
def test_experts_a_token_by_whatever_name(name: str) -> None:
    assert experts_per_token(LlamaConfig(**{name: 4})) == 4
    assert experts_per_token(LlamaConfig(moe_topk=[2, 6])) == 6
    assert experts_per_token(LlamaConfig()) == 1


def test_this_machine_is_measured(llama: Path) -> None:
    found = plan(PlanConfig(model=str(llama), samples=4, seqlen=32))
    assert found.measured
    assert found.dtype in ("float32", "bfloat16")
    assert set(found.rates) == set(KINDS)
    assert all(rate > 0 for rate in found.rates.values())
    assert found.runs[0].device_memory is None
    assert found.runs[0].host_memory > 2**26


def test_within_a_memory_activations_go_to_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))

    def planned(**settings: Any) -> Any:
        found = plan(PlanConfig(model=str(tmp_path), flops=400e12, preset="mask", device_memory="8GiB", **settings))
        return found.runs[0]

    free, bound, plenty = planned(), planned(memory="8GiB"), planned(memory="1TiB")
    assert free.in_files == plenty.in_files == 0
    assert free.host_memory == plenty.host_memory > 10 * 2**30
    assert bound.host_memory <= 8 * 2**30
    assert bound.host_memory + bound.in_files == pytest.approx(free.host_memory, rel=0.2)
    read = [sum(stage.bytes_read for stage in one.stages) for one in (free, bound)]
    assert read[1] > read[0] + 32 * bound.in_files  # once a layer at least
    assert bound.seconds > free.seconds


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"model": "/nothing/here"}, ModelError, "no such model: /nothing/here"),
        ({"processes": "0"}, SettingsError, "at least 1 process"),
        ({"processes": "two"}, SettingsError, "is not numbers with commas"),
        ({"processes": "8", "samples": 4}, SettingsError, "8 processes cannot share 4 windows"),
        ({"flops": -1}, SettingsError, "flops"),
        ({"memory_bandwidth": 1e12}, SettingsError, "give flops, too"),
        ({"link": 5e9}, SettingsError, "between processes it is network"),
        ({"network": float("inf")}, SettingsError, "network"),
        ({"memory": "1GiB", "flops": 1e12}, SettingsError, "not enough, with all calibration activations in files"),
        ({"pattern": "3:16", "sparsity": 0.5}, SettingsError, "exclude each other"),
        ({"pattern": "2:5", "flops": 1e12}, BarberError, "does not divide"),
        ({"seqlen": 10**6, "flops": 1e12}, BarberError, "beyond the model's 131072 positions"),
    ],
)
def test_what_is_refused(tmp_path: Path, settings: dict[str, Any], error: type[BarberError], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    with pytest.raises(error, match=message) as caught:
        plan(PlanConfig(**{"model": str(tmp_path), **settings}))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ('{"model_type": "nothing"}', "cannot be used"),
        ('{"model_type": "bert"}', "bert is an encoder"),
        ('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}', "is quantised"),
        ('{"model_type": "llama", "hidden_size": 0}', "says hidden_size: 0"),
        ('{"model_type": "llama", "vocab_size": 0}', "says vocab_size: 0"),
    ],
)
def test_configurations_that_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ModelError, match=message):
        plan(PlanConfig(model=str(path)))
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="neither a config.json nor a GGUF file"):
        plan(PlanConfig(model=str(tmp_path / "weights.bin")))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    before = sorted(tmp_path.rglob("*"))
    assert _main(["plan", str(tmp_path), "--flops", "400e12", "--processes", "1,8", "--quiet"]) == 0
    output = capsys.readouterr().out
    assert "8,030,261,248 parameters" in output
    assert "bottleneck" in output
    assert _main(["plan", str(tmp_path), "--flops", "400e12", "--json", "--quiet", "--preset", "best"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["parameters"] == 8_030_261_248
    assert record["runs"][0]["bottleneck"] in set(KINDS.values())
    assert {stage["name"] for stage in record["runs"][0]["stages"]} >= {"embed", "allocate", "tune", "read", "write"}
    assert sorted(tmp_path.rglob("*")) == before


def test_rates_and_words() -> None:
    assert (RATES.exact, RATES.grams) == (5e13, 2e14)
    assert named_rates(4e14, None, 2e12, 1e10, 5e9, 2e9, torch.float32).grams == 5e13
    assert RATES.seconds(Work(products=4e14, read=4e9, copied=1e10, reduced=1.5e10)) == {
        "compute": 1, "memory": 0, "link": 1, "network": 3, "disk": 2,
    }  # fmt: skip
    assert (amount(16.1e9), amount(12)) == ("16.1 G", "12 ")
    assert (duration(8.31), duration(720), duration(12240)) == ("8.3 s", "12 min", "3.4 h")


@pytest.mark.parametrize("initial", list(Initial))
def test_every_method_is_counted(initial: Initial) -> None:
    recipe = Recipe.of(
        PruneConfig(model="m", output=Path("o"), initial=initial), 1, torch.float32, torch.float32, torch.device("cpu")
    )
    assert run_costs(MODEL, recipe).initial.moved > 0
