"""Zeros hold in models that processes train together: DistributedDataParallel, and FSDP2 on the CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from llm_barber import InspectConfig, hold_zeros, inspect, merge_adapter, save_finetuned
from llm_barber.errors import SettingsError, VerificationError
from tests.helpers.ranks import run_ranks
from tests.helpers.trained import language_loss, make_pruned, used_weights, zeros_of


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pruned(tmp_path_factory.mktemp("held"))


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def train(rank: int, model: nn.Module, plain: nn.Module, zeros: dict[str, Tensor], optimizer: str) -> None:
    """Two steps with accumulated gradients; checks the weights that the pass after each step uses."""
    modules = {name: plain.get_submodule(name.removesuffix(".weight")) for name in zeros}
    stepper = optimizer_of(optimizer, model)
    with used_weights(modules) as used:
        language_loss(model)
        before = dict(used)
        for step in range(2):
            for part in range(2):
                language_loss(model, 4 * step + 2 * part + rank).backward()
            stepper.step()
            stepper.zero_grad()
            language_loss(model)
            for name, weight in used.items():
                assert torch.equal(weight == 0, zeros[name]), name
    assert all(not torch.equal(used[name], before[name]) for name in zeros)
    for weight in used.values():
        others = [torch.empty_like(weight) for _ in range(2)]
        dist.all_gather(others, weight)
        assert torch.equal(others[0], others[1])


def in_two(function: Any) -> None:
    """Call a function with the rank in each of two processes of a gloo group."""

    def call(rank: int) -> None:
        dist.init_process_group("gloo")
        try:
            function(rank)
            dist.barrier()
        finally:
            dist.destroy_process_group()

    assert run_ranks(2, call) == [0, 0]


@pytest.mark.parametrize(("optimizer", "when"), [("sgd", "before"), ("adamw", "after")])
def test_data_parallel(pruned: Path, optimizer: str, when: str) -> None:
    def check(rank: int) -> None:
        plain = AutoModelForCausalLM.from_pretrained(pruned)
        if when == "before":
            held = hold_zeros(plain)
        model = DistributedDataParallel(plain, gradient_as_bucket_view=optimizer == "sgd")
        if when == "after":
            held = hold_zeros(model)
        train(rank, model, plain, zeros_of(plain, held.names), optimizer)

    in_two(check)


@pytest.mark.parametrize(
    ("when", "optimizer", "policy"),
    [
        ("before", "adamw", MixedPrecisionPolicy(param_dtype=torch.bfloat16)),
        ("after", "adamw", MixedPrecisionPolicy()),
    ],
)
def test_fully_sharded(pruned: Path, tmp_path: Path, when: str, optimizer: str, policy: MixedPrecisionPolicy) -> None:
    def check(rank: int) -> None:
        model = AutoModelForCausalLM.from_pretrained(pruned)
        zeros = zeros_of(model, hold_zeros(model).names)
        if when == "after":
            hold_zeros(model).remove()
        for layer in model.model.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        held = hold_zeros(model)
        assert held.zeros == sum(int(mask.sum()) for mask in zeros.values())  # of both processes together
        train(rank, model, model, zeros, optimizer)
        assert all(mask.pruned.numel() * 2 == zeros[name].numel() for name, mask in held._masks.items())
        save_finetuned(model, tmp_path / "out")

    in_two(check)
    result = inspect(InspectConfig(model=str(tmp_path / "out"), dense=str(pruned.parent / "dense")))
    assert result.problems == ()
    assert result.fine_tuned > 14


def test_lora_of_a_sharded_model(pruned: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> nn.Module:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(pruned), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0, 0.2)
        hold_zeros(model)
        return model

    def check(rank: int) -> None:
        whole, model = adapted(), adapted()
        for layer in model.base_model.model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        loss, expected = language_loss(model), language_loss(whole)
        assert torch.allclose(loss, expected, rtol=1e-5)
        loss.backward()
        expected.backward()
        for name, parameter in whole.named_parameters():
            if parameter.requires_grad:
                gradient = model.get_parameter(name).grad
                assert torch.allclose(gradient.full_tensor(), parameter.grad, rtol=1e-3, atol=1e-5), name
        with pytest.raises(SettingsError, match="is sharded, and adapters are merged in one process"):
            merge_adapter(model)

    in_two(check)


def test_errors_reach_all_processes(pruned: Path, tmp_path: Path) -> None:
    def check(rank: int) -> None:
        model = AutoModelForCausalLM.from_pretrained(pruned)
        fully_shard(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        with pytest.raises(VerificationError, match="pruned weights are not zero any more"):
            save_finetuned(model, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    in_two(check)
