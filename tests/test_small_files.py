"""A small file cannot keep the program busy for minutes: absurd counts, named pipes and devices are refused at once."""

import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_barber import InspectConfig, PackConfig, PruneConfig, inspect, load, pack, prune
from llm_barber.checkpoint.counts import check_counts
from llm_barber.errors import BarberError, CalibrationError, ModelError, SettingsError, TaskError
from llm_barber.evaluation.tasks import find_tasks
from llm_barber.evaluation.texts import evaluation_text
from llm_barber.model.empty import empty_model
from llm_barber.planning.plan import plan
from llm_barber.settings.plan import PlanConfig
from llm_barber.settings.tools import ConvertConfig
from llm_barber.tools.convert import convert
from tests.conftest import change_json, make_config, make_model

AT_ONCE = 10  # seconds, on a busy machine


@pytest.fixture(autouse=True)
def _ends_at_once() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"not refused within {AT_ONCE} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(AT_ONCE)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def run_plan(model: Path, tokens: Path, output: Path) -> None:
    plan(PlanConfig(model=model, calibration=tokens, tflops=1))


def run_prune(model: Path, tokens: Path, output: Path) -> None:
    prune(PruneConfig(model=model, calibration=tokens, output=output))


def run_inspect(model: Path, tokens: Path, output: Path) -> None:
    inspect(InspectConfig(model=model))


def run_load(model: Path, tokens: Path, output: Path) -> None:
    load(model)


def run_pack(model: Path, tokens: Path, output: Path) -> None:
    pack(PackConfig(model=model, output=output))


def run_convert(model: Path, tokens: Path, output: Path) -> None:
    convert(ConvertConfig(model=model, output=output))


Command = Callable[[Path, Path, Path], None]
COMMANDS: list[Command] = [run_plan, run_prune, run_inspect, run_load]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("layers", [10**5, 10**7, 10**12])
def test_more_layers_than_there_can_be(tmp_path: Path, tokens: Path, command: Command, layers: int) -> None:
    model = make_model(tmp_path / "model", "qwen2")
    change_json(model / "config.json", num_hidden_layers=layers, layer_types=None)
    reason = "no model has so many" if command is run_plan else "its weights are 27 tensors"
    with pytest.raises(ModelError, match=rf"says num_hidden_layers: {layers:,}, but {reason}"):
        command(model, tokens, tmp_path / "out")
    assert not (tmp_path / "out").exists()


SECTIONS: list[tuple[str, dict[str, Any], str]] = [
    ("qwen3_moe", {"num_experts": 10**6}, "num_experts: 1,000,000"),
    ("qwen3_moe", {"num_experts": 1500, "num_hidden_layers": 200}, "num_hidden_layers times num_experts: 300,000"),
    ("deepseek_v3", {"n_routed_experts": 10**7}, "n_routed_experts: 10,000,000"),
    ("llama", {"num_labels": 10**9}, "num_labels: 1,000,000,000"),
    ("llama", {"num_hidden_layers": 1e9}, "num_hidden_layers: 1,000,000,000"),
    ("gpt2", {"n_layer": 10**6}, "n_layer: 1,000,000"),
    ("qwen2_5_vl", {"vision_config": {"depth": 10**6}}, r"vision_config\.depth: 1,000,000"),
    ("gemma3", {"text_config": {"num_hidden_layers": 10**6}}, r"text_config\.num_hidden_layers: 1,000,000"),
    ("gemma3", {"vision_config": {"num_hidden_layers": 10**6}}, r"vision_config\.num_hidden_layers: 1,000,000"),
]


@pytest.mark.parametrize(("family", "changes", "said"), SECTIONS)
@pytest.mark.parametrize("command", [run_plan, run_inspect])
def test_counts_of_all_kinds_and_sections(
    tmp_path: Path, tokens: Path, command: Command, family: str, changes: dict[str, Any], said: str
) -> None:
    model = make_model(tmp_path / "model", family)
    change_json(model / "config.json", **changes)
    with pytest.raises(ModelError, match=said):
        command(model, tokens, tmp_path / "out")


def test_a_gguf_file_with_more_layers_than_there_can_be(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = pytest.importorskip("gguf")
    monkeypatch.setenv("LLM_BARBER_CACHE", str(tmp_path / "cache"))
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_block_count(10**7)
    writer.add_tensor("token_embd.weight", np.zeros((128, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for command in COMMANDS:
        with pytest.raises(ModelError, match="says num_hidden_layers: 10,000,000, but no model has so many"):
            command(tmp_path / "model.gguf", tokens, tmp_path / "out")


def test_counts_that_models_have() -> None:
    """The largest ones: without weights, with experts one by one, and stacked."""
    kimi = {"num_hidden_layers": 61, "n_routed_experts": 384, "num_experts_per_tok": 8}
    check_counts(kimi, "kimi")
    check_counts(kimi, "kimi", [(64, 64)] * (60 * 384 * 3))
    check_counts(kimi, "kimi", [(384, 64, 64)] * (60 * 2) + [(64, 64)] * 600)
    check_counts({"num_hidden_layers": 126, "layer_types": ["full_attention"] * 126}, "llama-405b", [(8, 8)] * 1138)
    with pytest.raises(ModelError, match="times n_routed_experts: 23,424, but its weights are 120 tensors"):
        check_counts(kimi, "kimi", [(10**9, 0, 64)] * 120)  # which hold nothing


def test_experts_that_are_not_made_do_not_count() -> None:
    doge = {"model_type": "doge", "num_hidden_layers": 32, "num_experts": 16384, "is_moe": False}
    check_counts(doge, "doge", [(8, 8)] * 300)
    for mixture in (doge | {"is_moe": True}, doge | {"model_type": "mixtral"}):
        with pytest.raises(ModelError, match="times num_experts: 524,288, but its weights are 300 tensors"):
            check_counts(mixture, "doge", [(8, 8)] * 300)


@pytest.mark.parametrize(
    ("changes", "said"), [({"head_dim": 10**12}, "buffer"), ({"num_hidden_layers": 300}, "more than 1,000 modules")]
)
def test_modules_and_buffers_without_end_are_not_made(
    changes: dict[str, int], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_barber.model.empty.MOST_MODULES", 1000)
    empty_model(make_config("qwen3"), torch.float32)
    with pytest.raises(ModelError, match=said):
        empty_model(make_config("qwen3", **changes), torch.float32)


def put_pipe(path: Path) -> None:
    os.mkfifo(path)


def put_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def put_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def put_folder(path: Path) -> None:
    path.mkdir()


PUTS = {"a named pipe": put_pipe, "a device": put_device, "a socket": put_socket, "a folder": put_folder}
FILES = ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "barber.json")


@pytest.mark.parametrize("kind", ["a named pipe", "a device", "a socket"])
@pytest.mark.parametrize("file", FILES)
def test_what_is_no_file_in_a_checkpoint(tmp_path: Path, tokens: Path, file: str, kind: str) -> None:
    model = make_model(tmp_path / "model", "llama")
    (model / file).unlink(missing_ok=True)
    PUTS[kind](model / file)
    for command in (*COMMANDS, run_pack, run_convert):
        with pytest.raises(ModelError, match=rf"model/{file} is {kind}, not a regular file"):
            command(model, tokens, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", PUTS)
def test_a_shard_that_an_index_names(tmp_path: Path, tokens: Path, kind: str) -> None:
    model = make_model(tmp_path / "model", "llama")
    PUTS[kind](model / "shard")
    (model / "model.safetensors").unlink()  # an index beside it is not read
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "shard"}}')
    with pytest.raises(ModelError, match=f"shard is {kind}, not a regular file"):
        run_inspect(model, tokens, tmp_path / "out")


@pytest.mark.parametrize("kind", ["a named pipe", "a device", "a socket"])
def test_what_is_no_file_by_another_path(tmp_path: Path, llama: Path, tokens: Path, kind: str) -> None:
    def use(error: type[BarberError], name: str, command: Callable[[Path], object]) -> None:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        PUTS[kind](path)
        with pytest.raises(error, match=f"is {kind}, not a regular file"):
            command(path)

    def settings(**changes: Any) -> PruneConfig:
        return PruneConfig(
            **{"model": llama, "output": tmp_path / "out", "calibration": tokens, "seqlen": 16, **changes}
        )

    for suffix in ("txt", "jsonl", "parquet", "safetensors"):
        use(CalibrationError, f"text.{suffix}", lambda path: prune(settings(calibration=path)))
    use(CalibrationError, "evaluated.txt", lambda path: evaluation_text(str(path)))
    use(SettingsError, "sparsities.yaml", lambda path: settings(sparsities=path))
    use(SettingsError, "blocks.yaml", lambda path: settings(blocks=path))
    use(TaskError, "tasks/own.jsonl", lambda path: find_tasks(("own",), path.parent, None))
    use(ModelError, "model.gguf", lambda path: prune(settings(model=path)))
    use(ModelError, "other.gguf", lambda path: plan(PlanConfig(model=path)))
    use(ModelError, "config.json", lambda path: plan(PlanConfig(model=path)))


def test_links_to_files_are_files(tmp_path: Path, llama: Path, tokens: Path) -> None:
    """Links to files, as the hub's cache has them, are read as the files."""
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in llama.iterdir():
        (linked / path.name).symlink_to(path)
    run_prune(linked, tokens, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()
    shutil.rmtree(llama)
    with pytest.raises(ModelError, match=r"has no config\.json"):
        run_inspect(linked, tokens, tmp_path / "out")
