"""The whole run on tiny models: what is written, and that nothing is left when it cannot be."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_barber import BarberError, InspectConfig, PruneConfig, RebuildConfig, RunReport, inspect, prune, rebuild
from llm_barber.checkpoint import hub
from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.errors import CalibrationError, ModelError, OutputError, SettingsError
from llm_barber.loading.opening import load_config
from llm_barber.masking.held_patterns import holds
from llm_barber.masking.pattern import NofM, Unstructured, parse_pattern
from llm_barber.model.architecture import ARCHITECTURES
from llm_barber.runtime.load import load
from tests.conftest import FAMILIES, Listener, bits, change_json, load_model, make_model, read_folder, save_tokens
from tests.helpers.shards import split_in_two_shards

LINEARS = {linear for architecture in ARCHITECTURES.values() for linear in architecture.linears}


def is_linear(name: str) -> bool:
    match = re.fullmatch(r"(?:.*\.)?\d+\.(.+)\.weight", name)
    return match is not None and re.sub(r"\.\d+\.", ".*.", match[1]) in LINEARS


def run(model: Path, output: Path, tokens: Path, **settings: object) -> RunReport:
    config = {"report": False, **settings}  # drawing a page takes longer than these runs
    return prune(PruneConfig(model=str(model), output=output, calibration=str(tokens), **config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("initial", ["magnitude", "wanda", "sparsegpt", "ria", "dsnot"])
def test_kept_weights_keep_their_bits(tmp_path: Path, tokens: Path, initial: str, dtype: torch.dtype) -> None:
    model = make_model(tmp_path / "dense", "llama", dtype)
    report = run(model, tmp_path / "out", tokens, initial=initial, rebuild_ratio=0.5, sparsity=0.6)
    dense, written = read_folder(model), read_folder(tmp_path / "out")
    assert dense.keys() == written.keys()
    for name, tensor in written.items():
        assert tensor.dtype == dense[name].dtype
        pruned = tensor == 0
        if is_linear(name):
            assert (bits(tensor)[pruned] == 0).all()  # +0.0
        else:
            assert not pruned.all() or (dense[name] == 0).all()
        kept = ~pruned if is_linear(name) else torch.ones_like(pruned)
        assert torch.equal(bits(tensor)[kept], bits(dense[name])[kept])
    for layer in report.layers:
        for linear in layer.linears:
            assert linear.pruned == linear.zeros
        # Linears of a block compete: one of them may only lose.
        assert all(any(linear.grown for linear in block.linears) for block in layer.blocks) or initial != "magnitude"
    exact = 0.59375 if initial in ("wanda", "dsnot") else 0.6  # floor(0.6 · 32) = 19 of a row's 32 …
    assert report.sparsity == pytest.approx(exact, abs=0.005)
    assert report.sparsity <= 0.6


@pytest.mark.parametrize("amount", [{"sparsity": 0.5}, {"pattern": "2:4"}], ids=["half", "2:4"])
def test_dsnot_leaves_mlps_to_wanda(tmp_path: Path, llama: Path, tokens: Path, amount: dict[str, Any]) -> None:
    found = {}
    for initial in ("wanda", "dsnot"):
        run(llama, tmp_path / initial, tokens, initial=initial, rebuild=False, **amount)
        found[initial] = read_folder(tmp_path / initial)
    same = {
        name: torch.equal(found["dsnot"][name], tensor)
        for name, tensor in found["wanda"].items()
        if is_linear(name) and ".layers.0." in name  # later layers get other inputs
    }
    assert len(same) == 7
    assert all(equal == (".mlp." in name) for name, equal in same.items())


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "16:32"])
@pytest.mark.parametrize("initial", ["magnitude", "wanda", "sparsegpt", "ria", "dsnot"])
@pytest.mark.parametrize("granularity", ["output", "block"])
def test_patterns_hold_exactly(
    tmp_path: Path, llama: Path, tokens: Path, initial: str, pattern: str, granularity: str
) -> None:
    report = run(
        llama, tmp_path / "out", tokens, initial=initial, pattern=pattern, rebuild_ratio=1.0, granularity=granularity
    )
    target = parse_pattern(pattern)
    for name, tensor in read_folder(tmp_path / "out").items():
        if is_linear(name):
            assert holds(target, tensor != 0)
            assert (tensor != 0).sum() == tensor.numel() * target.kept // target.of
    assert report.swapped > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_loads_everywhere_with_the_same_logits(tmp_path: Path, tokens: Path, family: str) -> None:
    model = make_model(tmp_path / "dense", family)
    run(model, tmp_path / "out", tokens, rebuild_ratio=0.5)
    ids = load_file(tokens)["input_ids"]
    in_memory, loaded = load_model(model), load_model(tmp_path / "out")
    found = dict(loaded.named_parameters())  # of experts, all in one
    ours = dict(load(tmp_path / "out").named_parameters())
    assert all(torch.equal(parameter, ours[name]) for name, parameter in found.items())
    with torch.no_grad():
        for name, parameter in in_memory.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(found[name] != 0)
        logits = loaded(ids).logits
        assert logits.isfinite().all()
        torch.testing.assert_close(logits, in_memory(ids).logits)
    assert loaded.generate(ids[:1, :4], max_new_tokens=3, do_sample=False).shape == (1, 7)
    assert (tmp_path / "out" / "config.json").read_bytes() == (model / "config.json").read_bytes()


def test_sharded_and_unprefixed_checkpoints_give_the_same_weights(tmp_path: Path, tokens: Path) -> None:
    model = make_model(tmp_path / "dense", "opt")
    run(model, tmp_path / "one", tokens, rebuild_ratio=0.5)
    split_in_two_shards(model)
    run(model, tmp_path / "two", tokens, rebuild_ratio=0.5)
    tensors = read_folder(model)
    for path in (*model.glob("*.safetensors"), model / "model.safetensors.index.json"):
        path.unlink()
    save_file({name.removeprefix("model."): one for name, one in tensors.items()}, model / "model.safetensors")
    run(model, tmp_path / "three", tokens, rebuild_ratio=0.5)
    one, two, three = (read_folder(tmp_path / name) for name in ("one", "two", "three"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name])
        assert torch.equal(tensor, three[name.removeprefix("model.")])


def test_same_settings_same_bytes_and_batch_size_does_not_matter(tmp_path: Path, llama: Path) -> None:
    tokens = save_tokens(tmp_path / "t.safetensors", sequences=7)
    reports = [
        run(llama, tmp_path / str(number), tokens, rebuild_ratio=0.5, batch_size=batch, dtype="float32")
        for number, batch in enumerate([7, 7, 1, 3])
    ]
    assert all(report.files == reports[0].files for report in reports)
    assert reports[0].swapped > 100


def test_the_record_is_complete(tmp_path: Path, llama: Path, tokens: Path) -> None:
    report = run(llama, tmp_path / "out", tokens, rebuild_ratio=0.5, granularity="block", seed=3)
    record = json.loads((tmp_path / "out" / "barber.json").read_text())
    assert record["settings"]["seed"] == 3
    assert record["calibration"] == {
        "source": str(tokens),
        "sequences": 4,
        "tokens": 24,
        "first_token": None,  # random windows begin with this and that
        "sha256": report.calibration.sha256,
    }
    assert set(record["versions"]) >= {"torch", "transformers", "llm-barber", "python"}
    assert len(record["layers"]) == 2
    for layer in record["layers"]:
        assert [block["name"] for block in layer["blocks"]] == ["attention", "mlp"]
        for block in layer["blocks"]:
            assert 0 < block["error_after"] < block["error_before"]
            assert sum(linear["grown"] - linear["dropped"] for linear in block["linears"]) == 0
            assert sum(linear["beneficial_pairs"] for linear in block["linears"]) // 2 == sum(
                linear["swaps"] for linear in block["linears"]
            )
    assert RunReport.model_validate(record) == report
    card = (tmp_path / "out" / "README.md").read_text()
    assert "arXiv preprint arXiv:2408.10631" in card
    assert "| self_attn.q_proj | 2,048 |" in card


def test_error_before_is_of_the_initial_mask(tmp_path: Path, llama: Path, tokens: Path) -> None:
    """A ratio that swaps nothing leaves the error as it was: before and after are the same measurement."""
    report = run(llama, tmp_path / "out", tokens, rebuild_ratio=1e-9, dtype="float32")
    assert report.swapped == 0
    for layer in report.layers:
        for block in layer.blocks:
            assert block.error_after == pytest.approx(block.error_before, rel=1e-5)


def test_keep_updates_keeps_sparsegpts_weights(tmp_path: Path, llama: Path, tokens: Path) -> None:
    dense = read_folder(llama)
    run(llama, tmp_path / "plain", tokens, initial="sparsegpt", rebuild=False)
    run(llama, tmp_path / "updated", tokens, initial="sparsegpt", rebuild=False, keep_updates=True)
    report = run(llama, tmp_path / "rebuilt", tokens, initial="sparsegpt", rebuild_ratio=0.5, keep_updates=True)
    plain, updated, rebuilt = (read_folder(tmp_path / name) for name in ("plain", "updated", "rebuilt"))
    for name in filter(is_linear, dense):
        assert torch.equal(plain[name] != 0, updated[name] != 0)
        assert (updated[name] != dense[name]).float().mean() > 0.9
    name = "model.layers.0.self_attn.q_proj.weight"
    grown = (rebuilt[name] != 0) & (plain[name] == 0)
    stayed = (rebuilt[name] != 0) & (plain[name] != 0)
    assert grown.any()
    assert torch.equal(rebuilt[name][grown], dense[name][grown])
    assert torch.equal(rebuilt[name][stayed], updated[name][stayed])
    assert report.sparsity == 0.5
    assert inspect(InspectConfig(model=str(tmp_path / "rebuilt"), dense=str(llama))).problems == ()


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
        (f"model.layers.{layer.index}.{one.name}.weight"): one for layer in report.layers for one in layer.linears
    }
    for name in masks:
        natural = tensors[name] == 0
        assert (after[name] == 0).sum() == (before[name] == 0).sum()
        assert counts[name].pruned == ((before[name] == 0) & ~natural).sum()
        assert counts[name].zeros == (before[name] == 0).sum()


def test_prune_never_overshoots_on_tied_and_zero_weights(tmp_path: Path, llama: Path, tokens: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    for name in filter(is_linear, tensors):
        tensors[name] = (tensors[name] * 8).round() / 8  # a dozen distinct values, many zeros
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    for initial in ("magnitude", "wanda", "sparsegpt"):
        report = run(llama, tmp_path / initial, tokens, initial=initial, rebuild_ratio=0.5)
        assert all(linear.pruned == linear.weights // 2 for linear in report.linears) or initial == "magnitude"
        assert report.sparsity == 0.5
        assert inspect(InspectConfig(model=str(tmp_path / initial), dense=str(llama))).problems == ()


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
        name: one * 0 if is_linear(name) else one for name, one in load_file(llama / "model.safetensors").items()
    }
    save_file(tensors, empty / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="all linears of .* are zero"):
        rebuild(RebuildConfig(pruned=str(empty), **settings))
    one = {**load_file(llama / "model.safetensors"), "model.layers.0.self_attn.q_proj.weight": torch.zeros(32, 32)}
    save_file(one, empty / "model.safetensors", {"format": "pt"})
    report = rebuild(RebuildConfig(pruned=str(empty), **settings))  # as it would be in another layer
    assert [linear.pruned for linear in report.layers[0].linears] == [1024, 0, 0, 0, 0, 0, 0]
    settings["overwrite"] = True
    deeper = make_model(tmp_path / "deeper", "llama", num_hidden_layers=3)
    with pytest.raises(ModelError, match="DENSE has 2 decoder layers, PRUNED 3"):
        rebuild(RebuildConfig(pruned=str(deeper), **settings))


def test_half_precision_is_judged_by_its_values_not_by_their_sum(tmp_path: Path, llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    tensors["model.embed_tokens.weight"] += 10
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    tokens = save_tokens(tmp_path / "many.safetensors", sequences=64, tokens=64)
    report = run(llama, tmp_path / "out", tokens, dtype="float16", preset="paper")
    assert report.sparsity == 0.5


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
    one, two = read_folder(tmp_path / "one"), read_folder(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one if "layers.0." in name)


def expect_failure(message: str, kind: type[BarberError], tmp_path: Path, **settings: object) -> BarberError:
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(kind, match=message) as caught:
        prune(PruneConfig(**{"output": tmp_path / "out", **settings}))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert caught.value.hint
    return caught.value


def test_bad_input_says_what_is_wrong_and_leaves_nothing(tmp_path: Path, llama: Path, tokens: Path) -> None:
    good = {"model": str(llama), "calibration": str(tokens)}
    expect_failure("no such model", ModelError, tmp_path, **good | {"model": str(tmp_path / "nothing")})
    expect_failure("pattern 2:5 does not divide the 32 inputs of", ModelError, tmp_path, **good, pattern="2:5")
    expect_failure("beyond the model's 64 positions", CalibrationError, tmp_path, model=str(llama), seqlen=65)
    expect_failure("device cuda:7 is not there|unknown device", SettingsError, tmp_path, **good, device="cuda:7")
    expect_failure("no tokenizer", CalibrationError, tmp_path, model=str(llama), seqlen=8)
    big = save_tokens(tmp_path / "big.safetensors", vocabulary=5000)
    expect_failure(
        "outside the model's vocabulary of 128", CalibrationError, tmp_path, **good | {"calibration": str(big)}
    )
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x").write_text("")
    expect_failure("exists", OutputError, tmp_path, **good, output=tmp_path / "there")
    change_json(llama / "config.json", model_type="bert")
    error = expect_failure("bert is an encoder", ModelError, tmp_path, **good)
    assert "decoder models" in error.hint


def test_shapes_that_do_not_fit_the_configuration(tmp_path: Path, llama: Path, tokens: Path) -> None:
    change_json(llama / "config.json", intermediate_size=48)
    expect_failure("the configuration says", ModelError, tmp_path, model=str(llama), calibration=str(tokens))


def test_checkpoints_that_do_not_fit_their_configuration(tmp_path: Path, llama: Path, tokens: Path) -> None:
    good = {"model": str(llama), "calibration": str(tokens)}
    whole = load_file(llama / "model.safetensors")
    name = "model.layers.1.input_layernorm.weight"
    for tensors, message in (
        ({key: one for key, one in whole.items() if key != name}, f"has no tensor '{name}'"),
        (whole | {name: torch.ones(7)}, f"{name} has shape \\(7,\\), the configuration says \\(32,\\)"),
        (whole | {name: torch.ones(32, dtype=torch.int8)}, f"{name} is I8; F64"),
    ):
        save_file(tensors, llama / "model.safetensors", {"format": "pt"})
        expect_failure(message, ModelError, tmp_path, **good)
    save_file(whole, llama / "model.safetensors", {"format": "pt"})
    change_json(llama / "config.json", num_hidden_layers=1)
    expect_failure("has decoder layer 1, config.json says that there are 1", ModelError, tmp_path, **good)
    change_json(llama / "config.json", num_hidden_layers=0)
    expect_failure("does not describe a model", ModelError, tmp_path, **good)
    change_json(llama / "config.json", num_hidden_layers=2, hidden_act="zzz")
    expect_failure("does not describe a model: .*zzz", ModelError, tmp_path, **good)


def test_a_missed_sparsity_is_said(tmp_path: Path, llama: Path, tokens: Path) -> None:
    told = Listener()
    config = PruneConfig(model=llama, output=tmp_path / "out", calibration=tokens, sparsity=0.999, preset="paper")
    prune(config, told)
    nothing_swapped, missed = told.warnings
    assert "the rebuild swapped nothing" in nothing_swapped
    assert "0.999 was asked for, 0.97" in missed


def test_odd_outputs(tmp_path: Path, llama: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "later")
    assert run(llama, tmp_path / "link", tokens).output == str(tmp_path / "real")
    assert run(llama, tmp_path / "link", tokens, overwrite=True, rebuild=False).swapped == 0
    assert run(llama, tmp_path / "dangling", tokens).output == str(tmp_path / "later")
    assert (tmp_path / "link").is_symlink()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "models").mkdir()
    with pytest.raises(SettingsError, match="contains model"):
        run(shutil.copytree(llama, tmp_path / "models" / "a"), tmp_path / "models", tokens)
    shutil.copytree(llama, tmp_path / "x.partial")
    expect_failure("is in the way", OutputError, tmp_path, model=tmp_path / "x.partial", output=tmp_path / "x")
    with pytest.raises(SettingsError, match="output"):
        PruneConfig(model="m", output=None)


def test_activations_that_overflow_are_named(tmp_path: Path, llama: Path, tokens: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 3e38
    tensors["model.layers.1.mlp.down_proj.weight"].clamp_(-3e38, 3e38)
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    for rebuilt in (True, False):
        error = expect_failure(
            "the output of layer 1 mlp holds NaN or Inf", ModelError, tmp_path,
            model=str(llama), calibration=str(tokens), rebuild=rebuilt,
        )  # fmt: skip
        assert "--dtype" in error.hint


@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
def test_inputs_of_a_linear_that_overflow_are_named(tmp_path: Path, llama: Path, tokens: Path, method: str) -> None:
    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 3e38
    tensors["model.layers.1.mlp.up_proj.weight"].clamp_(-3e38, 3e38)
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    expect_failure(
        "the input of layer 1 mlp.down_proj holds NaN or Inf", ModelError, tmp_path,
        model=str(llama), calibration=str(tokens), initial=method,
    )  # fmt: skip


def test_pruned_of_another_shape(tmp_path: Path, llama: Path, tokens: Path) -> None:
    other = make_model(tmp_path / "other", "llama", intermediate_size=48)
    mistral = make_model(tmp_path / "mistral", "mistral")
    settings = {"dense": str(llama), "calibration": str(tokens), "output": tmp_path / "out"}
    with pytest.raises(ModelError, match=r"is \(64, 32\) in DENSE and \(48, 32\) in PRUNED"):
        rebuild(RebuildConfig(pruned=str(other), **settings))
    with pytest.raises(ModelError, match="DENSE is llama, PRUNED is mistral"):
        rebuild(RebuildConfig(pruned=str(mistral), **settings))
    assert not (tmp_path / "out").exists()


def test_all_wrong_settings_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        PruneConfig(model="m", output=tmp_path, sparsity=1.5, samples=0, dtype="int8", pattern="4:2", rebuild_ratio=2)
    for part in ("sparsity 1.5", "samples", "int8", "4:2", "rebuild_ratio"):
        assert part in str(caught.value)
    assert caught.value.exit_code == 2
    with pytest.raises(SettingsError, match="output is model itself"):
        PruneConfig(model=str(tmp_path), output=tmp_path / "." / "x" / "..")
    with pytest.raises(SettingsError, match="the rebuild, which is switched off"):
        PruneConfig(model="m", output=tmp_path, rebuild=False, granularity="block")
    with pytest.raises(SettingsError, match="not for patterns"):
        PruneConfig(model="m", output=tmp_path, pattern="2:4", initial_granularity="input")
    with pytest.raises(SettingsError, match="exclude each other"):
        PruneConfig(model="m", output=tmp_path, sparsity=0.5, pattern="2:4")
    with pytest.raises(SettingsError, match="keep_updates needs initial sparsegpt"):
        PruneConfig(model="m", output=tmp_path, keep_updates=True)
    (tmp_path / "a").mkdir()
    with pytest.raises(SettingsError, match="contains dense"):
        RebuildConfig(dense=str(tmp_path / "a"), pruned="p", output=tmp_path)


def test_default_granularity_and_ratio_are_the_released_ones(tmp_path: Path, llama: Path, tokens: Path) -> None:
    found = {}
    for initial in ("magnitude", "wanda", "sparsegpt"):
        report = run(llama, tmp_path / initial, tokens, initial=initial)
        found[initial] = (report.granularity, report.rebuild_ratio)
    assert found == {"magnitude": ("block", 0.1), "wanda": ("output", 0.01), "sparsegpt": ("linear", 0.1)}
    assert run(llama, tmp_path / "nm", tokens, initial="magnitude", pattern="2:4").granularity == "output"


def test_magnitude_by_output_row(tmp_path: Path, llama: Path, tokens: Path) -> None:
    run(
        llama, tmp_path / "out", tokens, initial="magnitude", initial_granularity="output", rebuild=False, sparsity=0.25
    )
    for name, tensor in read_folder(tmp_path / "out").items():
        if is_linear(name):
            assert ((tensor == 0).sum(1) == Unstructured(0.25).pruned(tensor.shape[1])).all()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"preset": "mask", "refine": "tune", "allocation": "loss", "target_mix": 0.5, "guard": 0.03125}),
        ({"pattern": "2:4"}, {"preset": "mask", "allocation": "uniform", "target_mix": 0.75}),
        ({"preset": "best"}, {"preset": "best", "reconstruct": "tune", "tune_passes": 16}),
        ({"initial": "magnitude"}, {"preset": "paper", "granularity": "block", "rebuild_ratio": 0.1}),
        ({"rebuild": False}, {"preset": None, "rebuild": False, "refine": "none", "initial": "wanda"}),
        ({"refine": "swaps", "pattern": "2:4"}, {"preset": None, "swaps": 400, "tune_passes": None, "guard": 0.125}),
    ],
)
def test_the_record_says_what_was_left_to_presets(
    tmp_path: Path, llama: Path, tokens: Path, settings: dict[str, Any], expected: dict[str, Any]
) -> None:
    report = prune(PruneConfig(model=llama, output=tmp_path / "out", calibration=tokens, **settings))
    assert expected.items() <= json.loads(report.to_json())["resolved"].items()
    assert report.resolved["samples"] == report.calibration.sequences
    named = f"preset {expected['preset']}; " if expected["preset"] else ""
    assert f"; {named}" in (tmp_path / "out" / "README.md").read_text()
    assert ("preset" in report.changes) == bool(named)


def test_what_held_out_windows_say_is_told(tmp_path: Path, llama: Path, tokens: Path) -> None:
    report = prune(PruneConfig(model=llama, output=tmp_path / "out", calibration=tokens))
    nearer = [[error for error in layer.held_out if error < layer.held_out[0]] for layer in report.layers]
    shares = [
        1 - errors[-1] / layer.held_out[0] if errors else 0.0
        for errors, layer in zip(nearer, report.layers, strict=True)
    ]
    kept = sum(map(bool, nearer))
    assert report.tuning is not None
    assert f"−{sum(shares) / 2:.0%} in the mean, {kept} of 2 layers are kept as tuned" in report.tuning
    assert ("blocks left as they were" in report.tuning) == bool(report.rejected)
    assert report.tuning in (tmp_path / "out" / "README.md").read_text()
    assert prune(PruneConfig(model=llama, output=tmp_path / "p", calibration=tokens, preset="paper")).tuning is None


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("llama", {"rms_norm_eps": float("inf")}, "rms_norm_eps: inf"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}}, "rope_parameters: "),
        (
            "gemma3",
            {"text_config": {**FAMILIES["gemma3"]["text_config"], "rms_norm_eps": float("-inf")}},
            "text_config.rms",
        ),
        ("bamba", {"time_step_limit": [0.0, float("inf")]}, None),  # its default
    ],
)
def test_numbers_of_a_configuration_are_finite(
    tmp_path: Path, tokens: Path, family: str, changes: dict[str, Any], says: str | None
) -> None:
    model = make_model(tmp_path / "model", family)
    change_json(model / "config.json", **changes)
    if says is None:
        load_config(CheckpointSource(model))
    else:
        good = {"model": str(model), "calibration": str(tokens)}
        expect_failure(f"config.json of .* says {re.escape(says)}", ModelError, tmp_path, **good)


def test_positions_that_are_not_numbers(tmp_path: Path, llama: Path, tokens: Path) -> None:
    """An absurd frequency makes NaN, which equals no NaN, and is not what depends on the tokens."""
    change_json(llama / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 0})
    expect_failure("NaN or Inf", ModelError, tmp_path, model=str(llama), calibration=str(tokens))


def test_more_layers_than_tensors(tmp_path: Path, llama: Path, tokens: Path) -> None:
    change_json(llama / "config.json", num_hidden_layers=10**9)
    good = {"model": str(llama), "calibration": str(tokens)}
    expect_failure("says num_hidden_layers: 1,000,000,000, but its weights are", ModelError, tmp_path, **good)


@pytest.mark.parametrize(
    "settings", [{"layers": ""}, {"include": ("",)}, {"exclude": ["q_proj", " "]}, {"calibration": ""}, {"model": ""}]
)
def test_empty_settings_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=rf"{next(iter(settings))}: is empty"):
        PruneConfig(**{"model": "m", "output": tmp_path, **settings})


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
