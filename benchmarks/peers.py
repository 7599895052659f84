"""Compare Wanda, SparseGPT, RIA, OWL, DSnoT and ALPS with their authors' programs, on equal inputs.

    mkdir CLONES && cd CLONES
    for repository in locuslab/wanda luuyin/OWL zyxxmu/DSnoT mazumder-lab/ALPS; do
        git clone https://github.com/$repository
    done
    git clone https://github.com/biomedical-cybernetics/Relative-importance-and-activation-pruning RIA
    cd .. && python benchmarks/peers.py CLONES

A random LLaMA of three layers with outlier channels, float32, is pruned by both. It prints the mask bits that differ,
and the largest difference of a kept weight as a share of the linear's largest weight. ALPS, whose loop wants a GPU, is
run on single linears; for it, the squared error is compared, ours over theirs. The programs run as they are, but
without CUDA calls and their loaders of calibration text, and with `<` where SparseGPT and RIA prune `<=` a threshold.
Read the programs before you run them. Programs that are missing are left out.
"""

import argparse
import contextlib
import importlib.util
import io
import re
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.utils import logging

from llm_barber import PruneConfig, prune
from llm_barber.masking.admm import admm
from llm_barber.masking.pattern import NofM, Pattern, Unstructured

SEQUENCES, TOKENS, VOCABULARY = 32, 128, 128
NOT_FOR_CPUS = {r"\.cuda\(\)": "", r"torch\.cuda\.(synchronize|empty_cache)\(\)": "None", "cuda:0": "cpu"}
EXACTLY = {"<= *thresh": "< thresh"}
# What the programs' own commands set; only OWL's are not its program's defaults.
DEFAULTS: dict[str, Any] = {
    "model": "llama", "nsamples": SEQUENCES, "seed": 0, "seqlen": TOKENS, "calib_dataset": "c4", "use_variant": False,
    "a": 0.5, "reconstruction": False, "reallocation": False, "lsa": False, "gptq": False, "per_outneuron": False,
    "semi_sparse_acc": False, "importance_score": "sum", "Lamda": 0.08, "Hyper_m": 5, "initial_method": "wanda",
    "skip_layer": "mlp", "skip_sub_layer": "no_skip", "max_cycle_time": 50, "update_threshold": 0.1,
    "pow_of_var_regrowing": 1, "without_same_sign": True, "without_DSnoT": False, "get_time_overhead": False,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One comparison: the clone, its file and function, and what the same is here."""

    clone: str
    file: str
    function: str
    ours: dict[str, Any]
    targets: tuple[str, ...] = ("0.5", "0.7", "2:4", "4:8")
    peer_arguments: dict[str, Any] = field(default_factory=dict)
    exactly: bool = False


ROWS = (
    Row("wanda", "prune", "prune_wanda", {"initial": "wanda"}),
    Row("wanda", "prune", "prune_sparsegpt", {"initial": "sparsegpt", "keep_updates": True}, exactly=True),
    Row("RIA", "prune", "prune_ria", {"initial": "ria"}, peer_arguments={"prune_method": "ria"}, exactly=True),
    Row("OWL", "prune_all", "prune_wanda_outlier", {"initial": "wanda", "allocation": "owl"}, ("0.5", "0.7")),
    Row("DSnoT", "prune", "prune_DSnoT", {"initial": "dsnot"}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clones", type=Path, help="folder with the clones")
    clones = parser.parse_args().clones
    torch.set_num_threads(1)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    table = Table("program", "target", "mask bits that differ", "of", "pruned, theirs − ours", "weights differ by")
    console = Console(width=140)
    with tempfile.TemporaryDirectory() as name, positions():
        folder = Path(name)
        make_model(folder / "dense")
        tokens = torch.randint(VOCABULARY, (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(1))
        save_file({"input_ids": tokens}, folder / "tokens.safetensors")
        for row in ROWS:
            if not (clones / row.clone).is_dir():
                continue
            module = program(clones / row.clone, row.file, row.exactly)
            for target in row.targets:
                theirs = by_authors(module, row, target, folder / "dense", tokens)
                ours = by_us(folder, row, target)
                table.add_row(f"{row.clone} {row.function}", target, *compared(theirs, ours))
    console.print(table)
    if (clones / "ALPS").is_dir():
        console.print(alps(clones))


def make_model(folder: Path) -> None:
    """Heavy-tailed weights, and channels that norms and embeddings make large."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=768, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=TOKENS, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.distributions.StudentT(4.0).sample(parameter.shape) * 0.08)
            elif "norm" in name:
                parameter.copy_(torch.exp(torch.randn(parameter.shape) * 0.7))
        model.model.embed_tokens.weight[:, [3, 50, 111]] *= 25
    model.save_pretrained(folder)


@contextlib.contextmanager
def positions() -> Iterator[None]:
    """Decoder layers make their rotary embeddings: the programs call them as older transformers did."""
    forward = LlamaDecoderLayer.forward

    def with_embeddings(self: LlamaDecoderLayer, hidden: Tensor, **arguments: Any) -> Any:
        if arguments.get("position_embeddings") is None:
            arguments["position_embeddings"] = self.rotary_embedding[0](hidden, arguments["position_ids"])
        return forward(self, hidden, **arguments)

    LlamaDecoderLayer.forward = with_embeddings  # type: ignore[method-assign]
    try:
        yield
    finally:
        LlamaDecoderLayer.forward = forward  # type: ignore[method-assign]


def program(clone: Path, file: str, exactly: bool) -> types.ModuleType:
    """A file of a program's library, as it is but for what CPUs have not; with `exactly`, `<` a threshold."""
    name = f"program_{clone.name.lower()}{'_exactly' if exactly else ''}"
    package = types.ModuleType(name)
    package.__path__ = []
    sys.modules[name] = package
    if "scipy" not in sys.modules and importlib.util.find_spec("scipy") is None:  # RIA's, for channel permutation alone
        optimize = types.ModuleType("scipy.optimize")
        optimize.__dict__["linear_sum_assignment"] = None
        sys.modules.update({"scipy": types.ModuleType("scipy"), "scipy.optimize": optimize})
    data = types.ModuleType(f"{name}.data")
    data.__dict__["get_loaders"] = None
    sys.modules[data.__name__] = data
    for part in ("quant", "sparsegpt", "layerwrapper", "ablate", "save_results", file):
        path = clone / "lib" / f"{part}.py"
        if path.is_file():
            module = types.ModuleType(f"{name}.{part}")
            sys.modules[module.__name__] = module
            execute(path, module.__dict__, exactly)
    return sys.modules[f"{name}.{file}"]


def execute(path: Path, names: dict[str, Any], exactly: bool = False) -> None:
    """Run a source file with what CPUs have not taken out."""
    source = path.read_text()
    for pattern, instead in {**NOT_FOR_CPUS, **(EXACTLY if exactly else {})}.items():
        source = re.sub(pattern, instead, source)
    exec(compile(source, str(path), "exec"), names)


def by_authors(module: types.ModuleType, row: Row, target: str, folder: Path, tokens: Tensor) -> dict[str, Tensor]:
    """The weights of the linears after the authors' program."""
    loaded = [(sequence.unsqueeze(0), None) for sequence in tokens]
    module.__dict__["get_loaders"] = lambda *_, **__: (loaded, None)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.hf_device_map, model.seqlen = {}, TOKENS
    for layer in model.model.layers:
        layer.rotary_embedding = [model.model.rotary_emb]
    kept, _, of = target.partition(":")
    pattern = (int(of) - int(kept), int(of)) if of else (0, 0)
    arguments = {**DEFAULTS, **row.peer_arguments, "sparsity_ratio": 0.5 if of else float(target)}
    function: Callable[..., None] = getattr(module, row.function)
    device = torch.device("cpu")
    with contextlib.redirect_stdout(io.StringIO()):
        function(types.SimpleNamespace(**arguments), model, None, device, prune_n=pattern[0], prune_m=pattern[1])
    return linears(model.state_dict())


def by_us(folder: Path, row: Row, target: str) -> dict[str, Tensor]:
    """The weights of the linears after `prune`."""
    amount: dict[str, Any] = {"pattern": target} if ":" in target else {"sparsity": float(target)}
    config = PruneConfig(
        model=str(folder / "dense"), output=folder / "out", overwrite=True, rebuild=False, dtype="float32",
        calibration=str(folder / "tokens.safetensors"), **row.ours, **amount,
    )  # fmt: skip
    prune(config)
    tensors: dict[str, Tensor] = {}
    for path in (folder / "out").glob("*.safetensors"):
        tensors |= load_file(path)
    return linears(tensors)


def linears(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if ".layers." in name and tensor.dim() == 2}


def compared(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> tuple[str, ...]:
    """Mask bits that differ; all mask bits; how many more they prune; the largest difference of kept weights."""
    assert theirs.keys() == ours.keys()
    differ = more = weights = 0
    apart = 0.0
    for name, weight in theirs.items():
        kept_by_them, kept_by_us = weight != 0, ours[name] != 0
        differ += int((kept_by_them != kept_by_us).sum())
        more += int(kept_by_us.sum() - kept_by_them.sum())
        difference = ((weight - ours[name]) * (kept_by_them & kept_by_us)).abs().max()
        apart = max(apart, float(difference / weight.abs().max()))
        weights += weight.numel()
    return f"{differ:,}", f"{weights:,}", f"{more:,}", f"{apart:.1e}"


def alps(clones: Path) -> Table:
    """ALPS on single linears: mask bits that differ, and the squared error of its output, ours over theirs."""
    names: dict[str, Any] = {"__name__": "program_alps"}
    execute(clones / "ALPS" / "alps.py", names)
    table = Table("ALPS", "target", "mask bits that differ", "error, ours over theirs")
    targets: tuple[tuple[str, Pattern], ...] = (
        ("0.5", Unstructured(0.5)), ("0.7", Unstructured(0.7)), ("2:4", NofM(2, 4)),
    )  # fmt: skip
    for rows, columns in ((24, 64), (96, 256)):
        for target, pattern in targets:
            generator = torch.Generator().manual_seed(rows)
            mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
            inputs = torch.randn(4 * columns, columns, generator=generator) @ (0.3 * mixing + torch.eye(columns))
            inputs[:, :: columns // 4] *= 40
            weight = torch.randn(rows, columns, generator=generator) * 0.05
            layer = nn.Linear(columns, rows, bias=False)
            layer.weight.data = weight.clone()
            peer = names["ALPS_prune"](layer, 1, len(inputs))
            peer.add_batch(inputs.unsqueeze(0), inputs @ weight.t())
            shape = (pattern.of - pattern.kept, pattern.of) if isinstance(pattern, NofM) else (0, 0)
            with contextlib.redirect_stdout(io.StringIO()):
                peer.ALPS_admm(sp=float(target) if shape == (0, 0) else 0.5, nm_n=shape[0], nm_m=shape[1], rho=0.1)
            keep, values = admm(weight, 2 * inputs.t() @ inputs, pattern)
            theirs, ours = (
                ((solved - weight) @ inputs.t()).square().sum().item() for solved in (layer.weight.data, values)
            )
            differ = ((layer.weight.data != 0) != keep).double().mean().item()
            table.add_row(f"{rows} × {columns}", target, f"{100 * differ:.2f} %", f"{ours / theirs:.4f}")
    return table


if __name__ == "__main__":
    main()
