"""Pruning in an order of channels that keeps more: the dense model in that order is the same model."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_barber import (
    CompareConfig,
    InspectConfig,
    PackConfig,
    PruneConfig,
    RebuildConfig,
    UnpackConfig,
    compare,
    hold_zeros,
    inspect,
    pack,
    prune,
    rebuild,
    save_finetuned,
    unpack,
)
from llm_barber.checkpoint.channel_order import ORDER_NAME, ChannelOrder, read_order
from llm_barber.checkpoint.state import STATE_NAME
from llm_barber.errors import ModelError, NotFiniteError, SettingsError, UnfinishedRunError
from llm_barber.masking.pattern import NofM
from llm_barber.masking.statistics import InputSquares
from llm_barber.method import reordering
from llm_barber.model.architecture import ARCHITECTURES
from llm_barber.run import stream as run_module
from llm_barber.run.dry_run import dry_run
from tests.conftest import KNOWN, Listener, load_model, make_config, make_model, read_folder
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import SETTINGS, read_untimed_files, run, run_stopped
from tests.helpers.text import add_tokenizer

WANDA: dict[str, Any] = {"initial": "wanda", "rebuild": False, "pattern": "2:4", "reorder": True}
TUNED: dict[str, Any] = {"preset": "mask", "pattern": "2:4", "tune_passes": 1, "guard": 0.25}
WITH_IMAGES = ("gemma3", "internvl", "llava", "mistral3", "smolvlm")  # around a language model with a record


def with_biases(folder: Path) -> Path:
    """Give all biases values, which are zero in a new model."""
    generator = torch.Generator().manual_seed(2)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith(".bias"):
                tensors[name] = torch.rand(tensor.shape, generator=generator)
        save_file(tensors, path, metadata={"format": "pt"})
    return folder


def in_order(folder: Path, order: ChannelOrder, out: Path) -> Path:
    """The checkpoint with its channels in another order."""
    shutil.copytree(folder, out)
    for path in out.glob("*.safetensors"):
        tensors = {name: order.apply(name, tensor) for name, tensor in load_file(path).items()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    return out


def test_every_record_has_channels_that_may_change_places() -> None:
    assert [family for family, record in ARCHITECTURES.items() if not record.channels] == []


@pytest.mark.parametrize("family", [*KNOWN, *WITH_IMAGES])
def test_the_dense_model_in_the_recorded_order_gives_the_same_logits(tmp_path: Path, tokens: Path, family: str) -> None:
    dense = with_biases(make_model(tmp_path / "dense", family))
    run(dense, tmp_path / "out", tokens, **WANDA)
    order = read_order(tmp_path / "out")
    assert order is not None
    moved = {name for part in order.reordered for name in part.tensors}
    record = ARCHITECTURES[make_config(family).get_text_config().model_type]
    readers = {f".{channels.reader}.weight" for channels in record.channels}
    language_model = [name for name in read_folder(dense) if not re.search("vision|connector|projector", name)]
    present = {name for name in language_model for reader in readers if name.endswith(reader)}
    assert present
    assert present <= moved
    reordered = in_order(dense, order, tmp_path / "reordered")
    assert any(not torch.equal(tensor, read_folder(dense)[name]) for name, tensor in read_folder(reordered).items())
    windows = load_file(tokens)["input_ids"]
    with torch.no_grad():
        expected, logits = (load_model(folder, dtype=torch.float32)(windows).logits for folder in (dense, reordered))
    assert (logits - expected).abs().max() < 3e-6 * expected.abs().max()
    inspected = inspect(InspectConfig(model=str(tmp_path / "out"), dense=str(dense)))
    assert inspected.problems == ()
    assert inspected.reordered
    assert "2:4" in inspected.patterns


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_masks_are_those_of_the_reordered_dense_model(tmp_path: Path, tokens: Path, family: str) -> None:
    dense = make_model(tmp_path / "dense", family)
    run(dense, tmp_path / "out", tokens, **WANDA)
    order = read_order(tmp_path / "out")
    assert order is not None
    reordered = in_order(dense, order, tmp_path / "reordered")
    run(reordered, tmp_path / "again", tokens, **{**WANDA, "reorder": False})
    again, written = read_folder(tmp_path / "again"), read_folder(tmp_path / "out")
    assert all(torch.equal(tensor, written[name]) for name, tensor in again.items())


def test_more_saliency_is_kept_than_in_the_models_order(tmp_path: Path, llama: Path, tokens: Path) -> None:
    """Random inputs of an MLP's last linear are of about one size: its kept weights are the saliency that is kept."""
    kept = {}
    for reorder in (False, True):
        run(llama, tmp_path / str(reorder), tokens, **{**WANDA, "reorder": reorder})
        tensors = read_folder(tmp_path / str(reorder))
        kept[reorder] = sum(float(tensor.abs().sum()) for name, tensor in tensors.items() if "down_proj" in name)
    assert kept[True] > 1.005 * kept[False]


def test_presets_reorder_for_patterns_alone(tmp_path: Path, llama: Path, tokens: Path) -> None:
    for name, settings, reorders in (
        ("mask", TUNED, True),
        ("unstructured", {**TUNED, "pattern": None}, False),
        ("paper", {"preset": "paper", "pattern": "2:4"}, False),
        ("off", {**TUNED, "reorder": False}, False),
        ("own", {"preset": "mask", "tune_passes": 1, "sparsities": {"down_proj": "2:4"}}, True),
    ):
        config = PruneConfig(model=llama, output=tmp_path / name, calibration=tokens, **{**SETTINGS, **settings})
        assert dry_run(config).reorders is reorders, name
        report = prune(config)
        assert report.resolved.get("reorder", False) is reorders, name
        assert (tmp_path / name / ORDER_NAME).is_file() is reorders, name
        assert (ORDER_NAME in report.files) is reorders
        assert ("in the recorded order" in (tmp_path / name / "README.md").read_text()) is reorders
    order = read_order(tmp_path / "own")
    assert order is not None
    moved = {name for part in order.reordered for name in part.tensors}
    assert moved
    assert not any("v_proj" in name for name in moved)  # o_proj is not pruned to N:M


def test_a_family_whose_channels_are_fixed(tmp_path: Path, tokens: Path) -> None:
    model = make_model(tmp_path / "dense", "granitemoe")
    with pytest.raises(SettingsError, match="no channels that a linear with N:M reads may change places"):
        run(model, tmp_path / "out", tokens, **WANDA)
    report = run(model, tmp_path / "out", tokens, preset="mask", pattern="2:4")
    assert "reorder" not in report.resolved
    assert report.resolved["preset"] == "mask"


def test_without_patterns_it_is_refused(tmp_path: Path, llama: Path, tokens: Path) -> None:
    with pytest.raises(SettingsError, match="--reorder needs --pattern"):
        run(llama, tmp_path / "out", tokens, sparsity=0.5, reorder=True)


def test_rows_and_heads_that_m_does_not_divide_keep_their_order(tmp_path: Path, tokens: Path) -> None:
    for inner, head, moved in ((48, 12, {"mlp"}), (44, 16, {"self_attn"}), (44, 12, set())):
        model = make_model(tmp_path / f"{inner}-{head}", "llama", intermediate_size=inner, head_dim=head)
        settings = {**TUNED, "pattern": "4:8", "allow_dense_tail": True}
        run(model, tmp_path / f"out-{inner}-{head}", tokens, **settings)
        order = read_order(tmp_path / f"out-{inner}-{head}")
        names = [name for part in (order.reordered if order else ()) for name in part.tensors]
        assert {name.split(".")[3] for name in names} == moved
    with pytest.raises(SettingsError, match="no channels"):
        run(model, tmp_path / "refused", tokens, **{**settings, "reorder": True})


def test_every_query_head_decides_the_order_of_values(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although a part of the rows is looked at, as many in each query head of a key-value head."""
    seen: list[torch.Tensor] = []

    def look(saliency: torch.Tensor, pattern: NofM) -> torch.Tensor:
        seen.append(saliency)
        return torch.arange(saliency.shape[1])

    monkeypatch.setattr(reordering, "order_channels", look)
    model = make_model(tmp_path / "dense", "llama", num_attention_heads=4, num_key_value_heads=1, head_dim=8)
    run(model, tmp_path / "out", tokens, **WANDA)
    weight = read_folder(model)["model.layers.0.self_attn.o_proj.weight"].abs()
    of_values = next(saliency for saliency in seen if saliency.shape == (4 * 32, 8))
    for head in range(4):  # one head's rows after another's
        ratios = of_values[32 * head : 32 * (head + 1)] / weight[:, 8 * head : 8 * (head + 1)]
        assert torch.allclose(ratios, ratios[:1].expand_as(ratios), rtol=1e-4)


def test_activations_that_overflow_are_told_of(
    tmp_path: Path, llama: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    infinite = property(lambda self: torch.full_like(self.total, torch.inf).float())
    monkeypatch.setattr(InputSquares, "mean", infinite)
    with pytest.raises(NotFiniteError, match=r"the input of layer 0 \S+ holds NaN or Inf"):
        run(llama, tmp_path / "out", tokens, **WANDA)


def test_a_comparison_takes_families_whose_channels_are_fixed(tmp_path: Path, tokens: Path) -> None:
    model = make_model(tmp_path / "dense", "granitemoe")
    add_tokenizer(model)
    (tmp_path / "text.txt").write_text("ab cd " * 200)
    settings = {"methods": ("mask",), "targets": ("2:4",), "calibration": str(tokens), "dtype": "float32"}
    text = {"text": (str(tmp_path / "text.txt"),), "windows": 2, "text_seqlen": 24}
    compared = compare(CompareConfig(model=str(model), output=tmp_path / "out", **settings, **text))
    assert [(str(cell.method), str(cell.target)) for cell in compared.cells] == [("mask", "2:4")]


def test_a_rebuild_keeps_the_order(tmp_path: Path, llama: Path, tokens: Path) -> None:
    run(llama, tmp_path / "pruned", tokens, **WANDA)
    settings = {"calibration": tokens, "dtype": "float32", "report": False, "rebuild_ratio": 0.5}
    rebuild(RebuildConfig(dense=llama, pruned=tmp_path / "pruned", output=tmp_path / "out", **settings))
    assert read_order(tmp_path / "out") == read_order(tmp_path / "pruned")
    assert inspect(InspectConfig(model=str(tmp_path / "out"), dense=str(llama))).problems == ()
    assert inspect(InspectConfig(model=str(tmp_path / "pruned"), dense=str(llama))).problems == ()
    same = inspect(InspectConfig(model=str(tmp_path / "out"), dense=str(tmp_path / "out")))
    assert same.problems == ()
    assert not same.reordered  # both have one order
    order = tmp_path / "pruned" / ORDER_NAME
    content = order.read_text()
    order.write_text("{}")
    with pytest.raises(ModelError, match=f"{ORDER_NAME} is damaged"):
        rebuild(RebuildConfig(dense=llama, pruned=tmp_path / "pruned", output=tmp_path / "no", **settings))
    order.write_text(content.replace("[", "[ "))
    with pytest.raises(ModelError, match=f"{ORDER_NAME} of .* is missing or was changed"):
        rebuild(RebuildConfig(dense=llama, pruned=tmp_path / "pruned", output=tmp_path / "no", **settings))
    order.unlink()
    with pytest.raises(ModelError, match=f"{ORDER_NAME} of .* is missing or was changed"):
        rebuild(RebuildConfig(dense=llama, pruned=tmp_path / "pruned", output=tmp_path / "no", **settings))


def test_a_rebuild_looks_at_the_dense_zeros_in_the_order(tmp_path: Path, llama: Path, tokens: Path) -> None:
    """Zeros of the dense model in a linear that moved and stayed dense are no mask."""
    for path in llama.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if "gate_proj" in name:
                tensor[::3, ::5] = 0
        save_file(tensors, path, metadata={"format": "pt"})
    run(llama, tmp_path / "pruned", tokens, **WANDA, exclude=("gate_proj",))
    settings = {"calibration": tokens, "dtype": "float32", "report": False}
    report = rebuild(RebuildConfig(dense=llama, pruned=tmp_path / "pruned", output=tmp_path / "out", **settings))
    assert report.pattern == "2:4"
    assert inspect(InspectConfig(model=str(tmp_path / "out"), dense=str(llama))).problems == ()


def test_the_order_is_verified(tmp_path: Path, llama: Path, tokens: Path) -> None:
    run(llama, tmp_path / "out", tokens, **WANDA)
    path = tmp_path / "out" / ORDER_NAME
    content = json.loads(path.read_text())
    content["reordered"][0]["order"] = content["reordered"][0]["order"][::-1]
    path.write_text(json.dumps(content))
    problems = "; ".join(inspect(InspectConfig(model=str(tmp_path / "out"), dense=str(llama))).problems)
    assert f"{ORDER_NAME} has changed since it was written" in problems
    assert "differs from the dense model" in problems
    path.unlink()
    problems = "; ".join(inspect(InspectConfig(model=str(tmp_path / "out"), dense=str(llama))).problems)
    assert f"{ORDER_NAME} is in the record, not in the folder" in problems


def test_it_travels_with_a_packed_checkpoint(tmp_path: Path, llama: Path, tokens: Path) -> None:
    run(llama, tmp_path / "out", tokens, **WANDA)
    expected = (tmp_path / "out" / ORDER_NAME).read_bytes()
    pack(PackConfig(model=tmp_path / "out", output=tmp_path / "packed"))
    assert (tmp_path / "packed" / ORDER_NAME).read_bytes() == expected
    assert inspect(InspectConfig(model=str(tmp_path / "packed"), dense=str(llama))).problems == ()
    unpack(UnpackConfig(model=tmp_path / "packed", output=tmp_path / "unpacked"))
    assert (tmp_path / "unpacked" / ORDER_NAME).read_bytes() == expected


def test_pruning_a_reordered_model_again_leaves_its_order_behind(tmp_path: Path, llama: Path, tokens: Path) -> None:
    """The new checkpoint's dense model is the one that it was made from."""
    run(llama, tmp_path / "first", tokens, **WANDA)
    run(tmp_path / "first", tmp_path / "second", tokens, initial="wanda", rebuild=False)
    assert read_order(tmp_path / "second") is None
    run(tmp_path / "first", tmp_path / "third", tokens, **{**WANDA, "pattern": "1:4"})
    assert inspect(InspectConfig(model=str(tmp_path / "third"), dense=str(tmp_path / "first"))).problems == ()
    pack(PackConfig(model=tmp_path / "first", output=tmp_path / "packed"))
    run(tmp_path / "packed", tmp_path / "of-packed", tokens, **{**WANDA, "pattern": "1:4"})
    expected, written = read_folder(tmp_path / "third"), read_folder(tmp_path / "of-packed")
    assert all(torch.equal(tensor, written[name]) for name, tensor in expected.items())
    assert read_order(tmp_path / "of-packed") == read_order(tmp_path / "third")


def test_it_travels_with_a_fine_tuned_checkpoint(tmp_path: Path, llama: Path, tokens: Path) -> None:
    run(llama, tmp_path / "out", tokens, **WANDA)
    model = load_model(tmp_path / "out", dtype=torch.float32)
    hold_zeros(model)
    with torch.no_grad():
        model.get_parameter("model.norm.weight").mul_(1.5)
    save_finetuned(model, tmp_path / "tuned")
    assert read_order(tmp_path / "tuned") == read_order(tmp_path / "out")
    inspected = inspect(InspectConfig(model=str(tmp_path / "tuned"), dense=str(llama)))
    assert inspected.problems == ()
    assert inspected.fine_tuned == 1
    again = rebuild(
        RebuildConfig(
            dense=llama, pruned=tmp_path / "tuned", output=tmp_path / "rebuilt", calibration=tokens, **SETTINGS
        )
    )
    assert again.reordered


def test_the_page_says_how_to_undo_it(tmp_path: Path, llama: Path, tokens: Path) -> None:
    run(llama, tmp_path / "pruned", tokens, **WANDA)
    page = Path(__file__).parents[2] / "docs" / "reference" / "channel-order.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    shard = next(path for path in (tmp_path / "pruned").glob("*.safetensors") if path.name.startswith("model-00002"))
    code = re.sub(r"model-00002-of-\d+\.safetensors", shard.name, code)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    dense = read_folder(llama)
    for name, tensor in load_file(tmp_path / "shard-in-the-dense-order.safetensors").items():
        assert torch.equal(tensor, dense[name].where(tensor != 0, 0)), name


@pytest.mark.parametrize("settings", [WANDA, TUNED], ids=["wanda", "mask"])
def test_several_processes_find_the_same_order(
    tmp_path: Path, llama: Path, tokens: Path, settings: dict[str, Any]
) -> None:
    run(llama, tmp_path / "alone", tokens, **settings)
    assert run_ranks(2, lambda _: run(llama, tmp_path / "together", tokens, **settings)) == [0, 0]
    assert read_untimed_files(tmp_path / "together") == read_untimed_files(tmp_path / "alone")


def no_order(*_: Any) -> Any:
    raise AssertionError("the order was found before")


def test_a_run_that_goes_on_has_its_order(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(model, tmp_path / "whole", tokens, **TUNED)
    for layers in (0, 2):
        out = tmp_path / f"out{layers}"
        run_stopped(monkeypatch, model, out, tokens, layers=layers, **TUNED)
        with monkeypatch.context() as patched:
            patched.setattr(run_module, "find_order", no_order)
            report = run(model, out, tokens, resume=True, **TUNED)
        assert report.seconds["reorder"] > 0
        assert read_untimed_files(out) == read_untimed_files(tmp_path / "whole")


def test_an_order_that_is_lost_is_found_again(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(model, tmp_path / "whole", tokens, **TUNED)
    run_stopped(monkeypatch, model, tmp_path / "out", tokens, **TUNED)
    (tmp_path / "out.partial" / ORDER_NAME).write_text("{}")
    listener = Listener()
    config = PruneConfig(model=model, output=tmp_path / "out", calibration=tokens, resume=True, **SETTINGS, **TUNED)
    prune(config, listener)
    assert any(f"{ORDER_NAME} of the unfinished run is damaged or missing" in line for line in listener.warnings)
    assert read_untimed_files(tmp_path / "out") == read_untimed_files(tmp_path / "whole")


def test_another_order_than_the_finished_layers_have_is_refused(
    tmp_path: Path, model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_stopped(monkeypatch, model, tmp_path / "out", tokens, **TUNED)
    (tmp_path / "out.partial" / ORDER_NAME).unlink()
    monkeypatch.setattr(run_module, "find_order", lambda *_: ChannelOrder(reordered=()))
    with pytest.raises(UnfinishedRunError, match=f"{ORDER_NAME} of the unfinished run is lost or damaged"):
        run(model, tmp_path / "out", tokens, resume=True, **TUNED)
    assert (tmp_path / "out.partial" / STATE_NAME).is_file()
