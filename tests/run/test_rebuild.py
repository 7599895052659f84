"""Whole runs of `rebuild`: masks read off another checkpoint."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_barber import InspectConfig, RebuildConfig, inspect, rebuild
from llm_barber.checkpoint import hub
from llm_barber.errors import ModelError
from llm_barber.masking.find_patterns import holds
from llm_barber.masking.pattern import NofM
from tests.conftest import make_model, read_folder
from tests.helpers.prune_runs import is_linear, run


def test_weights_that_are_zero_in_the_dense_model_are_told_apart(tmp_path: Path, llama: Path, tokens: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in filter(is_linear, tensors):
        tensors[name][torch.rand(tensors[name].shape, generator=generator) < 0.1] = 0
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    pruned = tmp_path / "pruned"
    make_model(pruned, "llama")
    generator = torch.Generator().manual_seed(1)
    masks = {name: torch.rand(tensors[name].shape, generator=generator) < 0.5 for name in filter(is_linear, tensors)}
    save_file(
        {name: tensor * masks[name] if name in masks else tensor for name, tensor in tensors.items()},
        pruned / "model.safetensors", {"format": "pt"},
    )  # fmt: skip
    report = rebuild(
        RebuildConfig(
            dense=str(llama), pruned=str(pruned), output=tmp_path / "out", calibration=str(tokens), rebuild_ratio=1.0
        )
    )
    before, after = read_folder(pruned), read_folder(tmp_path / "out")
    assert report.swapped > 500
    counts = {
        (f"model.layers.{layer.index}.{linear.name}.weight"): linear
        for layer in report.layers
        for linear in layer.linears
    }
    for name in masks:
        natural = tensors[name] == 0
        assert (after[name] == 0).sum() == (before[name] == 0).sum()
        assert counts[name].pruned == ((before[name] == 0) & ~natural).sum()
        assert counts[name].zeros == (before[name] == 0).sum()


def test_rebuild_takes_method_and_pattern_from_the_pruned_model(tmp_path: Path, llama: Path, tokens: Path) -> None:
    run(llama, tmp_path / "pruned", tokens, initial="magnitude", rebuild=False)
    run(llama, tmp_path / "nm", tokens, initial="wanda", pattern="1:4", rebuild=False)
    settings = {"dense": str(llama), "calibration": str(tokens)}
    report = rebuild(RebuildConfig(pruned=str(tmp_path / "pruned"), output=tmp_path / "out", **settings))
    assert (report.granularity, report.rebuild_ratio, report.pattern) == ("block", 0.1, "unstructured")
    report = rebuild(
        RebuildConfig(pruned=str(tmp_path / "nm"), output=tmp_path / "out2", rebuild_ratio=1.0, **settings)
    )
    assert (report.granularity, report.pattern) == ("output", "1:4")
    for name, tensor in read_folder(tmp_path / "out2").items():
        if is_linear(name):
            assert holds(NofM(1, 4), tensor != 0)
    # From its record, a pattern that is not looked for otherwise.
    run(llama, tmp_path / "odd", tokens, pattern="3:16", rebuild=False)
    rebuild(RebuildConfig(pruned=str(tmp_path / "odd"), output=tmp_path / "out4", rebuild_ratio=1.0, **settings))
    assert inspect(InspectConfig(model=str(tmp_path / "out4"), dense=str(llama))).problems == ()
    # Rebuilt once, it still knows how its mask began.
    again = rebuild(RebuildConfig(pruned=str(tmp_path / "out"), output=tmp_path / "out5", **settings))
    assert again.granularity == "block"
    with pytest.raises(ModelError, match="pattern 1:8 does not hold"):
        rebuild(RebuildConfig(pruned=str(tmp_path / "nm"), output=tmp_path / "out3", pattern="1:8", **settings))


def test_patterns_may_differ_from_linear_to_linear(tmp_path: Path, llama: Path, tokens: Path) -> None:
    run(llama, tmp_path / "nm", tokens, pattern="2:4", rebuild=False)
    run(llama, tmp_path / "free", tokens, initial="magnitude", rebuild=False)
    nm, free = read_folder(tmp_path / "nm"), read_folder(tmp_path / "free")
    for first in (0, 1):
        mixed = make_model(tmp_path / f"mixed{first}", "llama")
        tensors = {name: nm[name] if f"layers.{first}." in name else free[name] for name in nm}
        save_file(tensors, mixed / "model.safetensors", {"format": "pt"})
        report = rebuild(
            RebuildConfig(
                dense=str(llama), pruned=str(mixed), output=tmp_path / f"out{first}", calibration=str(tokens),
                rebuild_ratio=1.0,
            )
        )  # fmt: skip
        assert report.pattern == "mixed"
        assert {linear.pattern for linear in report.layers[first].linears} == {"2:4"}
        assert inspect(InspectConfig(model=report.output, dense=str(llama))).problems == ()
        for name, tensor in read_folder(tmp_path / f"out{first}").items():
            if is_linear(name) and f"layers.{first}." in name:
                assert holds(NofM(2, 4), tensor != 0)


def test_a_pruned_model_that_is_not_pruned_is_refused(tmp_path: Path, llama: Path, tokens: Path) -> None:
    settings = {"dense": str(llama), "calibration": str(tokens), "output": tmp_path / "out"}
    with pytest.raises(ModelError, match="is not pruned"):
        rebuild(RebuildConfig(pruned=str(llama), **settings))
    empty = make_model(tmp_path / "empty", "llama")
    tensors = {
        name: tensor * 0 if is_linear(name) else tensor
        for name, tensor in load_file(llama / "model.safetensors").items()
    }
    save_file(tensors, empty / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="all linears of .* are zero"):
        rebuild(RebuildConfig(pruned=str(empty), **settings))
    partly_zero = {
        **load_file(llama / "model.safetensors"),
        "model.layers.0.self_attn.q_proj.weight": torch.zeros(32, 32),
    }
    save_file(partly_zero, empty / "model.safetensors", {"format": "pt"})
    report = rebuild(RebuildConfig(pruned=str(empty), **settings))  # as it would be in another layer
    assert [linear.pruned for linear in report.layers[0].linears] == [1024, 0, 0, 0, 0, 0, 0]
    settings["overwrite"] = True
    deeper = make_model(tmp_path / "deeper", "llama", num_hidden_layers=3)
    with pytest.raises(ModelError, match="DENSE has 2 decoder layers, PRUNED 3"):
        rebuild(RebuildConfig(pruned=str(deeper), **settings))


def test_fused_prune_equals_no_rebuild_plus_rebuild_in_the_first_layer(
    tmp_path: Path, llama: Path, tokens: Path
) -> None:
    run(llama, tmp_path / "initial", tokens, rebuild=False, dtype="float32")
    rebuild(
        RebuildConfig(
            dense=str(llama), pruned=str(tmp_path / "initial"), output=tmp_path / "two", calibration=str(tokens),
            rebuild_ratio=0.5, dtype="float32",
        )
    )  # fmt: skip
    run(llama, tmp_path / "one", tokens, rebuild_ratio=0.5, dtype="float32")
    fused, separate = read_folder(tmp_path / "one"), read_folder(tmp_path / "two")
    assert all(torch.equal(fused[name], separate[name]) for name in fused if "layers.0." in name)


def test_pruned_of_another_shape(tmp_path: Path, llama: Path, tokens: Path) -> None:
    other = make_model(tmp_path / "other", "llama", intermediate_size=48)
    mistral = make_model(tmp_path / "mistral", "mistral")
    settings = {"dense": str(llama), "calibration": str(tokens), "output": tmp_path / "out"}
    with pytest.raises(ModelError, match=r"is \(64, 32\) in DENSE and \(48, 32\) in PRUNED"):
        rebuild(RebuildConfig(pruned=str(other), **settings))
    with pytest.raises(ModelError, match="DENSE is llama, PRUNED is mistral"):
        rebuild(RebuildConfig(pruned=str(mistral), **settings))
    assert not (tmp_path / "out").exists()


def test_revisions_of_both_models(tmp_path: Path, llama: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`revision` is DENSE's, `pruned_revision` PRUNED's; the run is keyed by what each of them leads to."""
    run(llama, tmp_path / "pruned", tokens)
    folders = {("o/dense", "d1"): llama, ("o/pruned", "p1"): tmp_path / "pruned"}
    monkeypatch.setattr(hub, "_download", lambda name, revision, _: folders[name, revision])
    files = {"output": tmp_path / "out", "calibration": str(tokens), "report": False}
    names = {"dense": "o/dense", "pruned": "o/pruned", "revision": "d1", "pruned_revision": "p1"}
    rebuild(RebuildConfig(**names, **files))
    rebuild(RebuildConfig(dense="o/dense@d1", pruned="o/pruned@p1", **files, overwrite=True))
    with pytest.raises(KeyError):
        rebuild(RebuildConfig(**{**names, "pruned_revision": None}, **files, overwrite=True))
