"""Targets of linears (a sparsity, N:M, or not pruned), and the files that give targets and blocks."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_barber.errors import ModelError, SettingsError
from llm_barber.masking.pattern import NofM, Pattern, Unstructured, parse_pattern
from llm_barber.messages import SettingName, message
from llm_barber.model.architecture import Block

EXAMPLE = r"'mlp\.down_proj$': 0.4"


def parse_target(value: Any, over_linear: bool = False) -> Pattern | None:
    """A sparsity (of each comparison group, or over the linear), "N:M", or 0: not pruned.

    Raises:
        ValueError: the value is none of these.
    """
    if isinstance(value, str) and ":" in value:
        return parse_pattern(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is neither a sparsity (0.4) nor N:M (2:4) nor 0")
    return Unstructured(value, over_linear) if value else None


def read_targets(value: Any) -> Any:
    """Targets by regular expressions or layer numbers, from a YAML file or a mapping; other values stay as they are.

    Raises:
        ValueError: the file cannot be read, or is no such mapping.
    """
    if isinstance(value, dict):
        return {str(name): target for name, target in value.items()}
    if not isinstance(value, str | Path):
        return value
    from llm_barber.settings.yaml_file import read_yaml  # most runs read no YAML: the command line starts faster

    targets = read_yaml(value)
    if not isinstance(targets, dict):
        raise ValueError(f"{value} is not a mapping of names to sparsities, a line each like {EXAMPLE}")
    for name, target in targets.items():
        if not isinstance(target, str):
            raise ValueError(f"{value}: {name} is given a list or a mapping, not a sparsity, as in {EXAMPLE}")
    return {str(name): _number(target) for name, target in targets.items()}


def read_blocks(path: Path) -> tuple[Block, ...]:
    """Blocks from a YAML file: `NAME: {output: PATH, linears: [PATH, …]}` each, paths inside a layer, `*` for experts.

    Raises:
        ValueError: the file does not describe blocks.
    """
    how = "write for each block, in the order of computation: NAME: {output: PATH, linears: [PATH, …]}"
    from llm_barber.settings.yaml_file import read_yaml

    content = read_yaml(path)
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} does not describe blocks: {how}")
    for name, value in content.items():
        if problem := _block_problem(value):
            raise ValueError(f"{path}: block {name} {problem}; {how}")
    return tuple(Block(str(name), block["output"], tuple(block["linears"])) for name, block in content.items())


def _block_problem(value: Any) -> str | None:
    """Say what is wrong with the description of a block, as a verb and its object; None: nothing."""
    if not isinstance(value, dict):
        return "is not a mapping"
    if value.keys() != {"output", "linears"}:
        return f"has {', '.join(map(str, value)) or 'nothing'}, and needs output and linears"
    if not isinstance(value["output"], str):
        return "has an output that is not a path"
    linears = value["linears"]
    if not isinstance(linears, list) or not all(isinstance(linear, str) for linear in linears):
        return "has linears that are not a list of paths"
    return None if linears else "has no linears"


def _number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def _is_number(expression: str) -> bool:
    return re.fullmatch(r"0|-?[1-9]\d{0,8}", expression) is not None


def _means(expression: str, index: int, name: str, layers: int) -> bool:
    """True if the expression fits the linear `name` of layer `index`; a number means a layer, -1 the last."""
    if _is_number(expression):
        return index < layers and int(expression) in (index, index - layers)
    return re.search(expression, name) is not None


def compile_names(expressions: Sequence[str]) -> list[re.Pattern[str]]:
    """Regular expressions of linears' names.

    Raises:
        ValueError: an expression is not a valid regular expression.
    """
    compiled = []
    for expression in expressions:
        try:
            compiled.append(re.compile(expression))
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{expression!r} is not a regular expression: {error}") from error
    return compiled


@dataclass(frozen=True)
class Targets:
    """Sparsity or N:M of each linear.

    Args:
        pattern: target of linears that no other argument gives one.
        include: regular expressions; a linear is pruned only if one of them matches its name. Empty: all are pruned.
        exclude: regular expressions; a linear is not pruned if one of them matches its name.
        skip_layers: decoder layers that are not pruned; negative numbers count from the end.
        exceptions: targets of linears, by a regular expression of the name, or the number of a decoder layer: "N:M", a
            sparsity, or 0. The first match counts.
        allocated: sparsities of linears by their names, in place of `pattern`'s.
        allow_dense_tail: M need not divide a row: the inputs after its last whole group stay dense.
        over_linear: sparsities are met over the linear, to a weight; not in each comparison group, as the published
            programs have it. Allocated ones are so anyway.
    """

    pattern: Pattern
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    skip_layers: tuple[int, ...] = ()
    exceptions: dict[str, float | str] = field(default_factory=dict)
    allocated: dict[str, float] | None = None
    allow_dense_tail: bool = False
    over_linear: bool = False

    def of(self, index: int, name: str, layers: int) -> Pattern | None:
        """The target of a linear; None: it is not pruned.

        Args:
            index: of its decoder layer; the number of layers for the output head, which is pruned like the others
                unless it has a target of its own.
            name: of the linear in the model, as `model.layers.0.mlp.up_proj`.
            layers: how many decoder layers there are.
        """
        if index < layers and self._left_out(index, name, layers):
            return None
        for expression, value in self.exceptions.items():
            if _means(expression, index, name, layers):
                return parse_target(value, self.over_linear)
        if self.allocated is not None and index < layers:
            return parse_target(self.allocated[name], over_linear=True)
        if isinstance(self.pattern, NofM):
            return self.pattern
        return parse_target(self.pattern.sparsity, self.over_linear)

    def _left_out(self, index: int, name: str, layers: int) -> bool:
        if index in self.skip_layers or index - layers in self.skip_layers:
            return True
        if self.include and not any(regex.search(name) for regex in compile_names(self.include)):
            return True
        return any(regex.search(name) for regex in compile_names(self.exclude))

    def check(self, shapes: Sequence[dict[str, tuple[int, ...]]], head: dict[str, tuple[int, ...]]) -> None:
        """Refuse targets that fit no linear of the model.

        Args:
            shapes: of each decoder layer's linears, by the names of the linears in the model.
            head: of the output head, if it is to be pruned.

        Raises:
            SettingsError: an expression is found in no name, a layer is not there, or nothing is left to prune.
            ModelError: M does not divide a row, or is longer than one.
        """
        layers = len(shapes)
        names = [name for layer in (*shapes, head) for name in layer]
        kinds = dict.fromkeys(re.sub(r"\.\d+\.", ".0.", name) for name in names)
        example = f"names look like {', '.join(list(kinds)[:12])}"
        without_head = example if head else f"{example}; the output head is pruned with --prune-head only"
        for setting, expressions in (
            ("include", self.include),
            ("exclude", self.exclude),
            ("sparsities", self.exceptions),
        ):
            for expression in expressions:
                if setting == "sparsities" and _is_number(expression):
                    self._check_layer(setting, int(expression), layers)
                elif not any(re.search(expression, name) for name in names):
                    hint = without_head if "head" in expression else example
                    missing = "{setting}: no linear's name matches {expression!r}"
                    raise SettingsError(message(missing, setting=SettingName(setting), expression=expression), hint)
        for name in head:
            if self.of(layers, name, layers) is None or any(re.search(expression, name) for expression in self.exclude):
                raise SettingsError(
                    f"--prune-head prunes {name}, and another setting leaves it out", "leave out one of the two"
                )
        numbers = [int(expression) % layers for expression in self.exceptions if _is_number(expression)]
        if len(numbers) > len(set(numbers)):
            raise SettingsError(message("{sparsities} names one layer twice"), f"-1 is layer {layers - 1}")
        for index in self.skip_layers:
            self._check_layer("skip_layers", index, layers)
        selected = 0
        for index, layer in enumerate((*shapes, head)):
            for name, shape in layer.items():
                target = self.of(index, name, layers)
                selected += target is not None
                if isinstance(target, NofM):
                    otherwise = "leave out --prune-head" if index == layers else "leave the linear out with --exclude"
                    self._check_groups(name, shape[1], target, otherwise)
        if not selected:
            nothing = "{include}, {exclude}, {skip_layers} and {sparsities} leave nothing to prune"
            raise SettingsError(message(nothing), example)

    @staticmethod
    def _check_layer(setting: str, index: int, layers: int) -> None:
        if not -layers <= index < layers:
            missing = message("{setting}: there is no decoder layer {index}", setting=SettingName(setting), index=index)
            raise SettingsError(missing, f"the model has decoder layers 0 to {layers - 1}")

    def _check_groups(self, name: str, columns: int, pattern: NofM, otherwise: str) -> None:
        """Refuse rows that are no whole number of groups; `otherwise` says how the linear is not pruned."""
        if columns < pattern.of:
            raise ModelError(f"pattern {pattern} is longer than the {columns} inputs of {name}", otherwise)
        if columns % pattern.of and not self.allow_dense_tail:
            raise ModelError(
                f"pattern {pattern} does not divide the {columns} inputs of {name}",
                f"keep its last {columns % pattern.of} inputs dense with --allow-dense-tail, choose an N:M whose M "
                f"divides every row, {otherwise}, or use --sparsity",
            )
