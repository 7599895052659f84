"""What a user decides of a model's structure (`--layers`, `--blocks`), checked against the model."""

from torch import Tensor, nn

from llm_barber.errors import SettingsError
from llm_barber.messages import SettingName, message
from llm_barber.model.architecture import Architecture, Block
from llm_barber.model.skeleton import Skeleton
from llm_barber.model.tracing import first_of_each_kind, is_linear, run_layer

OUTPUT_HINT = "the output is a module that holds the linears, or the last of them"


def check_blocks(blocks: tuple[Block, ...], layers: nn.Module) -> None:
    """Refuse blocks that no layer has.

    Raises:
        SettingsError: a block, or a linear of one, is not there, or is there twice, or does not lead to its output.
    """
    assert isinstance(layers, nn.ModuleList)
    record = Architecture("", blocks)
    every = [block for layer in layers for block in record.blocks_of(layer)]
    for block in blocks:
        if block.output not in {one.output for one in every}:
            raise SettingsError(
                message("{blocks}: no layer has a module {output!r}", output=block.output), _paths_hint(layers[0])
            )
        for linear in block.linears:
            pattern = linear.split(".*.")
            if not any(_stands_for(pattern, name) for one in every for name in one.linears):
                raise SettingsError(
                    message("{blocks}: no layer has a linear {linear!r}", linear=linear), _paths_hint(layers[0])
                )
        _check_block(block, layers)
    names = [linear for block in blocks for linear in block.linears]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SettingsError(
            message("{blocks}: {linear!r} is there twice", linear=twice[0]), "each linear belongs to one block"
        )
    outputs = [block.output for block in blocks]
    for one in outputs:
        inside = [other for other in outputs if other.startswith(f"{one}.")]
        if inside:
            raise SettingsError(
                message("{blocks}: {inner!r} is inside {outer!r}", inner=inside[0], outer=one),
                "one block follows another",
            )
    shared = sorted({output for output in outputs if outputs.count(output) > 1})
    if shared:
        raise SettingsError(
            message("{blocks}: {output!r} is the output of two blocks", output=shared[0]), "put their linears into one"
        )


def _check_block(block: Block, layers: nn.ModuleList) -> None:
    """Refuse what is no linear, and linears that are not inside their block's output."""
    for layer in layers:
        for one in Architecture("", (block,)).blocks_of(layer):
            for linear in one.linears:
                if not is_linear(layer.get_submodule(linear)):
                    raise SettingsError(
                        message("{blocks}: {linear!r} is not a linear", linear=linear), _paths_hint(layer)
                    )
                if is_linear(layer.get_submodule(one.output)):
                    inside = one.output in one.linears
                else:
                    inside = linear.startswith(f"{one.output}.")
                if not inside:
                    outside = "{blocks}: {linear!r} is not inside {output!r}, the output of its block"
                    raise SettingsError(message(outside, linear=linear, output=one.output), OUTPUT_HINT)


def _stands_for(pattern: list[str], name: str) -> bool:
    return name == pattern[0] if len(pattern) == 1 else name.startswith(pattern[0]) and name.endswith(pattern[1])


def _paths_hint(layer: nn.Module) -> str:
    return f"a layer has {', '.join(name for name, module in layer.named_modules() if is_linear(module))}"


def check_layers(model: nn.Module, path: str) -> str:
    """The path of the decoder layers, as it was given.

    Raises:
        SettingsError: there is no list of modules.
    """
    try:
        found = model.get_submodule(path)
    except AttributeError:
        found = None
    if not isinstance(found, nn.ModuleList):
        lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        raise SettingsError(
            message("{layers} is not a list of layers", layers=SettingName("layers", path)),
            f"lists are: {', '.join(lists[:20])}" if lists else "",
        )
    return path


def check_flow(skeleton: Skeleton, hidden: Tensor) -> None:
    """Refuse blocks that a layer does not compute in their order, or whose linears do not lead to their output.

    Args:
        skeleton: with these blocks; it has embedded one sequence of `stepping.TOKENS` tokens.
        hidden: what its first layer is given, (1, tokens, hidden).

    Raises:
        SettingsError: a layer does otherwise.
    """
    for index in first_of_each_kind(skeleton.layers):
        outputs = [block.output for block in skeleton.blocks[index]]
        run = run_layer(skeleton, index, hidden)
        computed = sorted(outputs, key=lambda output: run.order.get(output, -1))
        if computed != outputs:
            raise SettingsError(
                message("{blocks}: layer {index} computes {order}", index=index, order=", then ".join(computed)),
                "give the blocks in this order",
            )
        for block in skeleton.blocks[index]:
            for linear in run.without_effect(block.linears, run.states.get(block.output)):
                unused = "{blocks}: {output!r} does not depend on {linear!r}"
                raise SettingsError(message(unused, output=block.output, linear=linear), OUTPUT_HINT)
