"""Structure of a model: its family's entry, or an analysis that runs one decoder layer of each kind.

The analysis takes the largest module list for the decoder layers. The blocks of a layer are its modules that contain
linears, in the order of their first calls; linears directly in the layer form one more block. The analysis runs on the
CPU with zeros for weights, so that no weights are read.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from llm_barber.errors import ModelError, SettingsError, first_line
from llm_barber.model.architecture import ARCHITECTURES, ATTENTION, MLP, Architecture, Block, StructureOptions
from llm_barber.model.empty import empty_model, language_model_prefix
from llm_barber.model.experts import Experts
from llm_barber.model.skeleton import Skeleton
from llm_barber.model.stated_structure import check_blocks, check_flow, check_layers
from llm_barber.model.stepping import TRIAL_TOKENS
from llm_barber.model.tracing import LayerRun, first_of_each_kind, is_linear, run_layer, zeros_of

# A module list with at least this share of the largest list's parameters rivals it.
RIVAL = 0.25
# Names of blocks, by words in the block's path or in the name of its class.
LINEAR_ATTENTION, CONVOLUTION, STATE_SPACE = "linear attention", "convolution", "state space"
KINDS = (
    (
        LINEAR_ATTENTION,
        ("linearattn", "lightningattention", "deltanet", "deltaattention", "rwkvselfattention"),
    ),
    (ATTENTION, ("attention", "attn")),
    (CONVOLUTION, ("conv",)),
    (STATE_SPACE, ("mamba", "recurrent")),
    (MLP, ("mlp", "feedforward", "ffn", "moe")),
)
# Linears with a side of at most this share of the hidden size control other modules (time steps, gates) and stay dense.
# Elsewhere the share is smaller: where heads share keys and values, their projections are small, too.
THIN = {LINEAR_ATTENTION: 1 / 8, CONVOLUTION: 1 / 8, STATE_SPACE: 1 / 8}
VERY_THIN = 1 / 128
# A layer with a larger share of its parameters in stacks (3-D) is refused: they would silently stay dense.
STACKED = 0.1
HOW_TO_DECIDE = "--layers PATH says where the decoder layers are, --blocks FILE which linears each block has"


def find_architecture(config: PreTrainedConfig, options: StructureOptions | None = None) -> Architecture:
    """Find the structure of a model: its family's entry, or an analysis.

    Raises:
        ModelError: transformers cannot build the model, or its structure is ambiguous.
        SettingsError: the options do not fit the model.
    """
    options = options or StructureOptions()
    entry = ARCHITECTURES.get(config.model_type)
    if entry is not None and options == StructureOptions():
        return entry
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES or getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{config.model_type} is an encoder, or has one", "only decoder models, which write text, are pruned"
        )
    try:
        return _with_channels(analyse(config, options), config)
    except (ModelError, SettingsError):
        raise
    except Exception as error:  # models raise any error on odd settings
        raise ModelError(
            f"the structure of {config.model_type!r} was not found: its layers fail with {first_line(error)}",
            f"if transformers runs the model with this config.json: {HOW_TO_DECIDE}",
        ) from error


def _with_channels(architecture: Architecture, config: PreTrainedConfig) -> Architecture:
    """Add the channels that may change places in a model with images: those of its language model's entry."""
    entry = ARCHITECTURES.get(config.get_text_config().model_type)
    if entry is None:
        return architecture
    linears = set(architecture.linears)
    channels = [part for part in entry.channels if linears.issuperset((*part.writers, part.reader))]
    return replace(architecture, channels=tuple(channels))


def analyse(config: PreTrainedConfig, options: StructureOptions | None = None) -> Architecture:
    """Find the structure of a model by running its layers.

    Raises:
        ModelError, SettingsError: as `find_architecture`.
    """
    options = options or StructureOptions()
    model = _build(config)
    layers = check_layers(model, options.layers) if options.layers else find_layers(model)
    transposed = any(isinstance(module, Conv1D) for module in model.get_submodule(layers).modules())
    if options.blocks:
        check_blocks(options.blocks, model.get_submodule(layers))
    architecture = Architecture(layers, options.blocks, transposed)
    skeleton = Skeleton(config, architecture, torch.device("cpu"), torch.float32, model)
    skeleton.fill_outside({name: zeros_of(skeleton.model, name) for name in skeleton.all_outside_names})
    hidden: list[Tensor] = []
    skeleton.embed(torch.zeros(1, TRIAL_TOKENS, dtype=torch.int64), hidden.append)
    if options.blocks:
        check_flow(skeleton, hidden[0])
        return architecture
    blocks: list[Block] = []
    runs = {index: run_layer(skeleton, index, hidden[0]) for index in first_of_each_kind(skeleton.layers)}
    routers = set().union(*(run.routers for run in runs.values()))
    for index, run in runs.items():
        blocks = _merged(blocks, _blocks(skeleton, index, run, routers, hidden[0].shape[-1]))
    if not any(block.linears for block in blocks):
        raise ModelError(f"no linears were found in {layers}", HOW_TO_DECIDE)
    return Architecture(layers, tuple(blocks), transposed)


def _build(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the empty model; all errors become a ModelError."""
    try:
        return empty_model(config, torch.float32)
    except ModelError:
        raise
    except Exception as error:  # configurations raise any error, too
        raise ModelError(
            f"transformers cannot build {config.model_type!r} from config.json: {first_line(error)}",
            "install what it asks for" if isinstance(error, ImportError) else "get the file again",
        ) from error


def find_layers(model: nn.Module) -> str:
    """Find the path of the decoder layers: the outermost module list with the most parameters.

    Lists in the token embedding's module come first, directly in it before deeper ones: other lists may process images
    or sound.

    Raises:
        ModelError: there is no such list, or there are several of similar size.
    """
    sizes = {
        path: sum(parameter.numel() for parameter in module.parameters())
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(is_linear(child) for child in module.modules())
    }
    outermost = {path: size for path, size in sizes.items() if not any(path.startswith(f"{outer}.") for outer in sizes)}
    if not outermost:
        raise ModelError(f"{type(model).__name__} has no list of layers with linears", "only decoder models are pruned")
    prefix = language_model_prefix(model) if isinstance(model, PreTrainedModel) else ""
    outermost = {path: size for path, size in outermost.items() if path.startswith(prefix)} or outermost
    least = RIVAL * max(outermost.values())
    rivals = [path for path, size in outermost.items() if size > least]
    rivals = [path for path in rivals if "." not in path.removeprefix(prefix)] or rivals
    if len(rivals) > 1:
        others = [path for path in outermost if path not in rivals]
        raise ModelError(
            f"{type(model).__name__} has several lists of layers: {', '.join(rivals)}",
            "choose: --layers PATH" + (f"; smaller lists are {', '.join(others)}" if others else ""),
        )
    return str(rivals[0])


def _blocks(skeleton: Skeleton, index: int, run: LayerRun, routers: set[str], width: int) -> list[Block]:
    """Blocks of a layer in the order of their first calls; `width` is that of the states."""
    layer = skeleton.layers[index]
    sizes = {name: parameter.numel() for name, parameter in layer.named_parameters()}
    stacked = [name for name, parameter in layer.named_parameters() if parameter.dim() > 2 and "conv" not in name]
    if sum(sizes[name] for name in stacked) > STACKED * sum(sizes.values()):
        raise ModelError(
            f"layer {index} keeps weights stacked in {stacked[0]}, which this program does not know how to prune",
            "name its blocks with --blocks FILE (docs/reference/families.md), or open an issue that names the model",
        )
    outputs, loose = _parts(layer, "", run)
    blocks = []  # with the index of their first call
    for output in outputs:
        block = layer.get_submodule(output)
        kind = _kind(block, output)
        linears = _linears(block, output, kind, width, run, routers)
        if linears and run.width(output) != width:
            raise ModelError(
                f"layer {index}: {output} holds linears, and its output has not the {width} features of the states",
                f"a model with several streams of states cannot be pruned; else: {HOW_TO_DECIDE}",
            )
        if linears:
            blocks.append((run.order[output], Block(kind, output, linears)))
    loose = sorted((name for name in loose if name in run.order), key=run.order.__getitem__)
    if loose and run.width(loose[-1]) == width:
        name = MLP if any(block.name == ATTENTION for _, block in blocks) else "linears"
        blocks.append((run.order[loose[-1]], Block(name, loose[-1], tuple(loose))))
    return _with_unique_names([block for _, block in sorted(blocks, key=lambda numbered: numbered[0])])


def _with_unique_names(blocks: list[Block]) -> list[Block]:
    """Name a block by its path if an earlier block of the layer has the same name."""
    seen: set[str] = set()
    named = []
    for block in blocks:
        named.append(replace(block, name=block.output) if block.name in seen else block)
        seen.add(block.name)
    return named


def _parts(module: nn.Module, path: str, run: LayerRun) -> tuple[list[str], list[str]]:
    """Paths of the outermost called modules that contain linears, and of linears outside such modules."""
    outputs, loose = [], []
    for name, child in module.named_children():
        below = f"{path}.{name}" if path else name
        if is_linear(child):
            loose.append(below)
        elif any(is_linear(inner) for inner in child.modules()):
            if below in run.order:
                outputs.append(below)
            else:  # a container, which is not called
                inner_outputs, inner_loose = _parts(child, below, run)
                outputs += inner_outputs
                loose += inner_loose
    return outputs, loose


def _linears(block: nn.Module, path: str, kind: str, width: int, run: LayerRun, routers: set[str]) -> tuple[str, ...]:
    """Prunable linears of a block in the order of calls, without routers; `*` stands for expert numbers."""
    calls: dict[str, int] = {}  # index of the first call
    mixtures = {name: module for name, module in block.named_modules() if isinstance(module, Experts)}
    routed = {name.rpartition(".")[0] for name in mixtures}
    for name, module in block.named_modules():
        if not is_linear(module):
            continue
        parent = name.rpartition(".")[0]
        rows, columns = module.weight.shape
        if parent in routed or "router" in name or f"{path}.{name}" in routers:  # or a gate beside experts
            continue
        if min(rows, columns) <= THIN.get(kind, VERY_THIN) * width:
            continue
        experts = next((mixture for mixture in mixtures if name.startswith(f"{mixture}.")), None)
        if experts is not None:
            last = name.removeprefix(f"{experts}.").partition(".")[2]
            name = f"{experts}.*.{last}"
        full = f"{path}.{name}" if name else path
        calls.setdefault(full, run.order.get(full, len(run.order)))
    return tuple(sorted(calls, key=calls.__getitem__))


def _merged(known: list[Block], blocks: list[Block]) -> list[Block]:
    """Merge the blocks of two kinds of layers, in an order that fits both."""
    merged = list(known)
    position = 0
    for block in blocks:
        with_this_output = [index for index, earlier in enumerate(merged) if earlier.output == block.output]
        if with_this_output:
            old = merged[with_this_output[0]]
            name = old.name if old.name == block.name else block.output
            merged[with_this_output[0]] = Block(
                name, block.output, tuple(dict.fromkeys((*old.linears, *block.linears)))
            )
            position = with_this_output[0] + 1
        else:
            outputs = {present.output for present in blocks}
            while position < len(merged) and merged[position].output not in outputs:
                position += 1  # after blocks that only earlier layers have
            merged.insert(position, block)
            position += 1
    return merged


def _kind(module: nn.Module, path: str) -> str:
    """Name a block by words in its path, or else in its class; linear attention by words in either."""
    texts = [path.lower().replace("_", ""), type(module).__name__.lower()]
    if any(word in text for word in dict(KINDS)[LINEAR_ATTENTION] for text in texts):
        return LINEAR_ATTENTION
    kinds = (kind for text in texts for kind, words in KINDS if any(word in text for word in words))
    return next(kinds, path)
