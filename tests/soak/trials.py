"""Trials of a soak: each breaks something and checks the promises of the reference."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llm_barber import InspectConfig, PackConfig, PruneConfig, RebuildConfig, inspect, pack, prune, rebuild, unpack
from llm_barber.checkpoint.digests import with_digest
from tests.conftest import Listener, make_model, save_tokens
from tests.helpers.text import add_tokenizer
from tests.soak.children import Fault, Outcome, run
from tests.soak.damage import damage, edit_json, is_json

COMMON: dict[str, Any] = {"dtype": "float32", "batch_size": 2, "report": False}
RUNS: dict[str, dict[str, Any]] = {
    "mask": {"tune_passes": 1},
    "best": {"preset": "best", "tune_passes": 1, "prune_head": True},
    "paper": {"initial": "wanda", "rebuild_ratio": 0.5},
    "packed": {"initial": "sparsegpt", "rebuild": False, "pattern": "2:4", "format": "packed"},
}
TIMED = {"barber.json", "README.md"}  # with times in them
EXEMPT = {"README.md", "report.html", "evaluation.json"}  # of which a record says nothing
OPERATIONS = 60  # file operations of a run, about


class Soak:
    """The models of a soak, made once; every trial works on copies.

    Args:
        folder: where all of it lies.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.dense = make_model(folder / "dense", "llama", dtype=torch.bfloat16, num_hidden_layers=3)
        add_tokenizer(self.dense)
        self.tokens = save_tokens(folder / "tokens.safetensors")
        for name in RUNS:
            _expect_done(run(lambda listener, name=name: self.prune(name, folder / name, listener)))
        _expect_done(run(lambda _: pack(PackConfig(model=folder / "mask", output=folder / "mask-packed"))))
        rounded = {"model": folder / "mask", "output": folder / "mask-int8", "values": "int8"}
        _expect_done(run(lambda _: pack(PackConfig(**rounded))))
        _expect_done(run(lambda listener: self.rebuild(folder / "paper", folder / "rebuilt", listener)))

    def prune(self, name: str, output: Path, listener: Listener, **settings: Any) -> None:
        """One of `RUNS`."""
        chosen = {**COMMON, **RUNS[name], **settings}
        prune(PruneConfig(model=self.dense, output=output, calibration=self.tokens, **chosen), listener)

    def rebuild(self, pruned: Path, output: Path, listener: Listener, **settings: Any) -> None:
        """The mask of a pruned model."""
        chosen = {**COMMON, **settings}
        config = RebuildConfig(dense=self.dense, pruned=pruned, output=output, calibration=self.tokens, **chosen)
        rebuild(config, listener)

    def copy(self, name: str, to: Path) -> Path:
        """A folder of the soak, with the times of its files."""
        return Path(shutil.copytree(self.folder / name, to / name))


def killed_run(soak: Soak, work: Path, chance: random.Random) -> str:
    """Kill a run up to three times, damage what it left, and resume: the same bytes, or a refusal."""
    name = chance.choice(list(RUNS))
    output, notes, damages = work / "out", [name], []
    for _ in range(chance.randint(1, 3)):
        number = chance.randint(1, OPERATIONS)
        outcome = run(lambda listener: soak.prune(name, output, listener, resume=True), kill_at=number)
        notes.append(f"operation {number}: {outcome.kind}")
        left = sorted(path for path in work.glob("out.partial/*.*") if path.is_file() and path.suffix != ".lock")
        if not left or chance.random() < 0.3:
            continue
        state = output.with_name("out.partial") / "state.json"
        if state in left and chance.random() < 0.7:
            damages.append(edit_json(state, chance) if is_json(state) else damage(state, chance))
        else:
            damages.append(damage(chance.choice(left), chance))
        notes.append(damages[-1])
    outcome = run(lambda listener: soak.prune(name, output, listener, resume=True))
    if not outcome.done:
        notes.append(f"refused: {outcome.words}")
        if len(damages) < 2 and "state.json is damaged" not in outcome.words:
            raise Fault(f"{', '.join(notes)}: one damaged file that is not the state is no reason")
        _expect_done(run(lambda listener: soak.prune(name, output, listener, overwrite=True)), notes)
    _expect_same(soak.folder / name, output, notes)
    _expect_whole(output, notes)
    return ", ".join(notes)


def finished_output(soak: Soak, work: Path, chance: random.Random) -> str:
    """Change a file of a finished output: `inspect` sees it, and `--resume` never says that nothing is left to do."""
    name = chance.choice(list(RUNS))
    output = soak.copy(name, work)
    path = chance.choice(sorted(path for path in output.iterdir() if path.name not in EXEMPT))
    before = path.read_bytes()
    notes = [name, damage(path, chance)]
    if path.is_file() and path.read_bytes() == before:
        return "nothing was changed"
    noticed = _noticed(output)
    outcome = run(lambda listener: soak.prune(name, output, listener, resume=True))
    if outcome.done and any("nothing is left to do" in warning for warning in outcome.warnings):
        _expect_unpacked(soak, name, output, work, notes)
    elif outcome.done:
        _expect_same(soak.folder / name, output, notes)
    if not noticed and path.name != "packed.index.json":
        _expect_unpacked(soak, name, output, work, notes)
    return ", ".join(notes)


def unknown_file(soak: Soak, work: Path, chance: random.Random) -> str:
    """Add a file to a finished output: `inspect` names it."""
    name = chance.choice([*RUNS, "mask-packed", "mask-int8"])
    output = soak.copy(name, work)
    added = chance.choice(["model-00009-of-00009.safetensors", "modeling.py", "pytorch_model.bin", "vocab.json", "x/y"])
    (output / added).parent.mkdir(exist_ok=True)
    (output / added).write_bytes(b"{}")
    if not _noticed(output):
        raise Fault(f"{added} in {name} was not noticed")
    return f"{added} in {name}"


def packed_folder(soak: Soak, work: Path, chance: random.Random) -> str:
    """Change a packed folder: what it unpacks to is the same, or it is refused."""
    name = chance.choice(["packed", "mask-packed", "mask-int8"])
    output = soak.copy(name, work)
    shards = sorted(output.glob("packed-*"))
    others = sorted(path for path in output.iterdir() if path.name not in EXEMPT and path not in shards)
    path = chance.choice(shards if chance.random() < 0.7 else others)
    notes = [name, damage(path, chance)]
    noticed = _noticed(output)
    if not _expect_unpacked(soak, name, output, work, notes) and not noticed:
        raise Fault(f"{', '.join(notes)}: it cannot be unpacked, and inspect has not noticed")
    return ", ".join(notes)


def edited_record(soak: Soak, work: Path, chance: random.Random) -> str:
    """Edit a record, half of the times with a digest that fits: `inspect` sees every edit without it."""
    name = chance.choice([*RUNS, "mask-packed", "mask-int8", "rebuilt"])
    output = soak.copy(name, work)
    notes = [name, edit_json(output / "barber.json", chance)]
    if chance.random() < 0.3:
        content = json.loads((output / "barber.json").read_text())
        (output / "barber.json").write_text(json.dumps(with_digest(content)))
        notes.append("with a digest that fits")
        _noticed(output)  # what no digest vouches for may pass; nothing may crash
    elif not _noticed(output):
        raise Fault(f"{', '.join(notes)}: not noticed")
    return ", ".join(notes)


def changed_input(soak: Soak, work: Path, chance: random.Random) -> str:
    """Change the pruned model of a finished rebuild: `--resume` refuses, or nothing that it reads has changed."""
    pruned, output = soak.copy("paper", work), work / "rebuilt"
    _expect_done(run(lambda listener: soak.rebuild(pruned, output, listener)))
    path = chance.choice([*sorted(pruned.glob("*.safetensors")), pruned / "config.json", pruned / "barber.json"])
    before = path.read_bytes()
    notes = [damage(path, chance)]
    outcome = run(lambda listener: soak.rebuild(pruned, output, listener, resume=True))
    if outcome.done and not (path.is_file() and path.read_bytes() == before):
        raise Fault(f"{', '.join(notes)}: a rebuild of it was said to be complete")
    return ", ".join(notes)


def damaged_model(soak: Soak, work: Path, chance: random.Random) -> str:
    """Damage a dense model or its calibration tokens: every command works, or says what is wrong."""
    dense = soak.copy("dense", work)
    notes = [damage(chance.choice(sorted(path for path in dense.iterdir() if path.is_file())), chance)]
    tokens = Path(shutil.copy(soak.tokens, work / "tokens.safetensors"))
    if chance.random() < 0.2:
        notes.append(damage(tokens, chance))
    config: dict[str, Any] = {"model": dense, "output": work / "out", "calibration": tokens, **COMMON}
    outcome = run(lambda listener: prune(PruneConfig(**config, initial="wanda", rebuild=False), listener) and None)
    run(lambda _: inspect(InspectConfig(model=dense)) and None)
    if outcome.done:
        _expect_whole(work / "out", notes)
    elif (work / "out").exists():
        raise Fault(f"{', '.join(notes)}: an output is there, although the run was refused")
    return ", ".join(notes)


TRIALS: tuple[Callable[[Soak, Path, random.Random], str], ...] = (
    killed_run, packed_folder, finished_output, edited_record, unknown_file, killed_run, changed_input, damaged_model,
)  # fmt: skip


def _noticed(output: Path) -> bool:
    """Does `inspect` find something wrong?"""
    outcome = run(lambda _: list(inspect(InspectConfig(model=output)).problems))
    return not outcome.done or bool(outcome.value)


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name not in TIMED}


def _expect_done(outcome: Outcome, notes: list[str] | None = None) -> None:
    if not outcome.done:
        raise Fault(f"{', '.join(notes or [])}: {outcome.kind}: {outcome.words}")


def _expect_same(expected: Path, output: Path, notes: list[str]) -> None:
    others = {"state.json", "llm-barber.lock"}  # of a run that was killed when all was whole
    actual = {name: content for name, content in _contents(output).items() if name not in others}
    if actual != _contents(expected):
        raise Fault(f"{', '.join(notes)}: {output} has other bytes than {expected}")


def _expect_whole(output: Path, notes: list[str]) -> None:
    outcome = run(lambda _: list(inspect(InspectConfig(model=output)).problems))
    if not outcome.done or outcome.value:
        raise Fault(f"{', '.join(notes)}: {output} is not whole: {outcome.words or outcome.value}")


def _expect_unpacked(soak: Soak, name: str, output: Path, work: Path, notes: list[str]) -> bool:
    """A folder that may be whole: it unpacks to the files of the soak's folder (True), or is refused (False)."""
    unpacked = {}
    if (soak.folder / name / "packed.index.json").exists() and not (output / "packed.index.json").exists():
        return False  # without its index, the folder is not a packed one
    for label, folder in (("expected", soak.folder / name), ("actual", output)):
        if not (folder / "packed.index.json").exists():
            unpacked[label] = _contents(folder)
            continue
        outcome = run(lambda _, model=folder, to=work / label: unpack(PackConfig(model=model, output=to)) and None)
        if not outcome.done:
            return False
        unpacked[label] = _contents(work / label)
    if unpacked["actual"] != unpacked["expected"]:
        raise Fault(f"{', '.join(notes)}: it was called whole, and has other bytes")
    return True


def free(work: Path) -> None:
    """Delete the folder of a trial; files that were made unreadable too."""
    for path in work.rglob("*"):
        if path.is_dir():
            os.chmod(path, 0o700)
    shutil.rmtree(work)
