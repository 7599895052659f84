"""Triton's kernels without a GPU: where they are launched, and the machine code that the compiler makes of them."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

COMPILE = """
import importlib, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.disasm import get_sass
DTYPES = triton.language.dtype.SINT_TYPES + triton.language.dtype.FP_TYPES
for module, name, kinds, constants, capability, warps, multiples in json.loads(sys.argv[1]):
    kernel = getattr(importlib.import_module(module), name)
    constants |= {key: triton.language.dtype(value) for key, value in constants.items() if value in DTYPES}
    ordered = {name: kinds.get(name, "constexpr") for name in kernel.arg_names}
    divisible = [number for number, name in enumerate(ordered) if ordered[name].startswith("*") or name in multiples]
    attributes = {(number,): [["tt.divisibility", 16]] for number in divisible}
    source = ASTSource(fn=kernel, signature=ordered, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    print(get_sass(compiled.asm["cubin"]), end="=====\\n")
"""


@dataclass(frozen=True)
class Source:
    """A kernel and what it is compiled for.

    `kinds`: type of each argument, for example `*bf16`; pointers are multiples of 16. `constants`: compile-time
    arguments; the name of a dtype is the dtype. `capability`: compute capability, 90 for 9.0. `multiples`: numbers that
    are multiples of 16.
    """

    module: ModuleType
    name: str
    kinds: dict[str, str]
    constants: dict[str, Any]
    capability: int
    warps: int
    multiples: tuple[str, ...] = ("columns",)


@dataclass(frozen=True)
class MachineCode:
    """Instructions of a compiled kernel, by name, for example `LDG.E.U16`; without what pads its end."""

    names: tuple[str, ...]
    loops: tuple[tuple[int, int], ...] = ()  # first and last instruction of each loop

    def count(self, *beginnings: str) -> int:
        """Count the instructions whose names begin so."""
        return sum(name.startswith(beginnings) for name in self.names)

    @property
    def spills(self) -> int:
        """Number of loads and stores of registers that did not fit."""
        return self.count("LDL", "STL")

    @property
    def barriers(self) -> int:
        """Number of barriers of a whole program."""
        return self.count("BAR")

    @property
    def loop(self) -> "MachineCode":
        """The longest loop; all instructions where there is none."""
        first, last = max(self.loops, key=lambda loop: loop[1] - loop[0], default=(0, len(self.names) - 1))
        return MachineCode(self.names[first : last + 1])


def compile_kernels(sources: list[Source], cache: Path) -> list[MachineCode]:
    """Compile kernels for GPUs that are not there, in a process without Triton's interpreter.

    Args:
        sources: what to compile.
        cache: folder of Triton's files.
    """
    described = json.dumps(
        [
            [
                source.module.__name__,
                source.name,
                source.kinds,
                source.constants,
                source.capability,
                source.warps,
                source.multiples,
            ]
            for source in sources
        ]
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", COMPILE, described]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [parse(text) for text in result.stdout.split("=====\n")[:-1]]


def parse(text: str) -> MachineCode:
    """Read machine code as Triton prints it: labels, and instructions behind a tab."""
    names: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in text.splitlines():
        label = re.match(r"(LBB\d+):", line)
        if label:
            labels[label[1]] = len(names)
        instruction = re.match(r"\S+\t(?:@!?U?P\w+ )?([A-Z][\w.]*)(.*)", line)
        if instruction:
            target = re.search(r"(LBB\d+);", instruction[2])
            if instruction[1].startswith("BRA") and target and target[1] in labels:
                loops.append((labels[target[1]], len(names)))
            names.append(instruction[1])
    # Behind the end the code is padded: a branch to itself, and nothing.
    padding = [first for first, last in loops if first == last]
    end = padding[-1] if padding else len(names)
    return MachineCode(tuple(names[:end]), tuple(loop for loop in loops if loop[1] < end))


def launches(monkeypatch: pytest.MonkeyPatch, kernel: ModuleType, name: str) -> list[Any]:
    """List that gets `launch` for each launch of a kernel, and the tensor whose device is current before and after."""
    events: list[Any] = []

    class Recorded:
        def __getitem__(self, _: Any) -> Callable[..., None]:
            return lambda *_, **__: events.append("launch")

    @contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        events.append(tensor)
        yield
        events.append(tensor)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(kernel, name, Recorded())
    return events
