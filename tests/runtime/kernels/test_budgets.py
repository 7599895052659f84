"""Budgets of the kernels' machine code, for the oldest and the newest generation of GPUs, neither of which is needed.

In the time in which it reads a dense weight of 16 bits, an H100 executes 17 instructions, an A100 20, an RTX 4090 80:
with more, a kernel cannot win, however few bytes it reads. Instructions are counted in the loop over columns, for each
weight of the matrix, kept or pruned.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

if sys.platform != "linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

from llm_barber.runtime.kernels import decode, decode_rows, unpack
from tests.helpers.kernels import MachineCode, Source, compile_kernels, parse

CAPABILITIES = (80, 90)
CHUNK = 8  # weights for which a lane loads a word of the mask
PLACES = {"words": "*i64", "starts": "*u16", "row_starts": "*i64", "scales": "*bf16"}
SIZES = dict.fromkeys(["tokens", "rows", "columns", "row_words", "groups", "steps"], "i32")


@dataclass(frozen=True)
class Budget:
    """What a kernel may take.

    `kernel`: its name in `module`. `values`: their type. `inputs`: theirs, and of outputs. `constants`: compile-time
    arguments. `instructions`: a weight. `barriers`, `shuffles`: of a program. `wide`: accesses of 16 bytes in the loop.
    `loads`: others for a chunk: its values, its word of the mask and its start.
    """

    module: ModuleType
    kernel: str
    values: str
    inputs: str
    constants: dict[str, Any]
    warps: int
    instructions: float
    barriers: int
    shuffles: int
    wide: int
    loads: float = CHUNK + 2

    def __str__(self) -> str:
        numbers = [str(value) for name, value in self.constants.items() if name in ("height", "lanes")]
        return f"{self.kernel.strip('_')}-{self.values}-{'x'.join(numbers)}"

    @property
    def weights(self) -> int:
        """Number of weights that a lane takes in a step."""
        return int(self.constants["height"] * self.constants["lanes"] * CHUNK / (32 * self.warps))

    def source(self, capability: int) -> Source:
        kinds = {"values": f"*{self.values}", "inputs": f"*{self.inputs}", "bias": f"*{self.inputs}"}
        kinds |= {"outputs": f"*{self.inputs}", "weight": f"*{self.inputs}", "largest": "fp32", **PLACES, **SIZES}
        return Source(self.module, self.kernel, kinds, self.constants, capability, self.warps)


def one_row(values: str, height: int, instructions: float, inputs: str = "bf16") -> Budget:
    """Sums of all lanes at the end: 5 shuffles a row within warps, 2 among 4 warps."""
    constants = {"height": height, "lanes": 128, "group": 128 if values == "i8" else 0, "has_bias": False}
    wide = 2 if inputs == "fp32" else 1  # inputs of a chunk
    loads = CHUNK + 3 if values == "i8" else CHUNK + 2  # a scale
    return Budget(decode, "_decode", values, inputs, constants, 4, instructions, 3, 7 * height, wide, loads)


def some_rows(values: str, instructions: float, barriers: int, inputs: str = "bf16") -> Budget:
    """Two barriers a step, around the tile in shared memory; tiles of the inputs are copied there 16 bytes at once."""
    constants = {"height": 16, "lanes": 16, "together": 16, "group": 128 if values == "i8" else 0, "has_bias": False}
    constants |= {"multiplied": inputs}
    loads = CHUNK + 3  # scales of rows, and the end of the loop
    return Budget(decode_rows, "_decode_rows", values, inputs, constants, 2, instructions, barriers, 0, 4, loads)


def unpacking(values: str, instructions: float) -> Budget:
    """No loop: all instructions count. A lane stores 16 bytes of each of its rows at once."""
    constants = {"height": unpack.HEIGHT, "lanes": unpack.LANES, "group": 128 if values == "i8" else 0}
    inputs = "bf16" if values == "i8" else values
    loads = 2 * CHUNK + 3 if values == "i8" else CHUNK + 3  # a scale for each weight, since a group may be of any size
    return Budget(unpack, "_unpack", values, inputs, constants, 4, instructions, 0, 0, 2, loads)


BUDGETS = [
    one_row("bf16", 4, 13),
    one_row("bf16", 1, 15),
    one_row("fp16", 4, 13.5, "fp16"),
    one_row("fp32", 4, 12, "fp32"),
    one_row("i8", 4, 16.5),
    some_rows("bf16", 14, 4),
    some_rows("fp16", 14, 4, "fp16"),
    some_rows("i8", 19.5, 4),
    unpacking("bf16", 15),
    unpacking("i8", 25),
]


def problems(budget: Budget, code: MachineCode) -> dict[str, float]:
    """What a kernel takes beyond its budget."""
    loop, chunks = code.loop, budget.weights // CHUNK
    loads = loop.count("LDG", "LDGSTS") - loop.count("LDG.E.128", "LDGSTS.E.BYPASS.128")
    taken = {
        "spills": (code.spills, 0),
        "barriers": (code.barriers, budget.barriers),
        "shuffles": (code.count("SHFL"), budget.shuffles),
        "instructions a weight": (len(loop.names) / budget.weights, budget.instructions),
        "wide accesses missing": (budget.wide - loop.count("LDG.E.128", "LDGSTS.E.BYPASS.128", "STG.E.128"), 0),
        "stores of less than 16 bytes": (loop.count("STG") - loop.count("STG.E.128"), 0),
        "other loads a chunk": (loads / chunks, budget.loads),
    }
    return {name: amount for name, (amount, most) in taken.items() if amount > most}


def test_kernels_keep_their_budgets(tmp_path: Path) -> None:
    compiled = [(capability, budget) for capability in CAPABILITIES for budget in BUDGETS]
    codes = compile_kernels([budget.source(capability) for capability, budget in compiled], tmp_path)
    beyond = {
        f"{budget}, {capability}": problems(budget, code)
        for (capability, budget), code in zip(compiled, codes, strict=True)
    }
    assert {name: amounts for name, amounts in beyond.items() if amounts} == {}


def test_what_a_budget_finds() -> None:
    """A kernel that spills, waits, and loads twice as much."""
    words = (
        ("LDG.E.64",) * 4 + ("LDG.E.U16",) * 64 + ("LDG.E.128", "STL", "BAR.SYNC", "BAR.SYNC", "BAR.SYNC", "BAR.SYNC")
    )
    found = problems(BUDGETS[0], MachineCode((*words, *["FFMA"] * 400)))
    assert set(found) == {"spills", "barriers", "instructions a weight", "other loads a chunk"}


def test_loops_are_found_in_machine_code() -> None:
    lines = ["--\tMOV R1;", "LBB0:", "--\tFFMA R1;", "--\t@!P0 LDG.E.64 R2;", "--\t@P0 BRA LBB0;", "--\tEXIT;"]
    code = parse("\n".join([*lines, "LBB1:", "--\tBRA LBB1;", "--\tNOP;"]))
    assert code.names == ("MOV", "FFMA", "LDG.E.64", "BRA", "EXIT")
    assert code.loop.names == ("FFMA", "LDG.E.64", "BRA")
