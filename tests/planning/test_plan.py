"""`llm-barber plan`: the forecast of a run, and the settings that it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from llm_barber import PlanConfig, PruneConfig, plan, prune
from llm_barber.cli import _main
from llm_barber.errors import BarberError, ModelError, SettingsError
from llm_barber.text.calibration import token_shape
from tests.conftest import Listener, make_model, save_tokens

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
    "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip


class FlopCounter(TorchDispatchMode):
    """Counts the FLOPs of products; torch's own `FlopCounterMode` does not take `torch.autograd.grad`."""

    flops = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if count := flop_registry.get(function._overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        return result


@pytest.fixture
def llama_8b(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    return tmp_path


def test_a_rehearsal_forecasts_a_run(tmp_path: Path, tokens: Path) -> None:
    """The stages are the run's, whatever it has; the peak memory is near the run's, in a process of its own."""
    model = make_model(tmp_path / "model", "llama", num_hidden_layers=4)
    before = sorted(tmp_path.rglob("*"))
    forecast = plan(PlanConfig(model=str(model), calibration=tokens, tune_passes=1, memory="64GiB"))
    assert (forecast.sequences, forecast.tokens) == token_shape(str(tokens))
    assert sorted(tmp_path.rglob("*")) == before
    expected = forecast.expected
    assert expected is not None
    assert expected.layers == 2
    assert set(expected.stages) > {"pruning", "looking for what pruning costs"}
    assert all(seconds > 0 for seconds in expected.stages.values())
    assert expected.seconds == sum(expected.stages.values())
    assert 2**27 < expected.host_memory < 2**32
    assert expected.device_memory is None


def test_a_named_machine_needs_no_rehearsal(llama_8b: Path) -> None:
    forecasts = [
        plan(PlanConfig(model=str(place), tflops=400, gbps=2, preset="paper"))
        for place in (llama_8b, llama_8b / "config.json")
    ]
    assert forecasts[0].flops == forecasts[1].flops
    forecast = forecasts[0]
    assert forecast.expected is None
    assert forecast.parameters == 8_030_261_248
    assert forecast.bytes_read == forecast.bytes_written == 2 * forecast.parameters
    # Most of a pass for the masks; the sparse and the dense block, back to the weights, and the next layer's input.
    assert forecast.flops == pytest.approx(4.6 * 2 * forecast.weights * 128 * 2048)
    assert forecast.least_seconds == forecast.flops / 400e12 > 4 * forecast.parameters / 2e9
    slow = plan(PlanConfig(model=str(llama_8b), gbps=0.1, preset="paper"))
    assert slow.least_seconds == 4 * forecast.parameters / 1e8


@pytest.mark.parametrize("settings", [{"preset": "paper"}, {"preset": "mask"}, {"preset": "best"}], ids=str)
def test_no_run_does_with_less_work(tmp_path: Path, settings: dict[str, Any]) -> None:
    """PyTorch counts the products of a whole run, attention and the loss included."""
    model = make_model(tmp_path / "model", "llama", hidden_size=64, intermediate_size=256, vocab_size=128)
    tokens = save_tokens(tmp_path / "tokens.safetensors", sequences=8, tokens=16)
    common: dict[str, Any] = {"model": str(model), "calibration": tokens, "dtype": "float32", **settings}
    least = plan(PlanConfig(**common, tflops=1)).flops
    with FlopCounter() as counter:
        prune(PruneConfig(**common, output=tmp_path / "out", report=False))
    assert 0.5 * counter.flops < least <= counter.flops


def test_linears_that_are_left_out_are_counted_with_a_warning(llama_8b: Path) -> None:
    listener, silent = Listener(), Listener()
    complete = plan(PlanConfig(model=str(llama_8b), tflops=400), silent)
    without = plan(PlanConfig(model=str(llama_8b), tflops=400, exclude=("down_proj",)), listener)
    assert without.flops == complete.flops
    assert [line for line in listener.warnings if "counts every linear as pruned" in line]
    assert not silent.warnings


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"model": "/nothing/here"}, ModelError, "no such model: /nothing/here"),
        ({"tflops": -1}, SettingsError, "tflops"),
        ({"gbps": float("inf")}, SettingsError, "gbps"),
        ({"pattern": "3:16", "sparsity": 0.5}, SettingsError, "exclude each other"),
        ({"seqlen": 10**6}, BarberError, "beyond the model's 131072 positions"),
    ],
)
def test_refused_settings(llama_8b: Path, settings: dict[str, Any], error: type[BarberError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        plan(PlanConfig(**{"model": str(llama_8b), **settings}))
    assert caught.value.hint


def test_too_little_memory_is_refused(llama: Path, tokens: Path) -> None:
    with pytest.raises(SettingsError, match="too little, even with all calibration activations in files") as caught:
        plan(PlanConfig(model=str(llama), calibration=tokens, memory="1MiB"))
    assert "give at least" in caught.value.hint


def test_the_command(llama_8b: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert _main(["plan", str(llama_8b), "--tflops", "400", "--quiet"]) == 0
    output = capsys.readouterr().out
    assert "8,030,261,248 parameters" in output
    assert "time: at least" in output
    assert _main(["plan", str(llama_8b), "--gbps", "2", "--json", "--quiet", "--preset", "best"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["parameters"] == 8_030_261_248
    assert record["expected"] is None
