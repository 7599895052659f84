"""The benchmarks start, and measure a tiny model."""

import importlib
import sys
from pathlib import Path

import pytest

from tests.conftest import make_model
from tests.helpers.pages import ROOT
from tests.helpers.text import add_tokenizer

BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py") if "ArgumentParser" in path.read_text())
# llama-cpp-python, as far as `payoff_llama.py` calls it; the next token is always the last one and 1.
LLAMA = """
import ctypes
from types import SimpleNamespace as Record

VOCABULARY = 8
llama_log_callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
llama_log_set = llama_backend_init = llama_batch_free = lambda *arguments: None
llama_model_default_params = llama_context_default_params = llama_model_quantize_default_params = Record
llama_model_load_from_file = lambda path, settings: Record(past=[]) if path.endswith(b".gguf") else None
llama_init_from_model = lambda model, settings: model
llama_get_memory = lambda context: context
llama_model_get_vocab = lambda model: model
llama_vocab_n_tokens = lambda vocabulary: VOCABULARY
llama_memory_clear = lambda memory, data: memory.past.clear()
llama_memory_seq_pos_max = lambda memory, sequence: len(memory.past) - 1


def llama_model_quantize(source, target, settings):
    with open(target, "w") as file:
        file.write(f"{source.decode()} {settings.ftype} {settings.allow_requantize}")
    return 0


def llama_batch_init(tokens, embeddings, sequences):
    return Record(token=[0] * tokens, pos=[0] * tokens, n_seq_id=[0] * tokens, seq_id=[[0] for _ in range(tokens)],
                  logits=[0] * tokens, n_tokens=0)


def llama_decode(context, batch):
    assert batch.pos[: batch.n_tokens] == list(range(len(context.past), len(context.past) + batch.n_tokens))
    context.past += batch.token
    rows = [[float(index == (token + 1) % VOCABULARY) for index in range(VOCABULARY)] for token in batch.token]
    flat = [value for row, wanted in zip(rows, batch.logits) if wanted for value in row]
    context.logits = (ctypes.c_float * len(flat))(*flat)
    return 0


def llama_get_logits(context):
    return ctypes.cast(context.logits, ctypes.POINTER(ctypes.c_float))
"""


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_says_how_it_is_called(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(name).main()
    assert f"python benchmarks/{name}.py" in capsys.readouterr().out


def test_payoff_measures_packed_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import payoff

    add_tokenizer(make_model(tmp_path / "dense", "llama", max_position_embeddings=1024))
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 300)
    kept: list[str] = []
    monkeypatch.setattr(payoff, "keep", lambda name, figures: kept.append(name))
    command = (
        f"payoff --model {tmp_path / 'dense'} --targets 0.5 --kinds packed,int8 --threads 1 --tokens 2 --prompt 8 "
        f"--samples 2 --seqlen 16 --text {tmp_path / 'text.txt'} --windows 1 --work {tmp_path / 'work'}"
    )
    monkeypatch.setattr(sys, "argv", command.split())
    payoff.main()
    printed = capsys.readouterr().out
    assert kept == ["payoff"]
    assert all(f"0.5 {kind}" in printed for kind in ("packed", "int8"))
    assert {path.name for path in (tmp_path / "work").iterdir()} == {
        "dense-magnitude-0.5", "dense-magnitude-0.5-packed", "dense-magnitude-0.5-int8",
    }  # fmt: skip


def test_llama_cpp_answers_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import payoff

    (tmp_path / "llama_cpp.py").write_text(LLAMA)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    made = tmp_path / "model.Q4_K_M.gguf"
    payoff.llama(sys.executable, source=str(tmp_path / "model.gguf"), target=str(made), kind="Q4_K_M")
    assert made.read_text() == f"{tmp_path / 'model.gguf'} 15 True"
    result = payoff.llama(sys.executable, path=str(made), threads=1, prompt=[3, 4], tokens=3)
    assert result.keys() == {"load", "prefill", "decode"}
    payoff.llama(sys.executable, path=str(made), threads=1, prompt=[1, 5, 7], logits=str(tmp_path / "logits.npy"))
    assert payoff.np.load(tmp_path / "logits.npy").argmax(1).tolist() == [2, 6, 0]
    with pytest.raises(SystemExit, match="cannot be loaded"):
        payoff.llama(sys.executable, path="nothing", threads=1, prompt=[1], tokens=1)
