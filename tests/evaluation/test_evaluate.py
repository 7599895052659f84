import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_barber import EvaluateConfig, Evaluation, evaluate
from llm_barber.errors import CalibrationError, HubError, ModelError, SettingsError
from llm_barber.evaluation.predictions import perplexity
from llm_barber.evaluation.texts import evaluation_text, evaluation_windows
from tests.conftest import FAMILIES, Listener, change_json, load_model, make_model, save_tokens
from tests.helpers.text import add_tokenizer, tokenize_characters


@pytest.fixture
def text(tmp_path: Path) -> str:
    generator = torch.Generator().manual_seed(0)
    characters = torch.randint(33, 126, (3 * 16 + 5,), generator=generator).tolist()
    (tmp_path / "text.txt").write_text("".join(map(chr, characters)))
    return str(tmp_path / "text.txt")


def model_and_windows(folder: Path, text: str) -> tuple[torch.nn.Module, torch.Tensor]:
    ids = torch.tensor([ord(letter) - 32 for letter in Path(text).read_text()][:48]).view(3, 16)
    return load_model(folder, dtype=torch.float32).eval(), ids


def run(model: Path, text: str, **settings: object) -> Evaluation:
    return evaluate(EvaluateConfig(**{"model": model, "text": (text,), "seqlen": 16, "dtype": "float32", **settings}))


@pytest.mark.parametrize(
    ("family", "untied"),
    [*((family, False) for family in FAMILIES), ("llama", True), ("opt", True), ("gpt_neox", True)],
)
def test_equals_transformers_own_loss(tmp_path: Path, text: str, family: str, untied: bool) -> None:
    folder = make_model(tmp_path / "model", family, tie_word_embeddings=not untied)
    add_tokenizer(folder)
    model, windows = model_and_windows(folder, text)
    with torch.no_grad():
        losses = [model(input_ids=window[None], labels=window[None]).loss.item() for window in windows]
    (result,) = run(folder, text, batch_size=2).texts
    assert math.log(result.perplexity) == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert math.log(perplexity(model, windows)) == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert (result.windows, result.seqlen, result.begins_with_bos) == (3, 16, False)


def test_windows_follow_each_other_and_c4_has_its_first_256() -> None:
    assert evaluation_windows("text", "ABCDEFG", tokenize_characters, 2).tolist() == [[65, 66], [67, 68], [69, 70]]
    assert evaluation_windows("text", "ABCDEFG", tokenize_characters, 2, 1).tolist() == [[65, 66]]
    assert len(evaluation_windows("c4", "A" * 600, tokenize_characters, 2)) == 256


def test_each_window_begins_with_bos_where_texts_do(tmp_path: Path, text: str) -> None:
    folder = make_model(tmp_path / "model", "llama")
    add_tokenizer(folder, bos=True)
    characters = [ord(letter) - 32 for letter in Path(text).read_text()]
    model = load_model(folder, dtype=torch.float32).eval()
    for bos, count, tokens in ((True, 3, characters[:45]), (False, 3, [94, *characters][:48])):
        windows = torch.tensor(tokens).view(count, -1)
        if bos:
            windows = torch.cat([torch.full((count, 1), 94), windows], 1)
        with torch.no_grad():
            losses = [model(input_ids=window[None], labels=window[None]).loss.item() for window in windows]
        (result,) = run(folder, text, bos=bos).texts
        assert math.log(result.perplexity) == pytest.approx(sum(losses) / count, rel=1e-5)
        assert (result.windows, result.seqlen, result.begins_with_bos) == (count, 16, bos)


def test_comparison_equals_its_definition(tmp_path: Path, text: str) -> None:
    model_folder, other = make_model(tmp_path / "model", "llama"), make_model(tmp_path / "other", "llama", seed=1)
    add_tokenizer(model_folder)
    (result,) = run(model_folder, text, against=other).texts
    p, q = [], []
    for folder, distributions in ((other, p), (model_folder, q)):
        model, windows = model_and_windows(folder, text)
        with torch.no_grad():
            distributions.append(model(input_ids=windows).logits[:, :-1].double().softmax(-1))
    divergence = (p[0] * (p[0].log() - q[0].log())).sum(-1).mean().item()
    assert result.against is not None
    assert result.against.divergence == pytest.approx(divergence, rel=1e-4)
    assert result.against.top_agreement == pytest.approx((p[0].argmax(-1) == q[0].argmax(-1)).double().mean().item())
    assert result.against.perplexity_ratio == pytest.approx(result.perplexity / result.against.perplexity)
    (same,) = run(model_folder, text, against=model_folder).texts
    assert same.against is not None
    assert (same.against.perplexity_ratio, same.against.top_agreement) == (1.0, 1.0)
    assert same.against.divergence == pytest.approx(0.0, abs=1e-9)


def test_bad_input(tmp_path: Path, llama: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="has no tokenizer"):
        run(llama, text)
    add_tokenizer(llama)
    with pytest.raises(CalibrationError, match="no such text: nothing") as caught:
        run(llama, "nothing")
    assert "wikitext2, ptb, c4" in caught.value.hint
    with pytest.raises(CalibrationError, match="holds tokens, not text"):
        run(llama, str(save_tokens(tmp_path / "tokens.safetensors")))
    with pytest.raises(CalibrationError, match="has 53 tokens, fewer than one window of 60"):
        run(llama, text, seqlen=60)
    with pytest.raises(CalibrationError, match="beyond the model's 64 positions"):
        run(llama, text, seqlen=65)
    with pytest.raises(SettingsError, match="dtype: 'int8'"):
        run(llama, text, dtype="int8")
    small = make_model(tmp_path / "small", "llama", vocab_size=20)
    with pytest.raises(ModelError, match="has a vocabulary of 128, .* one of 20"):
        run(llama, text, against=small)
    add_tokenizer(small)
    with pytest.raises(CalibrationError, match="outside the model's vocabulary of 20"):
        run(small, text)
    other = make_model(tmp_path / "other", "llama")
    add_tokenizer(other)
    vocabulary = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(vocabulary.replace('"a": 65', '"a": 66').replace('"b": 66', '"b": 65'))
    with pytest.raises(ModelError, match="has another tokenizer"):
        run(llama, text, against=other)
    tensors = load_file(llama / "model.safetensors")
    tensors["model.norm.weight"][:] = 1e6
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="overflows: its mean loss is"):
        run(llama, text)
    tensors["model.norm.weight"][:] = 3e38
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="gives NaN or Inf logits in window 0"):
        run(llama, text)

    def offline(**_: object) -> None:
        raise ConnectionError

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(HubError, match="could not be loaded from the hub"):
        run(llama, "ptb")


@pytest.mark.parametrize("against", ["itself", "a whole model"])
def test_a_buffer_that_the_checkpoint_lacks_is_told_of(tmp_path: Path, text: str, against: str) -> None:
    whole, model = (make_model(tmp_path / name, "deepseek_v3") for name in ("whole", "model"))
    for folder in (whole, model):
        add_tokenizer(folder)
    tensors = load_file(model / "model.safetensors")
    (lacking,) = [name for name in tensors if name.endswith("e_score_correction_bias")]
    save_file({name: tensor for name, tensor in tensors.items() if name != lacking}, model / "model.safetensors")
    listener = Listener()
    other = str(model if against == "itself" else whole)
    settings = EvaluateConfig(model=str(model), against=other, text=(text,), seqlen=16, windows=1)
    evaluate(settings, listener)
    assert listener.warnings == [f"{model} has no {lacking}: an untrained model's values are taken"]


def test_texts_are_joined_as_released_programs_join_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert evaluation_text("wikitext2").startswith("\n\n = Robert Boulter = \n\n\n\n\n Robert Boulter is")
    monkeypatch.setattr("datasets.load_dataset", lambda **_: {"sentence": ["a b", "c"], "text": ["x"] * 2000})
    assert evaluation_text("ptb") == "a b c"
    assert evaluation_text("c4") == " ".join(["x"] * 1100)


def test_a_damaged_tokenizer(llama: Path, text: str) -> None:
    add_tokenizer(llama)
    change_json(llama / "tokenizer_config.json", model_max_length="x")
    with pytest.raises(CalibrationError, match="tokenizer cannot make tokens of text") as caught:
        run(llama, text)
    assert "tokenizer_config.json" in caught.value.hint


def test_a_text_of_a_user_who_is_not_there(llama: Path) -> None:
    add_tokenizer(llama)
    with pytest.raises(CalibrationError, match="no such text: ~nobody-here/x.txt"):
        run(llama, "~nobody-here/x.txt")
