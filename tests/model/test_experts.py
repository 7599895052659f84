"""Split experts compute what transformers' fused experts do, and are pruned from their tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from llm_barber import InspectConfig, PackConfig, PruneConfig, RebuildConfig, inspect, pack, prune, rebuild
from llm_barber.masking.granularity import Granularity
from llm_barber.masking.initial import initial_mask
from llm_barber.masking.pattern import Unstructured
from llm_barber.method.few_tokens import linears_with_few_tokens, total_token_counts
from llm_barber.model.block import DecoderLayer
from llm_barber.model.experts import Experts, is_fused, split_experts
from llm_barber.model.skeleton import Skeleton
from llm_barber.model.structure import find_architecture
from llm_barber.parallel.ranks import Ranks
from llm_barber.record.report import RunReport
from llm_barber.runtime.load import load
from tests.conftest import FAMILIES, make_config, make_model, read_folder, save_tokens


def fused_experts() -> torch.nn.Module:
    """Six experts of a tiny model."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_moe", **{**FAMILIES["qwen3_moe"], "num_experts": 6, "mlp_only_layers": []})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager")
    experts = next(module for module in model.modules() if is_fused(module))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    return experts.requires_grad_(False)


def separate(fused: torch.nn.Module, sequences: int) -> Experts:
    """Split experts with the weights of a fused module."""
    parent = torch.nn.Module()
    parent.experts = fused
    split_experts(parent)
    experts: Any = parent.experts
    for number, expert in enumerate(experts):
        gate, up = fused.gate_up_proj[number].chunk(2)
        expert.gate_proj.weight.data, expert.up_proj.weight.data = gate, up
        expert.down_proj.weight.data = fused.down_proj[number]
    experts.sequences = sequences
    return experts


@pytest.mark.parametrize("sequences", [1, 3])
def test_one_by_one_equals_fused_and_every_expert_is_called(sequences: int) -> None:
    fused = fused_experts().double()  # so that no rounding is taken for a difference
    experts = separate(fused, sequences)
    hidden = torch.randn(3 * 10, 32, dtype=torch.float64)
    index = torch.stack([torch.arange(30) % 4, torch.full((30,), 4)], 1)  # no token goes to the last one
    weights = torch.rand(30, 2, dtype=torch.float64)
    rows: list[int] = []
    for expert in experts:
        expert.down_proj.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    outputs = experts(hidden, index, weights)
    assert torch.allclose(outputs, fused(hidden, index, weights), atol=1e-10)
    assert experts.tokens.tolist() == [8, 8, 7, 7, 30, 0]
    assert len(rows) == 6
    assert all(count % sequences == 0 for count in rows)
    with experts.same_routes():
        assert torch.equal(experts(hidden, 5 - index, weights), outputs)
    assert not torch.equal(experts(hidden, 5 - index, weights), outputs)


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """Mixture of so many experts that some are given few tokens, and some none."""
    return make_model(tmp_path / "dense", "mixtral", num_local_experts=32)


@pytest.mark.parametrize(
    "settings",
    [
        {"preset": "mask"},
        {"preset": "best", "sparsity": 0.6, "tune_passes": 1},
        {"initial": "sparsegpt", "pattern": "2:4"},
        {"initial": "alps", "rebuild": False, "keep_updates": True},
        {"initial": "dsnot", "granularity": "block", "rebuild_ratio": 0.1},
    ],
    ids=["mask", "best", "sparsegpt", "alps", "dsnot"],
)
def test_experts_with_few_tokens_are_pruned_by_magnitude(
    tmp_path: Path, mixture: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_barber.method.few_tokens.FEW_TOKENS", 6)
    tokens = save_tokens(tmp_path / "tokens.safetensors")
    common: dict[str, Any] = {"dtype": "float32", "report": False}
    report = prune(PruneConfig(model=mixture, output=tmp_path / "out", calibration=tokens, **common, **settings))
    few = [(layer.index, linear) for layer in report.layers for linear in layer.linears if linear.few_tokens]
    assert 0 < len(few) < 0.7 * len(list(report.linears))
    written, dense = read_folder(tmp_path / "out"), read_folder(mixture)
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    for index, linear in few if "pattern" not in settings else []:
        _, _, number, last = linear.name.split(".")
        name = f"model.layers.{index}.block_sparse_moe.experts.{number}.{names[last]}.weight"
        granularity = Granularity.LINEAR if settings.get("initial") == "alps" else Granularity.OUTPUT
        target = Unstructured(linear.sparsity, over_linear="preset" in settings)
        assert torch.equal(written[name], dense[name] * initial_mask(dense[name].abs(), target, granularity))
        assert int((written[name] == 0).sum()) == linear.pruned
    assert not [name for name in dense if "gate.weight" in name and not torch.equal(dense[name], written[name])]
    assert report.sparsity == pytest.approx(settings.get("sparsity", 0.5), abs=0.02)
    assert all(tensor.isfinite().all() for tensor in written.values())
    assert inspect(InspectConfig(model=str(tmp_path / "out"), dense=str(mixture))).problems == ()


class TwoAlike(Ranks):
    """Stand-in for two processes that count the same."""

    def add_tensor(self, tensor: torch.Tensor) -> None:
        tensor *= 2


def test_counting_tokens_of_all_processes_twice_counts_them_once() -> None:
    config = make_config("mixtral")
    skeleton = Skeleton(config, find_architecture(config), torch.device("cpu"), torch.float32)
    layer = DecoderLayer(skeleton.layers[0], skeleton.linears(0), lambda *_: {})
    (experts,) = layer.experts.values()
    experts.tokens += torch.tensor([5, 40, 31, 32])
    for _ in range(2):
        (totals,) = total_token_counts(layer, TwoAlike()).values()
        assert totals.tolist() == [10, 80, 62, 64]
        few = linears_with_few_tokens(layer, dict.fromkeys(layer.experts, totals))
        assert {name.split(".")[2] for name in few} == {"0", "2"}
        assert len(few) == 6
    assert experts.tokens.tolist() == [5, 40, 31, 32]


def test_counts_of_a_process_without_tokens_are_on_the_device() -> None:
    """Processes add them up: a count on the CPU would wait for counts on the GPU."""
    config = make_config("mixtral")
    skeleton = Skeleton(config, find_architecture(config), torch.device("cpu"), torch.float32)
    layer = DecoderLayer(skeleton.layers[0], skeleton.linears(0), lambda *_: {})
    for device in ("cpu", "meta"):
        layer.module.to_empty(device=device)
        layer.forget_tokens()
        (totals,) = total_token_counts(layer, Ranks()).values()
        assert totals.device.type == device


def test_records_pages_and_packing_take_experts_together(tmp_path: Path, mixture: Path) -> None:
    tokens = save_tokens(tmp_path / "tokens.safetensors")
    config = PruneConfig(model=mixture, output=tmp_path / "out", calibration=tokens, sparsity=0.7, dtype="float32")
    report = prune(config)
    assert [total.name for total in report.by_linear()][4:] == [
        f"mlp.experts.*.{name}_proj" for name in ("gate", "up", "down")
    ]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "mlp.experts.*.gate_proj" in page
    assert "mlp.experts.7" not in page
    pack(PackConfig(model=str(tmp_path / "out"), output=tmp_path / "packed"))
    ids = load_file(tokens)["input_ids"]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
        assert torch.equal(load(tmp_path / "packed")(ids).logits, expected)


@pytest.mark.parametrize(
    "how",
    [{"granularity": "block", "rebuild_ratio": 0.1}, {"rebuild": False, "refine": "swaps", "guard": 0.25}],
    ids=["rebuild", "swaps"],
)
def test_a_pruned_mixture_can_be_rebuilt(
    tmp_path: Path, mixture: Path, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rebuild by `rebuild`, and at once: experts with few tokens keep the masks that they have."""
    monkeypatch.setattr("llm_barber.method.few_tokens.FEW_TOKENS", 6)
    tokens = save_tokens(tmp_path / "tokens.safetensors")
    settings = {"calibration": tokens, "dtype": "float32", "report": False}
    prune(PruneConfig(model=mixture, output=tmp_path / "pruned", initial="magnitude", rebuild=False, **settings))
    reports: list[RunReport] = [
        rebuild(
            RebuildConfig(dense=str(mixture), pruned=str(tmp_path / "pruned"), output=tmp_path / "0", **settings, **how)
        ),
        prune(PruneConfig(model=mixture, output=tmp_path / "1", initial="magnitude", **settings, **how)),
    ]
    for number, report in enumerate(reports):
        assert report.swapped > 0
        assert inspect(InspectConfig(model=str(tmp_path / str(number)), dense=str(mixture))).problems == ()
        few = [linear for linear in report.linears if linear.few_tokens]
        assert 0 < len(few) < 0.7 * len(list(report.linears))
        assert all(linear.grown == linear.dropped == 0 for linear in few)
        assert any(linear.grown for linear in report.linears if ".experts." in linear.name and not linear.few_tokens)


@pytest.mark.parametrize(("rebuild", "passes"), [(False, 2), (True, 3)])
def test_tokens_are_counted_once_and_where_experts_are(
    tmp_path: Path, mixture: Path, rebuild: bool, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts before the mask, though magnitude needs none; in each block's rebuild, or in the MLP's swaps."""
    counts = []
    forget = DecoderLayer.forget_tokens
    monkeypatch.setattr(DecoderLayer, "forget_tokens", lambda layer: counts.append(forget(layer)))
    how = {"initial": "magnitude", "rebuild": rebuild, "refine": "swaps", "report": False, "dtype": "float32"}
    tokens = save_tokens(tmp_path / "tokens.safetensors")
    report = prune(PruneConfig(model=mixture, output=tmp_path / "out", calibration=tokens, **how))
    assert len(counts) == passes * len(report.layers)


def test_padding_does_not_show_in_means_and_variances(tmp_path: Path, mixture: Path) -> None:
    tokens = save_tokens(tmp_path / "tokens.safetensors", sequences=6)
    for size in (1, 3):
        prune(
            PruneConfig(
                model=mixture, output=tmp_path / f"by{size}", calibration=tokens, dtype="float32", initial="dsnot",
                rebuild=False, batch_size=size, report=False,
            )
        )  # fmt: skip
    single, three = read_folder(tmp_path / "by1"), read_folder(tmp_path / "by3")
    assert all(torch.equal(single[name], three[name]) for name in single)
