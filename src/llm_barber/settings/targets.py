"""Targets of linears (a sparsity, N:M, or not pruned), and the YAML files that give targets and blocks."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_barber.checkpoint.untrusted import check_regular
from llm_barber.errors import ModelError, SettingsError
from llm_barber.masking.pattern import NofM, Pattern, Unstructured, parse_pattern
from llm_barber.model.architecture import Block

EXAMPLE = r"'mlp\.down_proj$': 0.4"


def parse_target(value: Any, over_linear: bool = False) -> Pattern | None:
    """A sparsity (of each comparison group, or over the linear), "N:M", or 0: not pruned.

    Raises:
        ValueError: the value is none of these.
    """
    if isinstance(value, str) and ":" in value:
        return parse_pattern(value)
    try:
        sparsity = float(value)
    except (TypeError, ValueError):
        sparsity = None
    if sparsity is None or isinstance(value, bool):
        raise ValueError(f"{value!r} is neither a sparsity (0.4) nor N:M (2:4) nor 0")
    return Unstructured(sparsity, over_linear) if sparsity else None


def read_yaml(path: str | Path) -> dict[Any, Any]:
    """A mapping from a YAML file; all its scalars are text, as YAML reads 2:4 as a number of base 60.

    Raises:
        ValueError: the file cannot be read, has a key twice, or holds no mapping.
    """
    import yaml  # most runs read no YAML: the command line starts faster

    class DistinctKeys(yaml.BaseLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            for key, count in Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)).items():
                if count > 1:
                    raise yaml.YAMLError(f"{key} is there twice")
            return dict(super().construct_mapping(node, deep))

    try:
        file = Path(path).expanduser()
        check_regular(file, SettingsError)
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=DistinctKeys)
    except (OSError, ValueError, RuntimeError, SettingsError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a mapping, a line each like {EXAMPLE}")
    return content


def read_targets(value: Any) -> Any:
    """Targets by regular expressions or layer numbers, from a YAML file or a mapping; other values stay as they are.

    Raises:
        ValueError: the file cannot be read, an expression is none, or a target is none.
    """
    if not isinstance(value, str | Path | dict):
        return value
    targets = value if isinstance(value, dict) else read_yaml(value)
    compile_names([str(name) for name in targets])
    for name, target in targets.items():
        try:
            parse_target(target)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return {
        str(name): float(target) if isinstance(target, str) and ":" not in target else target
        for name, target in targets.items()
    }


def read_blocks(path: Path) -> tuple[Block, ...]:
    """Blocks from a YAML file: `NAME: {output: PATH, linears: [PATH, …]}` each, paths inside a layer, `*` for experts.

    Raises:
        ValueError: the file does not describe blocks.
    """
    how = "write for each block, in the order of computation: NAME: {output: PATH, linears: [PATH, …]}"
    blocks = read_yaml(path)
    if not blocks:
        raise ValueError(f"{path} does not describe blocks: {how}")
    for name, block in blocks.items():
        right = isinstance(block, dict) and block.keys() == {"output", "linears"} and isinstance(block["output"], str)
        linears = block["linears"] if right else None
        if not linears or not isinstance(linears, list) or not all(isinstance(linear, str) for linear in linears):
            raise ValueError(f"{path}: block {name} is not described: {how}")
    return tuple(Block(str(name), block["output"], tuple(block["linears"])) for name, block in blocks.items())


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


def _is_number(expression: str) -> bool:
    return re.fullmatch(r"0|-?[1-9]\d{0,8}", expression) is not None


def _matches(expressions: Iterable[str], name: str) -> bool:
    return any(re.search(expression, name) for expression in expressions)


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
        is_head = index == layers
        if not is_head and self._leaves_out(index, name, layers):
            return None
        for expression, value in self.exceptions.items():
            of_layer = _is_number(expression) and not is_head and int(expression) in (index, index - layers)
            if of_layer or (not _is_number(expression) and re.search(expression, name)):
                return parse_target(value, self.over_linear)
        if self.allocated is not None and not is_head:
            return parse_target(self.allocated[name], over_linear=True)
        return self.pattern if isinstance(self.pattern, NofM) else Unstructured(self.pattern.sparsity, self.over_linear)

    def _leaves_out(self, index: int, name: str, layers: int) -> bool:
        skipped = not {index, index - layers}.isdisjoint(self.skip_layers)
        return skipped or (bool(self.include) and not _matches(self.include, name)) or _matches(self.exclude, name)

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
        self._check_layers(layers)
        example = self._check_names([name for layer in (*shapes, head) for name in layer], bool(head))
        for name in head:
            if self.of(layers, name, layers) is None or _matches(self.exclude, name):
                raise SettingsError(
                    f"--prune-head prunes {name}, and another setting leaves it out", "leave out one of the two"
                )
        selected = 0
        for index, layer in enumerate((*shapes, head)):
            for name, shape in layer.items():
                target = self.of(index, name, layers)
                selected += target is not None
                if isinstance(target, NofM):
                    otherwise = "leave out --prune-head" if index == layers else "leave the linear out with --exclude"
                    self._check_groups(name, shape[1], target, otherwise)
        if not selected:
            raise SettingsError(
                "--include, --exclude, --skip-layers and --sparsities leave nothing to prune", f"names are {example}"
            )

    def _check_layers(self, layers: int) -> None:
        """Refuse numbers of layers that are not there, or that name one layer twice."""
        numbers = [int(expression) for expression in self.exceptions if _is_number(expression)]
        for option, indices in (("--sparsities", numbers), ("--skip-layers", self.skip_layers)):
            for index in indices:
                if not -layers <= index < layers:
                    there = f"the model has decoder layers 0 to {layers - 1}"
                    raise SettingsError(f"{option}: there is no decoder layer {index}", there)
        if len(numbers) > len({index % layers for index in numbers}):
            raise SettingsError("--sparsities names one layer twice", f"-1 is layer {layers - 1}")

    def _check_names(self, names: Sequence[str], has_head: bool) -> str:
        """Refuse expressions that match no name; returns examples of names."""
        kinds = dict.fromkeys(re.sub(r"\.\d+\.", ".0.", name) for name in names)
        example = ", ".join(list(kinds)[:12])
        options = {"--include": self.include, "--exclude": self.exclude, "--sparsities": self.exceptions}
        for option, expressions in options.items():
            for expression in expressions:
                is_layer = option == "--sparsities" and _is_number(expression)
                if not is_layer and not any(re.search(expression, name) for name in names):
                    head = "" if has_head or "head" not in expression else "; the output head needs --prune-head"
                    raise SettingsError(
                        f"{option}: no linear's name matches {expression!r}", f"names look like {example}{head}"
                    )
        return example

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
