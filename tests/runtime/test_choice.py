"""Which linears stay packed: decisions by given times, choices that are repeated, refused choices. Nothing is timed."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from llm_barber import PruneConfig, load, prune
from llm_barber.checkpoint.encoding import Packed, pack
from llm_barber.errors import SettingsError
from llm_barber.native import Instructions
from llm_barber.runtime import choice as module
from llm_barber.runtime.choice import NEW, Choice, Times, is_faster
from llm_barber.runtime.packed_linear import PackedLinear
from tests.conftest import make_model, save_tokens

DENSE = Times(decode=2e-3, prefill=0.1)


@pytest.mark.parametrize(
    ("decode", "prefill", "weighted", "strict"),
    [
        (1e-3, 0.1, True, True),
        (1e-3, 0.2, True, False),  # 0.456 s against 0.612 s, but the prompt is slower
        (2.1e-3, 0.01, True, False),  # 0.548 s: the prompt is much faster, but decoding is slower
        (1e-3, 0.1 + NEW * 1e-3, False, False),  # as long
        (1.95e-3, 0.1, False, False),  # 2 % faster: noise
        (1.9e-3, 0.1, True, True),  # 4 % faster
        (2e-3, 0.1, False, False),
    ],
)
def test_decisions(decode: float, prefill: float, weighted: bool, strict: bool) -> None:
    packed = Times(decode, prefill)
    assert is_faster(packed, DENSE, weighted=True) == weighted
    assert is_faster(packed, DENSE, weighted=False) == strict


def make_packed(rows: int, columns: int, share: float, dtype: torch.dtype = torch.bfloat16) -> Packed:
    weight = torch.ones(rows, columns, dtype=dtype).flatten()
    weight[int(share * len(weight)) :] = 0
    packed = pack(weight.view(rows, columns))
    assert packed is not None
    return packed


def faster(_: Packed) -> tuple[Times, Times]:
    return Times(1e-3, 0.1), DENSE


def slower(_: Packed) -> tuple[Times, Times]:
    return Times(3e-3, 0.1), DENSE


class Recorded:
    """Weights with more columns than rows are faster packed; it keeps what it was asked."""

    def __init__(self) -> None:
        self.weights: list[tuple[int, int]] = []

    def __call__(self, weight: Packed) -> tuple[Times, Times]:
        self.weights.append(weight.shape)
        return (faster if weight.shape[1] > weight.shape[0] else slower)(weight)


def test_each_shape_is_timed_once() -> None:
    recorded = Recorded()
    choice = Choice("auto", ["a", "b", "c", "d"], measure=recorded)
    weights = {
        "a": make_packed(16, 32, 0.5), "b": make_packed(16, 32, 0.2), "c": make_packed(32, 16, 0.5),
        "d": make_packed(16, 32, 0.5, torch.float32),
    }  # fmt: skip
    results = {name: choice.decide(name, weight) for name, weight in weights.items()}
    assert recorded.weights == [(16, 32), (32, 16), (16, 32)]
    assert choice.decisions == {"a": True, "b": True, "c": False, "d": True}
    assert results["a"] is weights["a"]
    assert isinstance(results["c"], torch.Tensor)
    assert results["c"].sum() == 16 * 32 / 2


@pytest.mark.parametrize(("level", "expected"), [(Instructions.AVX2, False), (Instructions.AVX512, True)])
def test_without_avx512_neither_use_may_be_slower(
    level: Instructions, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.native, "instructions", lambda: level)
    choice = Choice("auto", ["a"], measure=lambda weight: (Times(1e-3, 0.2), DENSE))
    choice.decide("a", make_packed(8, 64, 0.5))
    assert choice.decisions == {"a": expected}


def test_times_are_positive(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measurement runs, also where only rows that are not timed have zeros."""
    packed, dense = module.measure_times(make_packed(16, 32, 0.5))
    assert min(packed.decode, packed.prefill, dense.decode, dense.prefill) > 0
    monkeypatch.setattr(module, "TIMED_WEIGHTS", 16 * 32)
    weight = torch.ones(32, 32, dtype=torch.bfloat16)
    weight[16:] = 0
    packed_weight = pack(weight)
    assert packed_weight is not None
    packed, dense = module.measure_times(packed_weight)
    assert not is_faster(packed, dense, weighted=True)


def test_a_prompt_is_timed_by_some_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row takes 1 ms dense, and unpacking takes 10 ms: the whole prompt 256 ms and 266 ms."""
    now, linear = 0.0, torch.nn.functional.linear

    def slow(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        nonlocal now
        now += 1e-3 * len(inputs)
        return linear(inputs, weight)

    def slow_packed(packed: PackedLinear, inputs: torch.Tensor) -> torch.Tensor:
        nonlocal now
        now += 1e-3 * len(inputs) + 0.01
        return linear(inputs, packed.weight)

    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(torch.nn.functional, "linear", slow)
    monkeypatch.setattr(PackedLinear, "forward", slow_packed)
    packed, dense = module.measure_times(make_packed(16, 32, 0.5))
    assert now < 0.5
    assert [packed.decode, packed.prefill, dense.decode, dense.prefill] == pytest.approx([0.011, 0.266, 0.001, 0.256])


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    model = make_model(tmp_path / "dense", "llama", dtype=torch.bfloat16)
    tokens = save_tokens(tmp_path / "tokens.safetensors")
    prune(PruneConfig(model=model, output=tmp_path / "pruned", calibration=tokens, sparsity=0.6, report=False))
    return tmp_path / "pruned"


def packed_names(model: torch.nn.Module) -> set[str]:
    return {name for name, linear in model.named_modules() if isinstance(linear, PackedLinear)}


def test_a_choice_is_honoured_and_repeated(
    pruned: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorded = Recorded()
    monkeypatch.setattr(module, "measure_times", recorded)
    with caplog.at_level(logging.INFO, logger="llm_barber"):
        chosen = load(pruned, keep_packed="auto")
    names = {name for name, packed in chosen.keep_packed.items() if packed}
    wide = ("down_proj", "k_proj", "v_proj")
    assert packed_names(chosen) == names == {name for name in chosen.keep_packed if name.endswith(wide)}
    assert len(chosen.keep_packed) == 14
    assert "keep_packed: 6 linears packed, 8 dense" in caplog.text
    assert ": packed takes 0.50 of the dense time in decoding, 1.00 in reading a prompt: packed" in caplog.text
    timed = len(recorded.weights)
    repeated = load(pruned, keep_packed=json.loads(json.dumps(chosen.keep_packed)))
    assert len(recorded.weights) == timed
    assert repeated.keep_packed == chosen.keep_packed
    assert packed_names(repeated) == names
    ids = load_file(pruned.parent / "tokens.safetensors")["input_ids"]
    with torch.no_grad():
        assert torch.equal(repeated(ids).logits, chosen(ids).logits)


@pytest.mark.parametrize(("measure", "packed"), [(faster, 14), (slower, 0)])
def test_auto_is_all_or_nothing_where_one_is_always_faster(
    pruned: Path, measure: Callable[[Packed], tuple[Times, Times]], packed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "measure_times", measure)
    assert len(packed_names(load(pruned, keep_packed="auto"))) == packed


def test_true_and_false_are_choices_too(pruned: Path) -> None:
    for keep_packed in (True, False):
        model = load(pruned, keep_packed=keep_packed)
        assert set(model.keep_packed.values()) == {keep_packed}
        assert packed_names(load(pruned, keep_packed=model.keep_packed)) == packed_names(model)
    name = next(iter(model.keep_packed))
    assert packed_names(load(pruned, keep_packed={name: True})) == {name}
    assert packed_names(load(pruned, keep_packed={})) == set()


def test_a_dense_checkpoint_has_nothing_to_pack(pruned: Path) -> None:
    dense = pruned.parent / "dense"
    for keep_packed in (True, "auto"):
        model = load(dense, keep_packed=keep_packed)
        assert set(model.keep_packed.values()) == {False}
    with pytest.raises(SettingsError, match="q_proj saves nothing") as caught:
        load(dense, keep_packed={"model.layers.0.self_attn.q_proj": True})
    assert "False" in caught.value.hint


@pytest.mark.parametrize(
    ("keep_packed", "problem", "hint"),
    [
        ("yes", "keep_packed cannot be 'yes'", "give True, False, 'auto'"),
        (1, "keep_packed cannot be 1", "give True, False, 'auto'"),
        (None, "keep_packed cannot be None", "give True, False, 'auto'"),
        (
            {"model.layers.0.mlp.up_proj": 1},
            "'model.layers.0.mlp.up_proj' is 1, not True or False",
            "model.keep_packed",
        ),
        ({"model.layers.9.mlp.up_proj": True}, "is called model.layers.9.mlp.up_proj", "such as model.layers.0."),
        ({"lm_head": False}, "is called lm_head", "such as model.layers.0."),
        ({3: True}, "is called 3", "such as model.layers.0."),
    ],
)
def test_wrong_choices_are_refused(tmp_path: Path, keep_packed: object, problem: str, hint: str) -> None:
    model = make_model(tmp_path / "dense", "llama", tie_word_embeddings=True)
    with pytest.raises(SettingsError, match=problem) as caught:
        load(model, keep_packed=keep_packed)
    assert hint in caught.value.hint


def test_auto_is_for_the_cpu() -> None:
    with pytest.raises(SettingsError, match="on the CPU, not on cuda") as caught:
        Choice("auto", [], torch.device("cuda"))
    assert "keep_packed=True or False" in caught.value.hint
