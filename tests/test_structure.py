"""What the layout promises: masking is pure, checkpoint knows no masks, files stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import llm_barber

PACKAGE = Path(llm_barber.__file__).parent


def imports(folder: str) -> set[str]:
    found = set()
    for path in (PACKAGE / folder).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0
                found.add(node.module or "")
    return found


def test_masking_imports_torch_and_itself() -> None:
    allowed = {
        "torch",
        "torch.nn.functional",
        "numpy",
        "collections.abc",
        "dataclasses",
        "enum",
        "fractions",
        "contextlib",
        "typing",
    }
    others = {name for name in imports("masking") if not name.startswith("llm_barber.masking.")}
    assert others <= allowed


def test_checkpoint_knows_no_masks_and_no_modules() -> None:
    names = imports("checkpoint")
    assert not any(name.startswith(("llm_barber.masking", "llm_barber.model")) for name in names)


def test_model_reads_no_files() -> None:
    names = imports("model")
    assert not any(name.startswith(("llm_barber.checkpoint", "safetensors")) for name in names)


def test_public_names() -> None:
    assert all(getattr(llm_barber, name) is not None for name in llm_barber.__all__)
    assert set(llm_barber.__all__) == {
        "BarberError", "CompareConfig", "Comparison", "EvaluateConfig", "Evaluation", "InspectConfig", "Inspection",
        "PackConfig", "PackReport", "PruneConfig", "RebuildConfig", "RunReport", "compare", "evaluate", "inspect",
        "load", "pack", "prune", "rebuild", "unpack",
    }  # fmt: skip


def test_help_does_not_wait_for_transformers() -> None:
    code = "import sys, llm_barber.cli; print('transformers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_benchmarks_go_on_with_the_results_that_are_kept() -> None:
    """In a fresh clone, too: a folder of cells without its marker is refused as somebody else's."""
    kept = {path.parent for path in (PACKAGE.parents[1] / "benchmarks" / "results").glob("*/cells")}
    assert kept
    assert all((folder / "COMPARISON.txt").is_file() for folder in kept)
