"""A bench for the checks of `selftest`: a device, a folder, small random models, and runs on them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from llm_barber.progress import Silent
from llm_barber.record.report import RunReport
from llm_barber.run.commands import prune
from llm_barber.settings.prune import PruneConfig

CPU = torch.device("cpu")
NORM_SPREAD = 1.0  # standard deviation of the logarithm of norms' weights: channels differ, as in trained models
EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}
# Windows for experts are many and short, so that some experts with enough tokens to be tuned have windows without one.
WINDOWS_FOR_EXPERTS, TOKENS_FOR_EXPERTS = 4, 16  # for each window of the size; of a window


@dataclass(frozen=True)
class Size:
    """Shape of a random LLaMA, and of the calibration windows for it."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int
    windows: int
    tokens: int


SMALL = Size(256, 704, 2, 8, 4, 512, windows=8, tokens=128)  # enough mask bits to see one in a million
TINY = Size(64, 96, 2, 4, 2, 128, windows=4, tokens=32)  # where the device is a CPU, whose checks need no size
TIMED = Size(576, 1536, 30, 9, 3, 49152, windows=32, tokens=1024)  # as SmolLM2-135M


class Listener(Silent):
    """Keeps what a run warns of."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        """Keep the message."""
        self.warnings.append(str(message))


@dataclass
class Bench:
    """The device that is checked, and a folder for models.

    `dtype`: in which runs on the device compute by default. `size`: of random models. Models and calibration windows
    are made when they are first asked for.
    """

    device: torch.device
    dtype: torch.dtype
    folder: Path
    size: Size
    _runs: int = field(default=0, init=False)

    @property
    def on_gpu(self) -> bool:
        """True if the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def dtypes(self) -> list[torch.dtype]:
        """Compute dtypes that are checked: float32, and the device's own if it is another."""
        return list(dict.fromkeys((torch.float32, self.dtype)))

    @property
    def dtype_name(self) -> str:
        """Name of the compute dtype, as settings have it."""
        return str(self.dtype).removeprefix("torch.")

    def model(self, family: str = "llama", size: Size | None = None) -> Path:
        """Folder of a random model of a family: llama or mixtral."""
        size = size or self.size
        folder = self.folder / f"{family}-{size.hidden}-{size.layers}"
        if not folder.exists():
            save_random_model(folder, family, size)
        return folder

    def windows(self, family: str = "llama", size: Size | None = None) -> Path:
        """File of random calibration windows for a model of a family."""
        size = size or self.size
        count, tokens = size.windows, size.tokens
        if family == "mixtral":
            count, tokens = count * WINDOWS_FOR_EXPERTS, TOKENS_FOR_EXPERTS
        path = self.folder / f"windows-{count}-{tokens}-{size.vocabulary}.safetensors"
        if not path.exists():
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(0, size.vocabulary, (count, tokens), generator=generator)
            save_file({"input_ids": ids}, path)
        return path

    def prune(self, device: torch.device, family: str = "llama", **settings: Any) -> tuple[Path, RunReport, list[str]]:
        """Prune the random model of a family, or the model that `settings` name.

        Returns the output, its record, and warnings.
        """
        self._runs += 1
        output = self.folder / f"run-{self._runs}"
        listener = Listener()
        common = {"model": self.model(family), "calibration": self.windows(family), "report": False}
        config = PruneConfig(output=output, device=str(device), **{**common, **settings})
        return output, prune(config, listener), listener.warnings


def save_random_model(folder: Path, family: str, size: Size) -> None:
    """Save a random model with weights in bfloat16 whose channels differ in size, as those of trained models do."""
    config = AutoConfig.for_model(
        family,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_heads,
        vocab_size=size.vocabulary,
        max_position_embeddings=max(size.tokens, 256),
        initializer_range=size.hidden**-0.5,
        **(EXPERTS if family == "mixtral" else {}),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("norm.weight"):
                    parameter.copy_(torch.exp(NORM_SPREAD * torch.randn_like(parameter)))
    model.to(torch.bfloat16).save_pretrained(folder)


def layer_weights(folder: Path) -> Mapping[str, Tensor]:
    """Weights of a checkpoint's decoder layers with two or more dimensions, by name."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return {name: tensor for name, tensor in tensors.items() if ".layers." in name and tensor.dim() >= 2}


def compare_masks(first: Path, second: Path) -> tuple[int, int]:
    """Number of mask bits that differ between two pruned checkpoints of a model, and of all bits.

    Raises:
        ValueError: the checkpoints are not of one model.
    """
    first_weights, second_weights = layer_weights(first), layer_weights(second)
    if first_weights.keys() != second_weights.keys():
        raise ValueError("the two checkpoints have other weights")
    different = sum(int(((tensor != 0) != (second_weights[name] != 0)).sum()) for name, tensor in first_weights.items())
    return different, sum(tensor.numel() for tensor in first_weights.values())


def half_pruned(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A random weight, (out, in), of which half is zero."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    return weight.masked_fill(torch.rand(shape, generator=generator) < 0.5, 0.0).to(device, dtype)
