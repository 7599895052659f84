"""Compare `prune` with a plain implementation of the published method: time, memory and masks.

Plain: two whole models in memory, every sequence by itself through every block, autograd's gradient of every weight, a
Python loop over rows; for LLaMA-shaped models, in float32. `prune` runs in float32 and in bfloat16. Each run has a
process of its own.

    python benchmarks/plain.py
    OMP_NUM_THREADS=1 python benchmarks/plain.py --samples 16
"""

import argparse
import copy
import json
import resource
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from common import call, keep, model_folder, show
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llm_barber.loading.tokenizer import load_tokenizer
from llm_barber.text.calibration import load_calibration

SPARSITY, RATIO = 0.5, 0.1
PLAIN = "plain"
DTYPES = ("float32", "bfloat16")  # that `prune` computes in
BLOCKS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


class Reached(Exception):  # noqa: N818 - a signal
    """The first layer was called."""


def first_inputs(model: nn.Module, tokens: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
    """The first layer's input for every sequence, and the keyword arguments that layers are called with."""
    inputs: list[Tensor] = []
    arguments: dict[str, Any] = {}

    def hook(_: nn.Module, positional: tuple[Tensor, ...], keywords: dict[str, Any]) -> None:
        inputs.append(positional[0])
        arguments.update(keywords)
        raise Reached

    handle = model.model.layers[0].register_forward_pre_hook(hook, with_kwargs=True)
    for sequence in tokens:
        with suppress(Reached):
            model(input_ids=sequence[None], use_cache=False)
    handle.remove()
    return inputs, arguments


def run_block(layer: nn.Module, name: str, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    """A block's output on its normalised input."""
    if name == "mlp":
        return layer.mlp(layer.post_attention_layernorm(hidden))
    return layer.self_attn(hidden_states=layer.input_layernorm(hidden), **arguments)[0]


def wanda_masks(layer: nn.Module, inputs: list[Tensor], arguments: dict[str, Any]) -> dict[str, Tensor]:
    """|W| · ‖X‖, half of each row."""
    squares: dict[str, Tensor] = {}
    handles = []
    for block, names in BLOCKS.items():
        for name in names:
            path = f"{block}.{name}"

            def hook(_: nn.Module, arguments: tuple[Tensor, ...], path: str = path) -> None:
                squares[path] = squares.get(path, 0) + arguments[0].square().sum((0, 1)) / len(inputs)

            handles.append(layer.get_submodule(path).register_forward_pre_hook(hook))
    with torch.no_grad():
        for hidden in inputs:
            layer(hidden, **arguments)
    for handle in handles:
        handle.remove()
    masks = {}
    for path, square in squares.items():
        weight = layer.get_submodule(path).weight.data
        score = weight.abs() * square.sqrt()
        keep_mask = torch.ones_like(weight, dtype=torch.bool)
        pruned = score.sort(dim=1, stable=True)[1][:, : int(SPARSITY * weight.shape[1])]
        masks[path] = keep_mask.scatter_(1, pruned, False)
    return masks


def rebuilt(mask: Tensor, saliency: Tensor) -> Tensor:
    """Row by row: pruned weights, high to low, with kept ones, low to high; the first of the beneficial pairs swap."""
    result = mask.clone()
    for row in range(len(mask)):
        pruned, kept = (~mask[row]).nonzero().flatten(), mask[row].nonzero().flatten()
        grow = pruned[saliency[row, pruned].sort(descending=True, stable=True)[1]]
        drop = kept[saliency[row, kept].sort(stable=True)[1]]
        pairs = min(len(grow), len(drop))
        beneficial = int((saliency[row, grow[:pairs]] > saliency[row, drop[:pairs]]).sum())
        swapped = int(RATIO * beneficial)
        result[row, grow[:swapped]] = True
        result[row, drop[:swapped]] = False
    return result


def plain(model: str, tokens: Tensor) -> dict[str, Tensor]:
    """Wanda, rebuilt within each output; keep masks by the name of the linear."""
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    sparse = copy.deepcopy(dense).requires_grad_(False)
    with torch.no_grad():
        inputs, arguments = first_inputs(sparse, tokens)
    masks = {}
    for index, (layer, target) in enumerate(zip(dense.model.layers, sparse.model.layers, strict=True)):
        initial_masks = wanda_masks(target, inputs, arguments)
        for path, mask in initial_masks.items():
            target.get_submodule(path).weight.data *= mask
        for block, names in BLOCKS.items():
            squares = {f"{block}.{name}": 0 for name in names}
            for hidden in inputs:
                with torch.no_grad():
                    output = run_block(target, block, hidden, arguments)
                nn.functional.mse_loss(run_block(layer, block, hidden, arguments), output).backward()
                for path in squares:
                    weight = layer.get_submodule(path).weight
                    squares[path] = squares[path] + weight.grad**2 / len(inputs)
                layer.zero_grad()
            for path, square in squares.items():
                weight = layer.get_submodule(path).weight.data
                mask = rebuilt(initial_masks[path], weight.abs() * square.sqrt())
                target.get_submodule(path).weight.data = weight * mask
                masks[f"model.layers.{index}.{path}"] = mask
            with torch.no_grad():
                inputs = [hidden + run_block(target, block, hidden, arguments) for hidden in inputs]
    return masks


def ours(model: str, tokens: Path, folder: Path, dtype: str) -> dict[str, Tensor]:
    """The same by `prune`."""
    from llm_barber import PruneConfig, prune

    prune(
        PruneConfig(
            model=model, output=folder / "out", initial="wanda", sparsity=SPARSITY, granularity="output",
            rebuild_ratio=RATIO, calibration=tokens, dtype=dtype, report=False, overwrite=True,
        )
    )  # fmt: skip
    masks = {}
    for path in (folder / "out").glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            if name.endswith("_proj.weight"):
                masks[name.removesuffix(".weight")] = tensor != 0
    return masks


def measured(which: str, model: str, folder: Path) -> dict[str, float]:
    """Seconds and peak memory of a program, whose masks go into the folder."""
    tokens = folder / "tokens.safetensors"
    began = time.perf_counter()
    masks = plain(model, load_file(tokens)["input_ids"]) if which == PLAIN else ours(model, tokens, folder, which)
    seconds = time.perf_counter() - began
    save_file(masks, folder / f"{which}.safetensors")
    return {"seconds": seconds, "GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a LLaMA-shaped folder or hub id; default: SmolLM2-135M from its package")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--only", choices=(PLAIN, *DTYPES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    model = model_folder(options.model)
    if options.only:
        print(json.dumps(measured(options.only, model, options.folder)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = load_calibration("builtin", lambda: load_tokenizer(Path(model)), options.samples, options.seqlen, 0)
        save_file({"input_ids": tokens.input_ids}, folder / "tokens.safetensors")
        results = {}
        for which in (PLAIN, *DTYPES):
            command = [sys.executable, __file__, "--model", model, "--only", which, "--folder", name]
            results[which] = json.loads(call(command).splitlines()[-1])
        first, second = (load_file(folder / f"{which}.safetensors") for which in (PLAIN, DTYPES[0]))
    same = sum(int((mask == second[name]).sum()) for name, mask in first.items())
    agreement = same / sum(mask.numel() for mask in first.values())
    differ = {int(name.split(".")[2]) for name, mask in first.items() if not torch.equal(mask, second[name])}
    layers = 1 + max(int(name.split(".")[2]) for name in first)
    equal = min(differ, default=layers)
    size = {"samples": options.samples, "seqlen": options.seqlen}
    keep("plain", {**size, "results": results, "same mask bits": agreement, "first layers all the same": equal})
    rows = [
        [
            which if which == PLAIN else f"prune, {which}",
            *(f"{value:.2f}" for value in result.values()),
            f"{results[PLAIN]['seconds'] / result['seconds']:.2f}",
        ]
        for which, result in results.items()
    ]
    title = f"Wanda + rebuild, {Path(model).name}, {options.samples} × {options.seqlen} tokens, loading included"
    show(title, ["", "seconds", "peak GiB", "times as fast"], rows)
    print(f"float32: {agreement:.4%} of the masks' bits are the same, and all of the first {equal} of {layers} layers;")
    print("where a rounding changes the choice of one pair in a million, the layers after it get other inputs.")


if __name__ == "__main__":
    main()
