"""transformers' `from_pretrained` loads packed folders once `register` was called, and none without it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM, pipeline

import llm_barber
from llm_barber import (
    InspectConfig,
    PackConfig,
    PackedConfig,
    PruneConfig,
    inspect,
    load,
    pack,
    prune,
    register,
    unpack,
)
from llm_barber.checkpoint.hub import INDEX_NAME
from llm_barber.checkpoint.packed_format import PACKED_INDEX
from llm_barber.errors import BarberError, ModelError, NotFiniteError, SettingsError, VerificationError
from llm_barber.model.empty import auto_class
from llm_barber.runtime.packed_linear import PackedLinear
from llm_barber.runtime.registry import PackedQuantizer
from tests.conftest import change_json, load_model, make_model, save_tokens
from tests.helpers.shards import split_in_two_shards
from tests.helpers.text import add_tokenizer

IDS = torch.arange(1, 21)[None]


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


def zero_weights(folder: Path) -> Path:
    """Set 60 % of each matrix of a checkpoint, but of its embedding, to zero."""
    generator = torch.Generator().manual_seed(1)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if tensor.dim() in (2, 3) and "embed" not in name:
                tensor[torch.rand(tensor.shape, generator=generator) < 0.6] = 0
        save_file(tensors, file, {"format": "pt"})
    return folder


def make_packed(tmp_path: Path, family: str = "llama", sharded: bool = False, **changes: Any) -> tuple[Path, Path]:
    """A dense and a packed folder of the same tiny model."""
    dense = zero_weights(make_model(tmp_path / "dense", family, dtype=torch.bfloat16, **changes))
    if sharded:
        split_in_two_shards(dense)
    pack(PackConfig(model=str(dense), output=tmp_path / "packed"))
    return dense, tmp_path / "packed"


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(IDS).logits
    return result


def packed_linears(model: torch.nn.Module) -> int:
    return sum(isinstance(module, PackedLinear) for module in model.modules())


def assert_same_state(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    """Parameters and buffers have the same names, dtypes and values."""
    for kind in ("named_parameters", "named_buffers"):
        state, expected_state = dict(getattr(model, kind)()), dict(getattr(expected, kind)())
        assert state.keys() == expected_state.keys()
        for name, tensor in expected_state.items():
            assert state[name].dtype == tensor.dtype, name
            assert state[name].requires_grad == tensor.requires_grad, name
            assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("sharded", [False, True])
def test_from_pretrained_equals_the_dense_model(tmp_path: Path, sharded: bool) -> None:
    dense, packed = make_packed(tmp_path, "qwen2", sharded)  # with biases
    expected = AutoModelForCausalLM.from_pretrained(dense)
    model, report = AutoModelForCausalLM.from_pretrained(
        packed, quantization_config=PackedConfig(keep_packed=False), output_loading_info=True
    )
    assert not any(report.values())
    assert_same_state(model, expected)
    assert torch.equal(logits(model), logits(expected))
    assert torch.equal(logits(load(packed)), logits(expected))
    assert {**model.config.to_dict(), "_name_or_path": str(dense)} == expected.config.to_dict()
    assert model.__dict__.keys() == expected.__dict__.keys() | {"keep_packed"}  # nothing that a quantised model has
    kept = AutoModelForCausalLM.from_pretrained(packed, quantization_config=PackedConfig(keep_packed=True))
    assert packed_linears(kept) == 15  # the output head, too
    assert torch.allclose(logits(kept), logits(expected), rtol=0.02, atol=0.02)
    assert torch.equal(logits(kept), logits(load(packed, keep_packed=True)))
    words = expected.generate(IDS[:, :4], max_new_tokens=5, do_sample=False)
    for other in (model, kept):
        assert torch.equal(other.generate(IDS[:, :4], max_new_tokens=5, do_sample=False), words)


def test_linears_are_chosen_as_by_load(tmp_path: Path) -> None:
    _, packed = make_packed(tmp_path)
    chosen = {"model.layers.0.self_attn.q_proj": True, "model.layers.1.mlp.up_proj": True}
    model = AutoModelForCausalLM.from_pretrained(packed, quantization_config=PackedConfig(keep_packed=chosen))
    assert packed_linears(model) == 2
    assert {name for name, kept in model.keep_packed.items() if kept} == chosen.keys()
    assert AutoModelForCausalLM.from_pretrained(packed, quantization_config=PackedConfig("auto")).keep_packed
    with pytest.raises(SettingsError, match="keep_packed cannot be 'never'"):
        PackedConfig("never")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "family", ["gemma3", "gemma3_text", "gptj", "mixtral", "deepseek_v3", "gpt_oss", "qwen3_next", "granitemoe"]
)
def test_families(tmp_path: Path, family: str) -> None:
    """Buffers that are computed, experts that are stacked, and parameters that stay in float32."""
    dense, packed = make_packed(tmp_path, family)
    expected = load_model(dense)
    model = load_model(packed, quantization_config=PackedConfig(keep_packed=False))
    assert_same_state(model, expected)
    assert torch.equal(logits(model), logits(expected))
    buffers = dict(load(packed).named_buffers())
    for name, buffer in expected.named_buffers():
        assert buffers[name].dtype == buffer.dtype
        assert torch.equal(buffers[name], buffer), name


def test_any_class_and_dtype(tmp_path: Path) -> None:
    dense, packed = make_packed(tmp_path)
    expected = LlamaForCausalLM.from_pretrained(dense, dtype=torch.float32)
    assert_same_state(LlamaForCausalLM.from_pretrained(packed, dtype=torch.float32), expected)
    kept = load_model(packed, dtype=torch.float32, quantization_config=PackedConfig(keep_packed=True))
    assert next(kept.parameters()).dtype == torch.float32
    assert torch.allclose(logits(kept), logits(expected), rtol=1e-5, atol=1e-5)
    assert_same_state(AutoModel.from_pretrained(packed), AutoModel.from_pretrained(dense))


def test_offloading_is_refused(tmp_path: Path) -> None:
    _, packed = make_packed(tmp_path)
    with pytest.raises(SettingsError, match="offloads a part of the packed model to disk") as caught:
        AutoModelForCausalLM.from_pretrained(
            packed, device_map={"model": "cpu", "lm_head": "disk"}, offload_folder=tmp_path / "offload"
        )
    assert "llm-barber unpack" in caught.value.hint


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings(tmp_path: Path, tied: bool) -> None:
    dense, packed = make_packed(tmp_path, tie_word_embeddings=tied)
    for keep_packed in (False, True):
        model = AutoModelForCausalLM.from_pretrained(packed, quantization_config=PackedConfig(keep_packed))
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
        assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(dense)))


@pytest.mark.parametrize("sharded", [False, True])
def test_a_head_that_is_stored_beside_the_embedding_is_loaded(tmp_path: Path, sharded: bool) -> None:
    dense = zero_weights(make_model(tmp_path / "dense", "llama", dtype=torch.bfloat16, tie_word_embeddings=False))
    if sharded:
        split_in_two_shards(dense)
    change_json(dense / "config.json", tie_word_embeddings=True)
    pack(PackConfig(model=str(dense), output=tmp_path / "packed"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(model), logits(load(dense)))
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_pipeline(tmp_path: Path) -> None:
    dense, packed = make_packed(tmp_path)
    for folder in (dense, packed):
        add_tokenizer(folder)
    settings = {"max_new_tokens": 4, "do_sample": False}
    texts = [
        pipeline("text-generation", model=str(folder), device="cpu")("a b", **settings) for folder in (dense, packed)
    ]
    assert texts[0] == texts[1]


def test_lm_eval_takes_the_folder(tmp_path: Path) -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    dense, packed = make_packed(tmp_path)
    for folder in (dense, packed):
        add_tokenizer(folder)
    models = [huggingface.HFLM(pretrained=str(folder), device="cpu", dtype="auto") for folder in (dense, packed)]
    with torch.no_grad():
        assert torch.equal(models[0]._model_call(IDS), models[1]._model_call(IDS))


def test_saving_a_model_that_is_dense_in_memory_works(tmp_path: Path) -> None:
    dense, packed = make_packed(tmp_path, "mixtral")
    model = AutoModelForCausalLM.from_pretrained(packed, quantization_config=PackedConfig(keep_packed=False))
    model.save_pretrained(tmp_path / "saved")
    content = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "quantization_config" not in content
    assert "transformers_weights" not in content
    expected, saved = load_file(dense / "model.safetensors"), load_file(tmp_path / "saved" / "model.safetensors")
    assert expected.keys() == saved.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("loader", ["load", "from_pretrained"])
def test_saving_a_model_that_is_packed_in_memory_is_refused_until_it_is_dequantised(
    tmp_path: Path, loader: str
) -> None:
    dense, packed = make_packed(tmp_path, "qwen2")
    if loader == "load":
        model = load(packed, keep_packed=True)
    else:
        model = AutoModelForCausalLM.from_pretrained(packed, quantization_config=PackedConfig(keep_packed=True))
    assert isinstance(model.hf_quantizer, PackedQuantizer)
    with pytest.raises(SettingsError, match=r"cannot be saved: model\.dequantize\(\) unpacks them") as caught:
        model.save_pretrained(tmp_path / "saved")
    assert "copy the packed folder" in caught.value.hint
    assert not (tmp_path / "saved").exists()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.dequantize()
    assert packed_linears(model) == 0
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")),
        logits(AutoModelForCausalLM.from_pretrained(dense)),
    )


def test_without_the_package_loading_fails(tmp_path: Path) -> None:
    """transformers alone must not give a model with random weights."""
    folders = [make_packed(tmp_path / str(sharded), sharded=sharded)[1] for sharded in (False, True)]
    program = f"""
import sys
sys.modules["llm_barber"] = None  # an import of it is an error
from transformers import AutoModelForCausalLM
for folder in {[str(folder) for folder in folders]!r}:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except OSError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("no file named model.safetensors") == 2
    assert "Unknown quantization type, got llm-barber" in done.stderr
    for folder in folders:
        entry = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert "pip install llm-barber" in entry["needs"]
        assert "llm_barber.register()" in entry["needs"]
        assert "transformers_weights" not in (folder / "config.json").read_text()


def test_folders_of_earlier_versions_load(tmp_path: Path) -> None:
    """They have no entry in config.json."""
    dense, packed = make_packed(tmp_path)
    (packed / "config.json").write_bytes((dense / "config.json").read_bytes())
    expected = logits(AutoModelForCausalLM.from_pretrained(dense))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(packed)), expected)
    kept = AutoModelForCausalLM.from_pretrained(packed, quantization_config=PackedConfig(keep_packed=True))
    assert packed_linears(kept) == 14
    assert torch.equal(logits(load(packed)), expected)
    with pytest.raises(ModelError, match="so that it is not packed") as caught:
        LlamaForCausalLM.from_pretrained(packed, quantization_config=PackedConfig())  # which does not tell its folder
    assert "AutoModelForCausalLM" in caught.value.hint
    unpack(PackConfig(model=str(packed), output=tmp_path / "unpacked"))
    assert (tmp_path / "unpacked" / "config.json").read_bytes() == (dense / "config.json").read_bytes()


def test_a_folder_of_the_hub_loads_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, packed = make_packed(tmp_path, sharded=True)
    commit = "0123456789" * 4
    repository = tmp_path / "cache" / "models--org--packed"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    packed.rename(repository / "snapshots" / commit)
    asked: list[tuple[str, str]] = []

    def resolve(name: str, revision: str) -> Path:
        asked.append((name, revision))
        return repository / "snapshots" / revision

    monkeypatch.setattr("llm_barber.runtime.registry.resolve_model", resolve)
    model = AutoModelForCausalLM.from_pretrained("org/packed", cache_dir=tmp_path / "cache", local_files_only=True)
    assert asked == [("org/packed", commit)]
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(dense)))


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    _, packed = make_packed(tmp_path)
    shard = packed / "packed-model.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(Exception, match="truncated|incomplete|deserializing"):
        AutoModelForCausalLM.from_pretrained(packed)
    tensors = load_file_of(content, tmp_path)
    name = next(name for name in tensors if name.endswith(".packed_values"))
    metadata = metadata_of(content)
    save_file({**tensors, name: tensors[name][:-1].clone()}, shard, metadata)
    with pytest.raises(ModelError, match="values"):
        AutoModelForCausalLM.from_pretrained(packed)
    tensors[name][0] = float("nan")
    save_file(tensors, shard, metadata)
    with pytest.raises(NotFiniteError):
        AutoModelForCausalLM.from_pretrained(packed)
    shard.write_bytes(content)
    index = (packed / PACKED_INDEX).read_bytes()
    (packed / PACKED_INDEX).unlink()
    with pytest.raises(BarberError, match=PACKED_INDEX):
        AutoModelForCausalLM.from_pretrained(packed)
    (packed / PACKED_INDEX).write_bytes(index)
    change_json(packed / "config.json", num_hidden_layers=3)
    with pytest.raises(ModelError, match="has no tensor 'model.layers.2"):
        AutoModelForCausalLM.from_pretrained(packed)


def load_file_of(content: bytes, tmp_path: Path) -> dict[str, Tensor]:
    path = tmp_path / "copy.safetensors"
    path.write_bytes(content)
    return load_file(path)


def metadata_of(content: bytes) -> dict[str, str]:
    header: dict[str, str] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    return header


def test_a_missing_head_is_an_error(tmp_path: Path) -> None:
    """transformers would initialise the new head at random; a packed folder is loaded whole."""
    from transformers import AutoModelForSequenceClassification

    _, packed = make_packed(tmp_path)
    with pytest.raises(ModelError, match=r"has no tensor 'score\.weight'"):
        AutoModelForSequenceClassification.from_pretrained(packed)


def test_wrong_arguments_have_hints(tmp_path: Path, llama: Path) -> None:
    with pytest.raises(ModelError, match="is not packed"):
        AutoModelForCausalLM.from_pretrained(llama, quantization_config=PackedConfig())
    _, packed = make_packed(tmp_path)
    change_json(
        packed / "config.json",
        quantization_config={"quant_method": "llm-barber", "weights": "../packed-model.safetensors"},
    )
    with pytest.raises(ModelError, match=r"config\.json"):
        AutoModelForCausalLM.from_pretrained(packed)


def test_settings_may_be_a_dict(tmp_path: Path) -> None:
    _, packed = make_packed(tmp_path)
    for settings in ({"keep_packed": True}, {"quant_method": "llm-barber", "keep_packed": True, "verify": False}):
        assert packed_linears(AutoModelForCausalLM.from_pretrained(packed, quantization_config=settings)) == 14
    wrong = [({"keep_packed": "never"}, "cannot be 'never'"), ({"keep_pcked": True}, "no setting 'keep_pcked'")]
    for settings, problem in wrong:
        with pytest.raises(SettingsError, match=problem):
            AutoModelForCausalLM.from_pretrained(packed, quantization_config=settings)
    with pytest.raises(SettingsError, match="no setting 'keep_pcked'") as caught:
        PackedConfig(keep_pcked=True)
    assert "keep_packed and verify" in caught.value.hint
    with pytest.raises(ValueError, match="but you are passing"):
        AutoModelForCausalLM.from_pretrained(packed, quantization_config={"quant_method": "gptq", "bits": 4})


@pytest.mark.parametrize("settings", [{"keep_packed": True}, {"verify": True, "keep_packed": "never", "other": 1}])
def test_only_the_caller_chooses_how_a_folder_is_loaded(tmp_path: Path, settings: dict[str, Any]) -> None:
    _, packed = make_packed(tmp_path)
    entry = json.loads((packed / "config.json").read_text())["quantization_config"]
    change_json(packed / "config.json", quantization_config={**entry, **settings})
    words = f"config.json has {', '.join(map(repr, sorted(settings)))}, which is ignored: the caller chooses"
    with pytest.warns(UserWarning, match=words):
        assert packed_linears(AutoModelForCausalLM.from_pretrained(packed)) == 0
    with pytest.warns(UserWarning, match=words):
        model = AutoModelForCausalLM.from_pretrained(packed, quantization_config=PackedConfig(keep_packed=True))
    assert packed_linears(model) == 14
    model.config.name_or_path = str(packed)  # what the caller chose before is the caller's choice
    again = AutoModelForCausalLM.from_pretrained(packed, config=model.config)
    assert packed_linears(again) == 14


@pytest.mark.parametrize("loader", ["load", "from_pretrained"])
def test_tensors_that_the_model_has_no_place_for_are_named(tmp_path: Path, loader: str) -> None:
    dense, packed = make_packed(tmp_path)
    change_json(packed / "config.json", num_hidden_layers=1)
    change_json(dense / "config.json", num_hidden_layers=1)
    with pytest.warns(UserWarning, match=r"no place for model\.layers\.1\..*, .* and 4 more of .*packed: left out"):
        model = load(packed) if loader == "load" else AutoModelForCausalLM.from_pretrained(packed)
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(dense)))


def test_verification_and_record(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama", dtype=torch.bfloat16)
    tokens = save_tokens(tmp_path / "tokens.safetensors")
    prune(PruneConfig(model=model, output=tmp_path / "out", calibration=tokens, report=False, format="packed"))
    packed = tmp_path / "out"
    configuration = (packed / "config.json").read_bytes()
    assert b'"quant_method": "llm-barber"' in configuration
    assert inspect(InspectConfig(model=str(packed))).problems == ()
    card = (packed / "README.md").read_text()
    assert "llm_barber.register()" in card
    assert "pip install llm-barber" in card
    verified = PackedConfig(verify=True)
    assert AutoModelForCausalLM.from_pretrained(packed, quantization_config=verified) is not None
    unpack(PackConfig(model=str(packed), output=tmp_path / "dense"))
    assert (tmp_path / "dense" / "config.json").read_bytes() == (model / "config.json").read_bytes()
    assert inspect(InspectConfig(model=str(tmp_path / "dense"))).problems == ()
    for changed in (
        configuration.replace(b"pip install llm-barber", b"pip install another"),
        configuration.replace(b'"weights": "packed-', b'"weights": "unpacked-'),
        configuration.replace(b'"vocab_size": 128', b'"vocab_size": 0128'),
    ):
        assert changed != configuration
        (packed / "config.json").write_bytes(changed)
        with pytest.raises((VerificationError, ModelError)):
            load(packed, verify=True)
    (packed / "config.json").write_bytes((model / "config.json").read_bytes())  # as earlier versions left it
    (packed / "barber.json").write_bytes((tmp_path / "dense" / "barber.json").read_bytes())
    assert inspect(InspectConfig(model=str(packed))).problems == ()


def test_what_is_made_from_a_packed_folder_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    _, packed = make_packed(tmp_path)
    tokens = save_tokens(tmp_path / "tokens.safetensors")
    prune(PruneConfig(model=packed, output=tmp_path / "out", calibration=tokens, sparsity=0.7, report=False))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert (tmp_path / "out" / INDEX_NAME).exists()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out") is not None
    assert AutoConfig.from_pretrained(packed).quantization_config["quant_method"] == "llm-barber"
    assert auto_class(AutoConfig.from_pretrained(packed)) is AutoModelForCausalLM


def test_registering_twice_does_nothing() -> None:
    from transformers import modeling_utils

    find = modeling_utils.get_hf_quantizer
    llm_barber.register()
    assert modeling_utils.get_hf_quantizer is find
