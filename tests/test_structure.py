"""The layout: the order of rooms, what a pure room may import, what the package makes public."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import llm_barber

PACKAGE = Path(llm_barber.__file__).parent
# A room imports from the rooms before it, from itself and from the root.
ROOMS = (
    "native", "masking", "checkpoint", "parallel", "text", "model", "settings", "record", "loading",
    "evaluation", "page", "method", "run", "planning", "runtime", "comparison", "tools", "cli",
)  # fmt: skip
ROOT_MODULES = {"__init__", "__main__", "errors", "messages", "progress", "usage"}
# Rooms without mathematics or without files import none of these.
FORBIDDEN = {
    "checkpoint": ("llm_barber.masking",),
    "model": ("llm_barber.checkpoint", "safetensors"),
}
ALLOWED_IN_MASKING = {
    "torch", "torch.nn.functional", "numpy", "collections.abc", "dataclasses", "enum", "fractions", "contextlib",
    "typing", "scipy.optimize", "llm_barber.native.borders",
}  # fmt: skip


LONGEST_FUNCTION, MOST_PARAMETERS = 60, 8  # lines; parameters without self and cls
# Functions that may have more parameters, each with the reason.
MANY_PARAMETERS = {
    "runtime/decode_kernel.py:_decode": "a Triton kernel takes every pointer, size and constant as a parameter",
}


def imported_names(path: Path) -> set[str]:
    """Dotted names that a module imports, each with the imported attribute (which may be a module)."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the room"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_modules(room: str) -> set[str]:
    """Dotted names of the modules that a room's modules import."""
    modules = set()
    for path in (PACKAGE / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules.add(node.module or "")
    return modules


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_from_the_rooms_before_it(room: str) -> None:
    later = set(ROOMS[ROOMS.index(room) + 1 :])
    for path in (PACKAGE / room).rglob("*.py"):
        for name in imported_names(path):
            package, *rest = name.split(".")
            if package == "llm_barber" and rest:
                assert rest[0] not in later, f"{path.relative_to(PACKAGE)} imports {name}"
                assert rest[0] in {*ROOMS, *ROOT_MODULES, "__version__"}, (
                    f"{path.relative_to(PACKAGE)} imports {name} by its public name"
                )


def test_the_root_has_no_other_modules() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == ROOT_MODULES
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms == set(ROOMS)


def test_masking_imports_torch_and_itself() -> None:
    others = {name for name in imported_modules("masking") if not name.startswith("llm_barber.masking")}
    assert others <= ALLOWED_IN_MASKING


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_pure_room_stays_pure(room: str) -> None:
    assert not any(name.startswith(FORBIDDEN[room]) for name in imported_modules(room))


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function of the package, as "file:name"."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path.relative_to(PACKAGE).as_posix()}:{node.name}", node


def test_functions_are_short() -> None:
    lengths = [(name, (node.end_lineno or 0) - node.lineno + 1) for name, node in functions()]
    assert [(name, length) for name, length in lengths if length > LONGEST_FUNCTION] == []


def test_functions_have_few_parameters() -> None:
    long = set()
    for name, node in functions():
        parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        if sum(parameter.arg not in ("self", "cls") for parameter in parameters) > MOST_PARAMETERS:
            long.add(name)
    assert long == set(MANY_PARAMETERS)


def test_public_names() -> None:
    assert all(getattr(llm_barber, name) is not None for name in llm_barber.__all__)
    assert set(llm_barber.__all__) == {
        "BarberError", "CompareConfig", "Comparison", "ConvertConfig", "ConvertReport", "EvaluateConfig",
        "Evaluation", "Forecast", "GenerateConfig", "Generation", "HeldZeros", "HoldZeros", "InspectConfig",
        "Inspection", "PackConfig", "PackReport", "PackedConfig", "PlanConfig", "PruneConfig", "RebuildConfig",
        "ReportConfig", "RunReport", "UnpackConfig", "compare", "convert", "evaluate", "generate", "hold_zeros",
        "inspect", "load", "merge_adapter", "pack", "plan", "prune", "rebuild", "register", "report", "save_finetuned",
        "unpack",
    }  # fmt: skip


SLOW_TO_IMPORT = (
    "torch", "transformers", "huggingface_hub", "numpy", "matplotlib", "yaml", "rich.markdown", "typer.rich_utils",
)  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0), (["--version"], 0), (["prune", "--help"], 0), (["--nothing"], 2), (["prune", "--nothing"], 2),
        (["prune", "model", "out", "--guard=2"], 2), (["demo", "--windows=0"], 2),
        (["generate", "m", "p", "--temperature=-1"], 2),
    ],
)  # fmt: skip
def test_help_and_wrong_options_do_not_wait_for_slow_imports(arguments: list[str], code: int) -> None:
    script = (
        "import sys, llm_barber.cli\n"
        f"code = llm_barber.cli._main({arguments})\n"
        f"print(code, [name for name in {SLOW_TO_IMPORT} if name in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stderr.splitlines()[-1] == f"{code} []"


def test_benchmarks_go_on_with_the_results_that_are_kept() -> None:
    """Cells have their marker in a fresh clone, too: without it their folder is refused as somebody else's."""
    kept = {path.parent for path in (PACKAGE.parents[1] / "benchmarks" / "results").glob("*/cells")}
    assert kept
    assert all((folder / "COMPARISON.txt").is_file() for folder in kept)
