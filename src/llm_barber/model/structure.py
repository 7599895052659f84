"""The structure of a model: by its family's record, or, without one, found by running one decoder layer of each kind.

What is found: the repeated layers are the largest module list; the blocks of a layer are its modules that hold linears,
in the order in which data flows through them; linears that lie in the layer itself are one block more. Weights are
zeros, so that nothing is read; on CPU.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from llm_barber.errors import ModelError, SettingsError, first_line
from llm_barber.model.architecture import ARCHITECTURES, Architecture, Block, StructureOptions
from llm_barber.model.experts import Experts
from llm_barber.model.skeleton import Skeleton, empty_model

TOKENS = 8
# Module lists with a smaller share of the largest one's parameters are no rivals of it.
RIVAL = 0.25
# What a block is called, by words in its path or in the name of its class.
LINEAR_ATTENTION, ATTENTION, CONVOLUTION, STATE_SPACE, MLP = (
    "linear attention", "attention", "convolution", "state space", "mlp"
)  # fmt: skip
KINDS = (
    (LINEAR_ATTENTION, ("linearattn", "deltanet")),
    (ATTENTION, ("attention", "attn")),
    (CONVOLUTION, ("conv",)),
    (STATE_SPACE, ("mamba", "recurrent")),
    (MLP, ("mlp", "feedforward", "ffn", "moe")),
)
# Linears with a side that is no larger than this share of the hidden size steer others (time steps, gates) and stay
# dense; where heads share keys and values, their projections are small, too, and are no such linears.
THIN = {LINEAR_ATTENTION: 1 / 8, CONVOLUTION: 1 / 8, STATE_SPACE: 1 / 8}
VERY_THIN = 1 / 128
# Stacked parameters (3-D) with a larger share of a layer than this are weights that nobody would see pruned.
STACKED = 0.1
HOW_TO_DECIDE = "--layers PATH says where the decoder layers are, --blocks FILE which linears each block has"


def find_architecture(config: PreTrainedConfig, options: StructureOptions | None = None) -> Architecture:
    """The record of a configuration's family, or what is found without one.

    Raises:
        ModelError: transformers cannot build the model, or its structure is ambiguous.
        SettingsError: the options do not fit the model.
    """
    options = options or StructureOptions()
    record = ARCHITECTURES.get(config.model_type)
    if record is not None and options == StructureOptions():
        return record
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise ModelError(f"{config.model_type} is an encoder", "only decoder models, which write text, are pruned")
    try:
        return analyse(config, options)
    except (ModelError, SettingsError):
        raise
    except Exception as error:  # models raise whatever odd settings make them raise
        raise ModelError(
            f"architecture {config.model_type!r} is not known, and its structure was not found: {first_line(error)}",
            f"{HOW_TO_DECIDE}; known are {', '.join(sorted(ARCHITECTURES))}",
        ) from error


def analyse(config: PreTrainedConfig, options: StructureOptions | None = None) -> Architecture:
    """The structure of a model, found by running it.

    Raises:
        ModelError, SettingsError: as `find_architecture`.
    """
    options = options or StructureOptions()
    model = empty_model(config, torch.float32)
    layers = _given_layers(model, options.layers) if options.layers else find_layers(model)
    transposed = any(isinstance(module, Conv1D) for module in model.get_submodule(layers).modules())
    if options.blocks:
        _check_blocks(options.blocks, model.get_submodule(layers))
        return Architecture(layers, options.blocks, transposed)
    skeleton = Skeleton(config, Architecture(layers, ()), torch.device("cpu"), torch.float32, model)
    zeros = {name: _zeros(skeleton.model, name) for name in skeleton.every_outside_name}
    skeleton.fill_outside(zeros)
    hidden: list[Tensor] = []
    skeleton.embed(torch.zeros(1, TOKENS, dtype=torch.int64), hidden.append)
    found: list[Block] = []
    kinds: set[Any] = set()
    for index, layer in enumerate(skeleton.layers):
        kind = tuple((name, type(module)) for name, module in layer.named_modules())
        if kind not in kinds:
            kinds.add(kind)
            found = _merged(found, _blocks(skeleton, index, hidden[0]))
    if not any(block.linears for block in found):
        raise ModelError(f"no linears were found in {layers}", HOW_TO_DECIDE)
    return Architecture(layers, tuple(found), transposed)


def find_layers(model: nn.Module) -> str:
    """The path of the decoder layers: the module list with most parameters that is not inside another.

    Raises:
        ModelError: there is none, or there are several of that size.
    """
    sizes = {
        path: sum(parameter.numel() for parameter in module.parameters())
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(_is_linear(one) for one in module.modules())
    }
    outermost = {path: size for path, size in sizes.items() if not any(path.startswith(f"{one}.") for one in sizes)}
    if not outermost:
        raise ModelError(f"{type(model).__name__} has no list of layers with linears", "only decoder models are pruned")
    largest = max(outermost.values())
    rivals = [path for path, size in outermost.items() if size > RIVAL * largest]
    if len(rivals) > 1:
        raise ModelError(
            f"{type(model).__name__} has several lists of layers: {', '.join(rivals)}", "choose: --layers PATH"
        )
    return str(rivals[0])


def _check_blocks(blocks: tuple[Block, ...], layers: nn.Module) -> None:
    """Refuse blocks that a user gave and no layer has."""
    assert isinstance(layers, nn.ModuleList)
    record = Architecture("", blocks)
    every = [block for layer in layers for block in record.blocks_of(layer)]
    for block in blocks:
        if block.output not in {one.output for one in every}:
            raise SettingsError(f"blocks: no layer has a module {block.output!r}", _paths_hint(layers[0]))
        for linear in block.linears:
            pattern = linear.split(".*.")
            if not any(_stands_for(pattern, name) for one in every for name in one.linears):
                raise SettingsError(f"blocks: no layer has a linear {linear!r}", _paths_hint(layers[0]))
        _check_block(block, layers)
    names = [linear for block in blocks for linear in block.linears]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SettingsError(f"blocks: {twice[0]!r} is there twice", "each linear belongs to one block")


def _check_block(block: Block, layers: nn.ModuleList) -> None:
    """Refuse what is no linear, and linears that a block's output does not depend on."""
    for layer in layers:
        for one in Architecture("", (block,)).blocks_of(layer):
            for linear in one.linears:
                if not _is_linear(layer.get_submodule(linear)):
                    raise SettingsError(f"blocks: {linear!r} is not a linear", _paths_hint(layer))
                if _is_linear(layer.get_submodule(one.output)):
                    inside = one.output in one.linears
                else:
                    inside = linear.startswith(f"{one.output}.")
                if not inside:
                    raise SettingsError(
                        f"blocks: {linear!r} is not inside {one.output!r}, the output of its block",
                        "the output is a module that holds the linears, or the last of them",
                    )


def _stands_for(pattern: list[str], name: str) -> bool:
    return name == pattern[0] if len(pattern) == 1 else name.startswith(pattern[0]) and name.endswith(pattern[1])


def _paths_hint(layer: nn.Module) -> str:
    return f"a layer has {', '.join(name for name, module in layer.named_modules() if _is_linear(module))}"


def _given_layers(model: nn.Module, path: str) -> str:
    try:
        found = model.get_submodule(path)
    except AttributeError:
        found = None
    if not isinstance(found, nn.ModuleList):
        lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        raise SettingsError(
            f"--layers {path} is not a list of layers", f"lists are: {', '.join(lists[:20])}" if lists else ""
        )
    return path


@dataclass
class _Run:
    """Modules of a layer in the order in which they were first called, and what they returned."""

    order: dict[str, int] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)  # the last dimension of outputs
    outputs: dict[str, Tensor] = field(default_factory=dict)  # of linears, with their graph
    routers: set[str] = field(default_factory=set)  # linears that say no more than which experts there are to be

    def find_routers(self, states: Tensor) -> None:
        """Those that the layer's output does not depend on, where experts hand on what they are given."""
        gradients = torch.autograd.grad(states.sum(), list(self.outputs.values()), allow_unused=True)
        self.routers = {name for name, one in zip(self.outputs, gradients, strict=True) if one is None}


def _blocks(skeleton: Skeleton, index: int, hidden: Tensor) -> list[Block]:
    """The blocks of a layer, in the order in which data flows through them."""
    names = skeleton.layer_names(index)
    layer = skeleton.load_layer(index, {name: _zeros(skeleton.layers[index], name) for name in names})
    run = _Run()
    with ExitStack() as stack, torch.enable_grad():
        for name, module in layer.named_modules():
            if _is_linear(module):
                marking = module.register_forward_hook(_marking_output(run, name))
                stack.callback(marking.remove)
            if isinstance(module, Experts):
                setattr(module, "forward", _skipped)  # noqa: B010 - an instance's
                stack.callback(delattr, module, "forward")
            before = module.register_forward_pre_hook(_noting_call(run, name))
            after = module.register_forward_hook(_noting_width(run, name))
            stack.callback(before.remove)
            stack.callback(after.remove)
        output = layer(hidden, **skeleton.arguments(index, 1, TOKENS))
    assert skeleton.stepping is not None
    skeleton.stepping.check(skeleton.model, output)
    if any(isinstance(module, Experts) for module in layer.modules()):
        run.find_routers(output if isinstance(output, Tensor) else output[0])
    stacked = [name for name, one in layer.named_parameters() if one.dim() > 2 and "conv" not in name]
    sizes = {name: one.numel() for name, one in layer.named_parameters()}
    skeleton.release_layer(index)
    if sum(sizes[name] for name in stacked) > STACKED * sum(sizes.values()):
        raise ModelError(
            f"layer {index} keeps weights stacked in {stacked[0]}, which this program does not know how to prune",
            "name what can be pruned with --blocks FILE (docs/architectures.md), or open an issue that names the model",
        )
    outputs, loose = _parts(layer, "", run)
    width = hidden.shape[-1]
    found = []
    for output in outputs:
        block = layer.get_submodule(output)
        kind = _kind(block, output)
        linears = _linears(block, output, kind, width, run)
        if linears and run.widths.get(output) != width:
            raise ModelError(
                f"layer {index}: {output} holds linears, and its output does not have the layer's {width} features",
                HOW_TO_DECIDE,
            )
        if linears:
            found.append((run.order[output], Block(kind, output, linears)))
    loose = sorted((name for name in loose if name in run.order), key=run.order.__getitem__)
    if loose and run.widths[loose[-1]] == width:
        name = MLP if any(block.name == ATTENTION for _, block in found) else "linears"
        found.append((run.order[loose[-1]], Block(name, loose[-1], tuple(loose))))
    return _named_apart([block for _, block in sorted(found, key=lambda one: one[0])])


def _zeros(module: nn.Module, name: str) -> Tensor:
    """Zeros of a parameter's shape that take no memory."""
    return torch.zeros(()).expand(module.get_parameter(name).shape)


def _named_apart(blocks: list[Block]) -> list[Block]:
    """Blocks of a layer whose kind another one before them has are called by their paths."""
    seen: set[str] = set()
    named = []
    for block in blocks:
        named.append(replace(block, name=block.output) if block.name in seen else block)
        seen.add(block.name)
    return named


def _parts(module: nn.Module, path: str, run: _Run) -> tuple[list[str], list[str]]:
    """Paths of the outermost modules that were called and hold linears, and of linears that lie in none of them."""
    outputs, loose = [], []
    for name, child in module.named_children():
        below = f"{path}.{name}" if path else name
        if _is_linear(child):
            loose.append(below)
        elif any(_is_linear(one) for one in child.modules()):
            if below in run.order:
                outputs.append(below)
            else:  # a container
                more = _parts(child, below, run)
                outputs += more[0]
                loose += more[1]
    return outputs, loose


def _linears(block: nn.Module, path: str, kind: str, width: int, run: _Run) -> tuple[str, ...]:
    """The prunable linears of a block in the order of calls; `*` for experts, whose routers are not among them."""
    found: dict[str, int] = {}
    mixtures = {name: module for name, module in block.named_modules() if isinstance(module, Experts)}
    routed = {name.rpartition(".")[0] for name in mixtures}
    for name, module in block.named_modules():
        if not _is_linear(module):
            continue
        parent = name.rpartition(".")[0]
        rows, columns = module.weight.shape
        if parent in routed or "router" in name or f"{path}.{name}" in run.routers:  # or a gate beside experts
            continue
        if min(rows, columns) <= THIN.get(kind, VERY_THIN) * width:
            continue
        experts = next((one for one in mixtures if name.startswith(f"{one}.")), None)
        if experts is not None:
            last = name.removeprefix(f"{experts}.").partition(".")[2]
            name = f"{experts}.*.{last}"
        full = f"{path}.{name}" if name else path
        found.setdefault(full, run.order.get(full, len(run.order)))
    return tuple(sorted(found, key=found.__getitem__))


def _merged(known: list[Block], blocks: list[Block]) -> list[Block]:
    """All blocks of two kinds of layers, in the order of both."""
    merged = list(known)
    place = 0
    for block in blocks:
        same = [number for number, one in enumerate(merged) if one.output == block.output]
        if same:
            old = merged[same[0]]
            name = old.name if old.name == block.name else block.output
            merged[same[0]] = Block(name, block.output, tuple(dict.fromkeys((*old.linears, *block.linears))))
            place = same[0] + 1
        else:
            outputs = {one.output for one in blocks}
            while place < len(merged) and merged[place].output not in outputs:
                place += 1  # after what only other layers have
            merged.insert(place, block)
            place += 1
    return merged


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D)) and module.weight.dim() == 2


def _kind(module: nn.Module, path: str) -> str:
    """What a block is called: by its class, or by its path."""
    for text in (path.lower().replace("_", ""), type(module).__name__.lower()):
        for kind, words in KINDS:
            if any(word in text for word in words):
                return kind
    return path


def _noting_call(run: _Run, name: str) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        run.order.setdefault(name, len(run.order))

    return hook


def _noting_width(run: _Run, name: str) -> Callable[..., None]:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple | list) and output else output
        if isinstance(first, Tensor) and first.dim() >= 2:
            run.widths[name] = first.shape[-1]

    return hook


def _marking_output(run: _Run, name: str) -> Callable[..., Any]:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        if not isinstance(output, Tensor):
            return output
        run.outputs[name] = output if output.requires_grad else output.requires_grad_()
        return run.outputs[name].clone()  # which may be written to

    return hook


def _skipped(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states
