"""A GPU gives the CPU's masks, keeps within its memory, and prunes at the speed that it has: `pytest -m gpu`.

The two devices add up products in another order, so that scores differ by rounding, and two weights with nearly equal
scores may change places in the ranking. A bound of the share of mask bits that differ separates rounding from faults.
"""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llm_barber import PackConfig, PruneConfig, load, pack, prune
from tests.conftest import make_model, read_folder, save_tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU"),
]

# Few steps, since Adam multiplies rounding in each. Without a guard: held-out windows would decide for or against a
# whole block by a hair's breadth.
TUNED: dict[str, Any] = {"tune_passes": 2, "guard": 0}
METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "magnitude": ({"initial": "magnitude", "rebuild": False}, 0.0),
    "wanda": ({"initial": "wanda", "rebuild": False}, 5e-4),
    "ria": ({"initial": "ria", "rebuild": False}, 5e-4),
    "dsnot": ({"initial": "dsnot", "rebuild": False}, 5e-4),
    "sparsegpt": ({"initial": "sparsegpt", "rebuild": False}, 5e-4),
    "alps": ({"initial": "alps", "rebuild": False}, 3e-2),
    "paper": ({"preset": "paper", "rebuild_ratio": 0.5}, 1e-3),
    "mask": ({"preset": "mask", **TUNED}, 5e-3),
    "best": ({"preset": "best", **TUNED}, 5e-3),
}
SHAPE = {"hidden_size": 256, "intermediate_size": 704, "vocab_size": 128}
# A decoder layer of LLaMA-2-7B, twice.
LAYERS_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 2, "num_attention_heads": 32}


def differing_share(first: Path, second: Path) -> float:
    """Share of the mask bits of decoder layers that differ between two pruned checkpoints."""
    ours, theirs = read_folder(first), read_folder(second)
    names = [name for name, tensor in ours.items() if ".layers." in name and tensor.dim() >= 2]
    different = sum(int(((ours[name] != 0) != (theirs[name] != 0)).sum()) for name in names)
    return different / sum(ours[name].numel() for name in names)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_masks_are_the_cpu_s(tmp_path: Path, family: str, method: str) -> None:
    model, (settings, bound) = make_model(tmp_path / "dense", family, **SHAPE), METHODS[method]
    tokens = save_tokens(tmp_path / "tokens.safetensors", sequences=8, tokens=64)
    for device in ("cpu", "cuda"):
        output = tmp_path / device
        common: dict[str, Any] = {"calibration": tokens, "dtype": "float32", "report": False, "device": device}
        prune(PruneConfig(model=model, output=output, **common, **settings))
    assert differing_share(tmp_path / "cpu", tmp_path / "cuda") <= bound


@pytest.mark.parametrize("off_device", [False, True])
def test_a_run_repeats_itself_bit_for_bit(tmp_path: Path, off_device: bool) -> None:
    model, outputs = make_model(tmp_path / "dense", "llama", **SHAPE), []
    tokens = save_tokens(tmp_path / "tokens.safetensors", sequences=8, tokens=64)
    for number in range(2):
        config = PruneConfig(
            model=model, output=tmp_path / str(number), calibration=tokens, preset="mask", device="cuda",
            activations_off_device=off_device and number == 1, report=False,
        )  # fmt: skip
        prune(config)
        outputs.append(read_folder(config.output))
    assert all(torch.equal(tensor, outputs[1][name]) for name, tensor in outputs[0].items())


@pytest.mark.parametrize("values", ["exact", "int8"])
@pytest.mark.parametrize("tokens", [1, 24])
def test_packed_weights_give_the_dense_logits(tmp_path: Path, values: str, tokens: int) -> None:
    model = make_model(tmp_path / "dense", "llama", dtype=torch.bfloat16, **SHAPE)
    text = save_tokens(tmp_path / "tokens.safetensors")
    prune(PruneConfig(model=model, output=tmp_path / "pruned", calibration=text, initial="magnitude", rebuild=False))
    pack(PackConfig(model=str(tmp_path / "pruned"), output=tmp_path / "packed", values=values))
    ids = torch.arange(tokens, device="cuda").unsqueeze(0)
    with torch.no_grad():
        dense = load(tmp_path / "packed", device="cuda")(ids).logits
        packed = load(tmp_path / "packed", device="cuda", keep_packed=True)(ids).logits
    torch.testing.assert_close(packed, dense, rtol=0.05, atol=0.05 * float(dense.abs().max()))


def test_layers_of_7b_fit_and_take_their_time(tmp_path: Path, record_property: Any) -> None:
    """A layer holds its weights, their float32 scores and a batch; the time is in the report of pytest."""
    config = AutoConfig.for_model("llama", **LAYERS_7B, vocab_size=128, max_position_embeddings=2048)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    tokens = save_tokens(tmp_path / "tokens.safetensors", sequences=32, tokens=2048)
    torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    settings: dict[str, Any] = {"preset": "paper", "device": "cuda", "dtype": "bfloat16", "report": False}
    prune(PruneConfig(model=tmp_path / "dense", output=tmp_path / "pruned", calibration=tokens, **settings))
    record_property("seconds", time.perf_counter() - begun)
    assert torch.cuda.max_memory_allocated() < 20 * 2**30
