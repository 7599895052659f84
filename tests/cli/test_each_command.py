"""Each command runs once for real on a tiny model, in this process, and prints or writes what it promises.

`test_cli.py` and `test_cli_errors.py` have the options and the errors; the room of each command tests what it computes.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file
from typer.testing import CliRunner

from llm_barber.cli import app
from llm_barber.evaluation import texts
from llm_barber.record.file import read_record
from llm_barber.text import calibration
from tests.conftest import RELEASED, load_model, read_folder
from tests.helpers.commands import COMMANDS
from tests.helpers.text import add_tokenizer

TEXT = "The barber cuts what is too long, and leaves the rest as it grew. " * 40
SIZE = ("--samples", "2", "--seqlen", "16")
WEIGHTS = 18432  # of the linears
ELSEWHERE = {"demo", "generate"}  # commands that files of their own run


@dataclass(frozen=True)
class Models:
    """Folders that the commands read and write; `pruned` is what `prune` made of `dense`."""

    dense: Path
    pruned: Path
    prune_output: str
    text: Path
    folder: Path


def run(*arguments: object) -> Result:
    """Run a command that succeeds: its output on stdout, its progress on stderr."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    assert result.exit_code == 0
    return result


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    """The tiny model, with a tokenizer of one token a character, before and after pruning, beside a short text.

    The short text stands for the package's long ones, too, which take seconds with such a tokenizer.
    """
    folder = tmp_path_factory.mktemp("commands")
    dense, pruned = folder / "dense", folder / "pruned"
    shutil.copytree(RELEASED / "llama" / "dense", dense)
    add_tokenizer(dense)
    text = folder / "text.txt"
    text.write_text(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        for module in (calibration, texts):
            patch.setattr(module, "read_text", lambda *_: TEXT)
        output = run("prune", dense, pruned, *SIZE, "--sparsity", "0.5").stdout
        yield Models(dense, pruned, output, text, folder)


def prune(models: Models) -> None:
    assert f"{WEIGHTS // 2:,} of {WEIGHTS:,} weights pruned (50.00%)" in models.prune_output
    record = read_record(models.pruned)
    assert record is not None
    assert record.sparsity == 0.5
    dense, pruned = read_folder(models.dense), read_folder(models.pruned)
    assert all(tensor.equal(dense[name] * (tensor != 0)) for name, tensor in pruned.items())
    load_model(models.pruned)


def rebuild(models: Models) -> None:
    out = models.folder / "rebuilt"
    shown = run("rebuild", models.dense, models.pruned, out, *SIZE, "--rebuild-ratio", "0.5").stdout
    assert "weights pruned (50.00%)" in shown
    before, after = read_folder(models.pruned), read_folder(out)
    moved = sum(int(((before[name] == 0) & (after[name] != 0)).sum()) for name in before)
    record = read_record(out)
    assert record is not None
    assert moved == record.swapped > 0


def plan(models: Models) -> None:
    forecast = json.loads(run("plan", models.dense, *SIZE, "--json").stdout)
    shown = run("plan", models.dense / "config.json", *SIZE, "--tflops", "1").stdout
    assert forecast["weights"] == WEIGHTS
    assert {"pruning", "looking for what pruning costs"} <= set(forecast["expected"]["stages"])
    for words in (f"{WEIGHTS:,} of them prunable", "FLOPs of matrix products", "time: at least"):
        assert words in shown


def inspect(models: Models) -> None:
    shown = run("inspect", models.pruned, "--dense", models.dense).stdout
    assert "agrees with its record and" in shown
    inspection = json.loads(run("inspect", models.pruned, "--json").stdout)
    assert inspection["sparsity"] == 0.5
    assert inspection["problems"] == []


def pack(models: Models) -> None:
    packed = models.folder / "packed"
    shown = run("pack", models.pruned, packed).stdout
    assert "packed matrices: 14 as " in shown
    files = [path for path in packed.iterdir() if path.suffix == ".safetensors"]
    assert sum(path.stat().st_size for path in files) < sum(
        path.stat().st_size for path in models.pruned.glob("*.safetensors")
    )


def unpack(models: Models) -> None:
    packed, out = models.folder / "to-unpack", models.folder / "unpacked"
    run("pack", models.pruned, packed)
    run("unpack", packed, out)
    for path in models.pruned.glob("*.safetensors"):
        assert (out / path.name).read_bytes() == path.read_bytes()


def convert(models: Models) -> None:
    pickled, out = models.folder / "pickled", models.folder / "converted"
    shutil.copytree(models.dense, pickled)
    tensors = load_file(pickled / "model.safetensors")
    (pickled / "model.safetensors").unlink()
    torch.save(tensors, pickled / "pytorch_model.bin")
    shown = run("convert", pickled, out).stdout
    assert f": {len(tensors)} tensors, " in shown
    written = read_folder(out)
    assert written.keys() == tensors.keys()
    assert all(written[name].equal(tensor) for name, tensor in tensors.items())


def evaluate(models: Models) -> None:
    options = ("--text", models.text, "--windows", "2", "--seqlen", "16", "--against", models.dense)
    (of_text,) = json.loads(run("evaluate", models.pruned, *options, "--json").stdout)["texts"]
    assert (of_text["windows"], of_text["seqlen"]) == (2, 16)
    assert of_text["against"]["divergence"] > 0
    shown = run("evaluate", models.pruned, *options).stdout
    assert f"{of_text['perplexity']:.3f}" in shown


def compare(models: Models) -> None:
    out = models.folder / "compared"
    options = ("--text", models.text, "--windows", "2", "--text-seqlen", "16", *SIZE, "--no-rebuild")
    shown = run("compare", models.dense, out, "--methods", "magnitude,wanda", "--targets", "0.5", *options).stdout
    assert "magnitude" in shown
    assert "Wanda" in shown
    assert "could not be done" not in shown
    table = (out / "comparison.md").read_text()
    assert "| magnitude" in table
    assert "| Wanda" in table
    assert (out / "comparison.html").is_file()


def report(models: Models) -> None:
    page = models.folder / "page.html"
    shown = run("report", models.pruned, "--output", page).stdout
    assert shown.strip() == str(page)
    assert "50.00" in page.read_text()


RUNS: dict[str, Callable[[Models], None]] = {
    check.__name__: check for check in (prune, rebuild, plan, inspect, pack, unpack, convert, evaluate, compare, report)
}


def test_each_command_is_here() -> None:
    assert RUNS.keys() == COMMANDS.keys() - ELSEWHERE


@pytest.mark.parametrize("command", RUNS)
def test_it_runs(command: str, models: Models) -> None:
    RUNS[command](models)
