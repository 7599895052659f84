"""The payoff benchmark beside llama.cpp: its process, files, logits and whole runs over a small model."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import read_folder

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


LLAMA = '''
import ctypes
from types import SimpleNamespace as Record

__version__ = "0.0"
VOCABULARY = 8
llama_log_callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
llama_log_set = llama_set_n_threads = llama_free = llama_model_free = lambda *arguments: None
llama_backend_init = llama_batch_free = lambda *arguments: None
llama_model_default_params = llama_context_default_params = llama_model_quantize_default_params = Record
llama_print_system_info = lambda: b"pretended"
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
    """The next token is the last one and 1; positions go on where the sequence ended."""
    assert batch.pos[: batch.n_tokens] == list(range(len(context.past), len(context.past) + batch.n_tokens))
    context.past += batch.token
    rows = [[float(index == (token + 1) % VOCABULARY) for index in range(VOCABULARY)] for token in batch.token]
    flat = [value for row, wanted in zip(rows, batch.logits) if wanted for value in row]
    context.logits = (ctypes.c_float * len(flat))(*flat)
    return 0


def llama_get_logits(context):
    return ctypes.cast(context.logits, ctypes.POINTER(ctypes.c_float))


def llama_get_logits_ith(context, index):
    assert index == -1 and len(context.logits) == VOCABULARY
    return llama_get_logits(context)
'''


@pytest.fixture
def llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """llama.cpp's process, with a pretended llama-cpp-python."""
    import payoff_peers

    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "llama_cpp.py").write_text(LLAMA)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    process = payoff_peers.Llama(sys.executable)
    yield process
    process.close()


def test_the_process_of_llama_cpp_answers(tmp_path: Path, llama: Any) -> None:
    import payoff_peers

    assert llama.about == {"llama-cpp-python": "0.0", "system": "pretended"}
    made = payoff_peers.file_of_type(llama, tmp_path / "model.gguf", tmp_path, "Q4_K_M", 1)
    assert made.read_text() == f"{tmp_path / 'model.gguf'} 15 True"
    made.write_text("kept")
    assert payoff_peers.file_of_type(llama, tmp_path / "model.gguf", tmp_path, "Q4_K_M", 1).read_text() == "kept"
    assert llama.ask("load", path=str(made), threads=1, context=16)["seconds"] >= 0
    llama.ask("threads", count=2)
    assert llama.decoding([3, 4], 3)() > 0
    logits = llama.logits([1, 5, 7], tmp_path / "logits.npy")
    assert logits.argmax(1).tolist() == [2, 6, 0]
    assert not (tmp_path / "logits.npy").exists()
    with pytest.raises(SystemExit, match="cannot be loaded"):
        llama.ask("load", path="nothing", threads=1, context=16)


def test_without_llama_cpp_it_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import payoff_peers

    (tmp_path / "llama_cpp.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for python in (sys.executable, str(tmp_path / "nothing")):
        with pytest.raises(SystemExit, match="pip install --no-binary llama-cpp-python"):
            payoff_peers.Llama(python)


def test_divergence_of_logits_is_that_of_their_distributions(tmp_path: Path) -> None:
    import payoff_quality

    from llm_barber.evaluation.predictions import measure_predictions
    from llm_barber.progress import Silent

    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 2, 300, 11, generator=generator)
    tokens = torch.randint(11, (2, 300), generator=generator)
    calls: list[int] = []
    lazy = payoff_quality.Lazy(lambda number: (calls.append(number), left[number])[1], 2)
    other = payoff_quality.Lazy(lambda number: right[number], 2)
    states = payoff_quality.states_of(lazy), payoff_quality.states_of(other)
    perplexity, against = measure_predictions("text", tokens, *states, Silent())
    assert calls == [0, 1]  # each window once
    assert against is not None
    q, p = left[:, :-1].double().log_softmax(2), right[:, :-1].double().log_softmax(2)
    expected = (p.exp() * (p - q)).sum(2).mean().item()
    assert against.divergence == pytest.approx(expected, rel=1e-5)
    losses = [-values.gather(2, tokens[:, 1:, None]).mean().item() for values in (q, p)]
    assert [perplexity, against.perplexity] == pytest.approx([math.exp(loss) for loss in losses], rel=1e-5)


def test_a_checkpoint_becomes_a_gguf_file(tmp_path: Path) -> None:
    import gguf
    import payoff_peers
    from synthetic import write_llama

    folder = write_llama(tmp_path / "model", 2, 64, 128, 2, 100, torch.bfloat16)
    written = payoff_peers.write_gguf(folder, tmp_path / "model.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(written).tensors}
    assert len(tensors) == 3 + 2 * len(payoff_peers.BLOCK)
    weight = read_folder(folder)["model.layers.1.mlp.up_proj.weight"]
    assert bytes(tensors["blk.1.ffn_up.weight"].data) == bytes(weight.view(torch.uint8).numpy())
    assert payoff_peers.gguf_name("model.layers.13.self_attn.o_proj.weight") == "blk.13.attn_output.weight"


def test_models_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: Any) -> None:
    import payoff
    import payoff_models
    import payoff_sides
    from synthetic import write_llama

    folder = write_llama(tmp_path / "tiny", 2, 64, 128, 2, 400, torch.bfloat16)
    tiny = payoff_sides.Source("tiny", folder, tmp_path / "tiny.gguf")
    monkeypatch.setattr(payoff_models, "sources", lambda *arguments: [tiny])
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    loads, packed = list[str](), ["packed 0.5", "int8 0.5", "packed 2:4", "int8 2:4"]
    loading = {"seconds": 1.0, "memory": 2e6, "disk": 3e6}
    monkeypatch.setattr(payoff_sides.Side, "loading", lambda side, *_: (loads.append(side.name), loading)[1])
    command = (
        f"models --targets 0.5,2:4 --kinds packed,int8 --threads 1 --decode 2 --prefill 8 --rounds 1 --work {tmp_path}"
    )
    options = payoff.make_parser().parse_args([*command.split(" "), "--llama", sys.executable])
    payoff_models.run(options, tmp_path / "results")
    assert loads == ["dense", *packed]
    cells = json.loads((tmp_path / "results" / "models.json").read_text())
    sides = [*packed, "llama.cpp BF16", "llama.cpp Q8_0", "llama.cpp Q4_K_M"]
    names = [f"tiny bfloat16 {side} {part}" for side in sides for part in ("loading", "threads 1")]
    assert set(cells) == {"tiny bfloat16 dense loading", *names}
    speeds = cells["tiny bfloat16 int8 2:4 threads 1"]["result"]
    assert all(speeds[part][side]["minimum"] > 0 for part in ("decoding", "prefill") for side in ("dense", "side"))
    monkeypatch.setattr(payoff_models, "in_turn", lambda *arguments: pytest.fail("it is measured again"))
    payoff_models.run(options, tmp_path / "results")
    assert loads == ["dense", *packed]
