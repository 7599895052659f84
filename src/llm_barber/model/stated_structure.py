"""Checks of the structure that a user states (`--layers`, `--blocks`) against the model."""

from torch import Tensor, nn

from llm_barber.errors import SettingsError
from llm_barber.model.architecture import Architecture, Block
from llm_barber.model.skeleton import Skeleton
from llm_barber.model.tracing import first_of_each_kind, is_linear, run_layer

OUTPUT_HINT = "the output is a module that holds the linears, or the last of them"


def check_blocks(blocks: tuple[Block, ...], layers: nn.Module) -> None:
    """Refuse blocks that do not fit the layers.

    Raises:
        SettingsError: a block, or a linear of a block, is in no layer, or is named twice, or lies outside its output.
    """
    assert isinstance(layers, nn.ModuleList)
    stated = Architecture("", blocks)
    present = [block for layer in layers for block in stated.blocks_of(layer)]
    for block in blocks:
        if block.output not in {of_layer.output for of_layer in present}:
            raise SettingsError(f"--blocks: no layer has a module {block.output!r}", _modules_hint(layers[0]))
        for linear in block.linears:
            if not any(_stands_for(linear, name) for of_layer in present for name in of_layer.linears):
                raise SettingsError(f"--blocks: no layer has a linear {linear!r}", _paths_hint(layers[0]))
        _check_block(block, layers)
    names = [linear for block in blocks for linear in block.linears]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SettingsError(f"--blocks: {twice[0]!r} is there twice", "each linear belongs to one block")
    outputs = [block.output for block in blocks]
    for output in outputs:
        inside = [inner for inner in outputs if inner.startswith(f"{output}.")]
        if inside:
            raise SettingsError(
                f"--blocks: {inside[0]!r} is inside {output!r}",
                "one block follows another",
            )
    shared = sorted({output for output in outputs if outputs.count(output) > 1})
    if shared:
        raise SettingsError(f"--blocks: {shared[0]!r} is the output of two blocks", "put their linears into one")


def _check_block(block: Block, layers: nn.ModuleList) -> None:
    """Refuse modules that are not linears, and linears that are not inside their block's output."""
    for layer in layers:
        for of_layer in Architecture("", (block,)).blocks_of(layer):
            for linear in of_layer.linears:
                if not is_linear(layer.get_submodule(linear)):
                    raise SettingsError(f"--blocks: {linear!r} is not a linear", _paths_hint(layer))
                if is_linear(layer.get_submodule(of_layer.output)):
                    inside = of_layer.output in of_layer.linears
                else:
                    inside = linear.startswith(f"{of_layer.output}.")
                if not inside:
                    outside = f"--blocks: {linear!r} is not inside {of_layer.output!r}, the output of its block"
                    raise SettingsError(outside, OUTPUT_HINT)


def _stands_for(linear: str, name: str) -> bool:
    """Test whether a linear, maybe with `*` in place of an expert's number, stands for a name."""
    experts, star, rest = linear.partition(".*.")
    if not star:
        return name == linear
    return name.startswith(f"{experts}.") and name.removeprefix(f"{experts}.").partition(".")[2] == rest


def _modules_hint(layer: nn.Module) -> str:
    holders = dict.fromkeys(
        name.rpartition(".")[0] or name for name, module in layer.named_modules() if is_linear(module)
    )
    return f"modules that hold linears: {', '.join(holders)}"


def _paths_hint(layer: nn.Module) -> str:
    return f"a layer has {', '.join(name for name, module in layer.named_modules() if is_linear(module))}"


def check_layers(model: nn.Module, path: str) -> str:
    """Return the path of the decoder layers, if a module list is there.

    Raises:
        SettingsError: the path is not that of a module list.
    """
    try:
        layers = model.get_submodule(path)
    except AttributeError:
        layers = None
    if not isinstance(layers, nn.ModuleList):
        lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        raise SettingsError(
            f"--layers {path} is not the path of a list of decoder layers",
            f"paths of lists: {', '.join(lists[:20])}" if lists else "leave out --layers",
        )
    return path


def check_flow(skeleton: Skeleton, hidden: Tensor) -> None:
    """Refuse blocks that layers compute in another order, or whose output ignores one of their linears.

    Args:
        skeleton: a model with these blocks that has embedded one sequence of `stepping.TRIAL_TOKENS` tokens.
        hidden: input of the first layer, (1, tokens, hidden).

    Raises:
        SettingsError: the blocks do not fit a layer.
    """
    for index in first_of_each_kind(skeleton.layers):
        outputs = [block.output for block in skeleton.blocks[index]]
        run = run_layer(skeleton, index, hidden)
        computed = sorted(outputs, key=lambda output: run.order.get(output, -1))
        if computed != outputs:
            raise SettingsError(
                f"--blocks: layer {index} computes {', then '.join(computed)}",
                "give the blocks in this order",
            )
        for block in skeleton.blocks[index]:
            for linear in run.without_effect(block.linears, run.states.get(block.output)):
                raise SettingsError(f"--blocks: {block.output!r} does not depend on {linear!r}", OUTPUT_HINT)
