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
module, name, kinds, constants, divisible, capability = json.loads(sys.argv[1])
kernel = getattr(importlib.import_module(module), name)
kinds |= dict.fromkeys(constants, "constexpr")
ordered = {name: kinds[name] for name in kernel.arg_names}
attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible}
source = ASTSource(fn=kernel, signature=ordered, constexprs=constants, attrs=attributes)
print(get_sass(triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]))
"""


@dataclass(frozen=True)
class MachineCode:
    """Instructions of a compiled kernel, by name, for example `LDG.E.U16`; without what pads its end."""

    names: tuple[str, ...]

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


def compile_kernel(
    kernel: ModuleType,
    name: str,
    kinds: dict[str, str],
    constants: dict[str, Any],
    capability: int,
    cache: Path,
) -> MachineCode:
    """Compile a kernel for a GPU that is not there, in a process without Triton's interpreter.

    Args:
        kernel: its module.
        name: the kernel's name in it.
        kinds: type of each argument, for example `*bf16`; pointers are multiples of 16 bytes, as PyTorch's are.
        constants: compile-time arguments.
        capability: compute capability, 90 for 9.0.
        cache: folder of Triton's files.
    """
    divisible = [argument for argument, kind in kinds.items() if kind.startswith("*") or argument == "columns"]
    described = json.dumps([kernel.__name__, name, kinds, constants, divisible, capability])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", COMPILE, described]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    names = re.findall(r"^\S+\t(?:@!?U?P\w+ )?([A-Z][\w.]*)", result.stdout, re.MULTILINE)
    end = names.index("BRA", len(names) - 1 - names[::-1].index("EXIT")) if "BRA" in names else len(names)
    return MachineCode(tuple(names[:end]))


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
