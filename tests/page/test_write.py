import os
from pathlib import Path

import pytest

from llm_barber import EvaluateConfig, PruneConfig, evaluate, inspect, prune
from llm_barber.errors import ModelError, OutputError
from llm_barber.evaluation.record import read_evaluation
from llm_barber.evaluation.result import Evaluation
from llm_barber.page.write import keep_with_model, write_page
from llm_barber.progress import Silent
from llm_barber.settings.inspect import InspectConfig
from tests.conftest import Listener, change_json
from tests.helpers.text import add_tokenizer


@pytest.fixture
def pruned(llama: Path, tokens: Path, tmp_path: Path) -> Path:
    add_tokenizer(llama)
    prune(PruneConfig(model=llama, output=tmp_path / "pruned", calibration=tokens))
    return tmp_path / "pruned"


def test_every_run_has_a_page(pruned: Path, llama: Path, tokens: Path, tmp_path: Path) -> None:
    page = (pruned / "report.html").read_text()
    assert "record of a prune run" in page
    assert 'id="evaluation"' not in page
    assert write_page(pruned) == pruned / "report.html"
    assert (pruned / "report.html").read_text() == page
    assert write_page(pruned, tmp_path / "other.html").read_text() == page
    assert inspect(InspectConfig(model=pruned, dense=llama)).problems == ()
    prune(PruneConfig(model=llama, output=tmp_path / "plain", calibration=tokens, report=False))
    assert not (tmp_path / "plain" / "report.html").exists()


def test_evaluations_are_kept_and_shown(pruned: Path, llama: Path, tmp_path: Path) -> None:
    texts = []
    for name in ("one", "two"):
        texts.append(str(tmp_path / f"{name}.txt"))
        (tmp_path / f"{name}.txt").write_text(name * 30)
    for text in texts:
        keep_with_model(evaluate(EvaluateConfig(model=pruned, text=(text,), seqlen=16)), Silent())
    stored = read_evaluation(pruned)
    assert stored is not None
    assert [text.text for text in stored.texts] == texts
    assert 'id="evaluation"' in (pruned / "report.html").read_text()
    # A comparison is added, and stays when the text is measured again without one, or the model has another path.
    compared = evaluate(EvaluateConfig(model=pruned, against=llama, text=(texts[0],), seqlen=16))
    listener = Listener()
    for again in (compared, evaluate(EvaluateConfig(model=pruned, text=(texts[0],), seqlen=16))):
        keep_with_model(again, listener)
        stored = read_evaluation(pruned)
        assert stored is not None
        assert (stored.texts, stored.against) == ((*compared.texts, stored.texts[1]), str(llama))
    other = str(llama / ".." / llama.name)
    keep_with_model(evaluate(EvaluateConfig(model=pruned, against=other, text=(texts[1],), seqlen=16)), listener)
    stored = read_evaluation(pruned)
    assert stored is not None
    assert [text.against is not None for text in stored.texts] == [True, True]
    assert not listener.warnings
    # Against another model it is another evaluation, which replaces the stored one.
    keep_with_model(evaluate(EvaluateConfig(model=pruned, against=pruned, text=(texts[0],), seqlen=16)), listener)
    stored = read_evaluation(pruned)
    assert stored is not None
    assert [text.text for text in stored.texts] == texts[:1]
    assert len(listener.warnings) == 1
    assert "was measured in another way" in listener.warnings[0]
    assert inspect(InspectConfig(model=pruned, dense=llama)).problems == ()
    # Nothing is written for a model without a record.
    keep_with_model(evaluate(EvaluateConfig(model=llama, text=(texts[0],), seqlen=16)), Silent())
    assert not (llama / "evaluation.json").exists()


def test_an_evaluation_is_kept_without_a_page(tmp_path: Path, llama: Path, tokens: Path) -> None:
    """Of a run that was to write none, and beside a page of somebody else."""
    out = tmp_path / "out"
    prune(PruneConfig(model=llama, output=out, calibration=tokens, initial="wanda", report=False))
    evaluation = Evaluation(model=str(out), against=None, device="cpu", dtype="float32", versions={}, texts=())
    told = Listener()
    keep_with_model(evaluation, told)
    assert read_evaluation(out) == evaluation
    assert not (out / "report.html").exists()
    assert not told.warnings
    (out / "report.html").write_text("of somebody else")
    keep_with_model(evaluation, told)
    (warning,) = told.warnings
    assert warning.startswith(f"the evaluation is kept in {out / 'evaluation.json'}, but the page does not show it: ")
    assert (out / "report.html").read_text() == "of somebody else"


def test_bad_input(pruned: Path, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no record"):
        write_page(llama)
    with pytest.raises(ModelError, match="is not a folder"):
        write_page(tmp_path / "none")
    with pytest.raises(OutputError, match="cannot write"):
        write_page(pruned, tmp_path / "no" / "such" / "page.html")
    (pruned / "evaluation.json").write_text("{")
    with pytest.raises(ModelError, match="evaluation.json is damaged"):
        write_page(pruned)
    (pruned / "evaluation.json").unlink()
    change_json(pruned / "barber.json", layers=[])
    with pytest.raises(ModelError, match="is not a record of this program"):
        write_page(pruned)


@pytest.mark.parametrize("name", ["model-00001-of-00003.safetensors", "barber.json", "config.json", ".", "a-pipe"])
def test_a_page_replaces_only_a_page(tmp_path: Path, llama: Path, tokens: Path, name: str) -> None:
    prune(PruneConfig(model=llama, output=tmp_path / "out", calibration=tokens, initial="wanda", rebuild=False))
    os.mkfifo(tmp_path / "out" / "a-pipe")
    content = (tmp_path / "out" / name).read_bytes() if name[0] in "mbc" else b""
    with pytest.raises(OutputError, match="is not a page of this program|not a regular file"):
        write_page(tmp_path / "out", tmp_path / "out" / name)
    assert not content or (tmp_path / "out" / name).read_bytes() == content
    write_page(tmp_path / "out")  # over the page of the run
