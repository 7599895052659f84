"""`generate`: the text is transformers' own, timing is on given tokens, and bad input has a hint."""

import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from llm_barber import GenerateConfig, Generation, PackConfig, PruneConfig, generate, load, pack, prune
from llm_barber.errors import BarberError, CalibrationError, ModelError, SettingsError
from llm_barber.progress import Silent
from llm_barber.settings.tools import KeepPacked
from llm_barber.tools.generate import Clock
from llm_barber.tools.generation import Speed
from llm_barber.tools.prompt import prompt_tokens, read_prompt
from tests.conftest import Listener, change_json, load_model, make_model, save_tokens
from tests.helpers.text import add_tokenizer

MODULE = sys.modules["llm_barber.tools.generate"]
PROMPT = "Once upon"
TEMPLATE = "{{ bos_token }}<{{ messages[0]['content'] }}>{% if add_generation_prompt %}:{% endif %}"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = make_model(tmp_path / "model", "llama")
    add_tokenizer(folder)
    return folder


def run(folder: Path, **settings: Any) -> Generation:
    return generate(GenerateConfig(**{"model": folder, "prompt": PROMPT, "max_new_tokens": 8, **settings}))


def greedy(folder: Path, prompt: str = PROMPT, tokens: int = 8) -> list[int]:
    """Tokens that transformers writes by itself."""
    ids = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt").input_ids
    settings = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    output = load_model(folder, dtype=torch.float32).generate(ids, attention_mask=torch.ones_like(ids), **settings)
    written: list[int] = output[0, ids.shape[1] :].tolist()
    return written


def test_the_greedy_text_is_that_of_transformers_and_streams_as_it_is(model: Path) -> None:
    expected = greedy(model)
    pieces: list[str] = []
    config = GenerateConfig(model=model, prompt=PROMPT, max_new_tokens=8, dtype="float32")
    result = generate(config, on_text=pieces.append)
    assert list(result.generated.tokens) == expected
    text = AutoTokenizer.from_pretrained(model).decode(expected, skip_special_tokens=True)
    assert result.generated.text == text
    assert "".join(pieces) == text
    assert len(pieces) > 1
    assert (result.chat, result.interrupted, result.against) == (False, False, None)
    assert (result.prompt_tokens, result.generated.prefill.tokens) == (len(PROMPT), len(PROMPT))
    assert result.generated.decode is not None
    assert result.generated.decode.tokens == 7
    assert result.decode_ratio is result.prefill_ratio is None
    parameters = sum(parameter.numel() for parameter in load_model(model).parameters())
    assert result.generated.weight_bytes == pytest.approx(4 * parameters, rel=0.01)  # and the rotary frequencies


def test_seeds_repeat_and_leave_the_random_numbers_of_the_caller(model: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    texts = [run(model, temperature=1.5, seed=seed).generated.tokens for seed in (1, 1, 2)]
    assert torch.equal(torch.rand(3), expected)
    assert texts[0] == texts[1] != texts[2]


def test_the_model_s_own_sampling_is_not_used_but_its_end_is(model: Path) -> None:
    expected = greedy(model)
    own = {"do_sample": True, "temperature": 9.0, "top_k": 3, "repetition_penalty": 9.0, "max_new_tokens": 2}
    (model / "generation_config.json").write_text(json.dumps(own))
    assert list(run(model, dtype="float32").generated.tokens) == expected
    end = expected[3]
    (model / "generation_config.json").write_text(json.dumps({**own, "eos_token_id": [126, end]}))
    result = run(model, dtype="float32").generated
    assert result.ended
    assert list(result.tokens) == expected[: expected.index(end) + 1]


def test_a_model_that_ends_at_once_has_no_speed_of_decoding(model: Path) -> None:
    change_json(model / "config.json", eos_token_id=greedy(model)[0])
    result = run(model, dtype="float32").generated
    assert (result.ended, len(result.tokens), result.decode) == (True, 1, None)


def test_speeds_are_those_of_the_fastest_round() -> None:
    assert Speed(tokens=6, seconds=(3.0, 2.0, 4.0)).per_second == 3.0


def test_the_clock_does_not_count_the_time_of_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    # Calls: of the prompt, and then of three tokens, each when it comes and after its text.
    times = iter([10.0, 10.5, 12.5, 13.5, 14.5, 14.75, 15.75, 16.0])
    monkeypatch.setattr(MODULE.time, "perf_counter", lambda: next(times))
    clock = Clock(None)
    clock.put(torch.tensor([[1, 2, 3]]))
    for token in (7, 8, 9):
        clock.put(torch.tensor([token]))
    assert clock.tokens == [7, 8, 9]
    assert clock.prefill_seconds() == 2.0  # 12.5 - 10 - 0.5
    assert clock.decode_seconds() == 2.0  # 15.75 - 12.5 - 1 - 0.25


def test_two_models_are_timed_in_turn(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tokens as the first model's text has, though it would end its text there."""
    other = make_model(tmp_path / "other", "llama", seed=1)  # without a tokenizer
    change_json(model / "config.json", eos_token_id=greedy(model)[2])
    calls: list[tuple[int, list[int]]] = []
    plain = MODULE._decode

    def noted(model: Any, prompt: Any, settings: Any, clock: Clock) -> bool:
        done = plain(model, prompt, settings, clock)
        calls.append((id(model), clock.tokens))
        return bool(done)

    monkeypatch.setattr(MODULE, "_decode", noted)
    result = run(model, against=str(other), repeats=3, dtype="float32")
    assert result.against is not None
    assert result.against.model == str(other)
    assert list(result.against.tokens) == greedy_of(other, model)
    (first, text), (second, _), *rounds = calls
    assert [model for model, _ in rounds] == [first, second, second, first, first, second]
    assert all(len(tokens) == len(text) for _, tokens in rounds)
    for side in (result.generated, result.against):
        assert side.decode is not None
        assert (len(side.prefill.seconds), len(side.decode.seconds)) == (3, 3)
        assert side.decode.tokens == len(text) - 1
    fastest = [min(side.decode.seconds) for side in (result.generated, result.against)]
    assert result.decode_ratio == pytest.approx(fastest[1] / fastest[0])
    assert result.prefill_ratio is not None


def greedy_of(folder: Path, tokenizer: Path) -> list[int]:
    """Tokens that transformers writes with a model that has no tokenizer."""
    add_tokenizer(folder)
    expected = greedy(folder)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    return expected


def test_packed_linears_stay_packed_as_they_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = make_model(tmp_path / "dense", "llama", hidden_size=64, intermediate_size=128)
    add_tokenizer(dense)
    tokens = save_tokens(tmp_path / "tokens.safetensors")
    prune(PruneConfig(model=dense, output=tmp_path / "pruned", calibration=tokens, sparsity=0.7, preset="paper"))
    pack(PackConfig(model=tmp_path / "pruned", output=tmp_path / "packed"))
    packed = tmp_path / "packed"
    result = run(packed, against=str(packed), keep_packed="yes", repeats=1, dtype="float32")
    kept, plain = result.generated, result.against
    assert plain is not None
    assert (kept.packed_linears, kept.linears, plain.packed_linears, plain.linears) == (14, 15, 0, 15)
    assert kept.weight_bytes < plain.weight_bytes
    assert list(plain.tokens) == list(kept.tokens) == greedy(tmp_path / "pruned")
    assert run(packed, keep_packed=False).generated.packed_linears == 0
    asked: list[object] = []
    monkeypatch.setattr(
        MODULE, "load", lambda model, keep_packed, *rest, **more: asked.append(keep_packed) or load(model)
    )
    for choice, value in (("auto", "auto"), ("yes", True), ("no", False)):
        run(packed, against=str(packed), keep_packed=choice, repeats=1)
        assert asked == [value, False]
        asked.clear()
    assert GenerateConfig(model="m", prompt="p").keep_packed is KeepPacked.AUTO
    assert GenerateConfig(model="m", prompt="p", keep_packed=True).keep_packed is KeepPacked.YES


def test_the_chat_template_is_applied_once_and_texts_begin_once(model: Path) -> None:
    add_tokenizer(model, bos=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = {character: ord(character) - 32 for character in "<>:ab~"}

    def tokens(chat: bool | None) -> tuple[list[int], bool]:
        config = GenerateConfig(model=model, prompt="ab", chat=chat)
        made, in_template = prompt_tokens("ab", tokenizer, config)
        return made[0].tolist(), in_template

    assert tokens(None) == ([ids["~"], ids["a"], ids["b"]], False)
    tokenizer.chat_template = TEMPLATE
    in_template = [ids[character] for character in "~<ab>:"]
    assert tokens(None) == tokens(True) == (in_template, True)
    assert tokens(False) == ([ids["~"], ids["a"], ids["b"]], False)


def test_a_chat_template_that_is_missing_or_fails(model: Path) -> None:
    with pytest.raises(SettingsError, match="--chat needs a chat template, and the tokenizer of") as caught:
        run(model, chat=True)
    assert "PROMPT is then continued as text" in caught.value.hint
    (model / "chat_template.jinja").write_text("{{ raise_exception('no users here') }}")
    with pytest.raises(ModelError, match="the chat template of .* fails: no users here") as failed:
        run(model)
    assert failed.value.hint == "--no-chat continues PROMPT as text"
    assert run(model, chat=False).chat is False


def test_the_prompt_comes_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(data: bytes) -> str:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        return read_prompt("-", Silent())

    assert read("zwei\nZeilen ä\n".encode()) == "zwei\nZeilen ä"
    with pytest.raises(SettingsError, match="standard input is empty"):
        read(b" \n")
    with pytest.raises(SettingsError, match="standard input is not UTF-8"):
        read(b"\xff\xfe")
    assert read_prompt("a-b", Silent()) == "a-b"


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"prompt": " "}, "PROMPT: the value is empty"),
        ({"prompt": "\udcff"}, "PROMPT: is not valid UTF-8"),
        ({"max_new_tokens": 0}, "--max-new-tokens: 0 should be greater than or equal to 1"),
        ({"temperature": -0.5}, "--temperature: -0.5 should be greater than or equal to 0"),
        ({"temperature": 1e-30}, "--temperature: 1e-30 is too small"),
        ({"keep_packed": "maybe"}, "--keep-packed: 'maybe' should be 'auto', 'yes' or 'no'"),
        ({"repeats": 2}, "--repeats needs --against"),
        ({"dtype": "int8"}, "--dtype: 'int8' should be"),
        ({"device": "tpu"}, "--device: unknown device 'tpu'"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(SettingsError) as caught:
        run(Path("nowhere"), **settings)
    assert str(caught.value).startswith(problem)


def test_a_prompt_must_leave_room_in_the_context(model: Path) -> None:
    with pytest.raises(ModelError, match="the prompt has 70 tokens, and the model's context is 64") as caught:
        run(model, prompt="x" * 70)
    assert caught.value.hint == "shorten the prompt by at least 7 tokens"
    listener = Listener()
    config = GenerateConfig(model=model, prompt="x" * 60, max_new_tokens=9)
    assert len(generate(config, listener).generated.tokens) == 4
    assert listener.warnings == ["the model's context of 64 tokens has room for 4 tokens after the prompt"]


def broken_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")


def wrong_end(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": "stop"}')


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


def unfinished(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


def small_vocabulary(folder: Path) -> None:
    make_model(folder, "llama", vocab_size=20)


def overflowing(folder: Path) -> None:
    tensors = {name: tensor * 1e4 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "problem", "hint"),
    [
        (broken_generation_config, "generation_config.json in .* cannot be used", "remove it"),
        (wrong_end, "its texts end with token 'stop', which is no token id", "correct eos_token_id"),
        (no_tokenizer, "has no tokenizer, which a prompt needs", "copy tokenizer.json"),
        (broken_tokenizer, "the tokenizer in .* cannot be loaded", "get tokenizer.json"),
        (unfinished, "has no config.json", "did not finish"),
        (small_vocabulary, "outside the model's vocabulary of 20", "belongs to another model"),
        (overflowing, "gives NaN or Inf logits for the prompt", "--dtype bfloat16 or float32"),
    ],
)
def test_damaged_models_are_refused_with_a_hint(
    model: Path, damage: Callable[[Path], None], problem: str, hint: str
) -> None:
    damage(model)
    with pytest.raises((ModelError, CalibrationError), match=problem) as caught:
        run(model, dtype="float16" if damage is overflowing else "float32")
    assert hint in caught.value.hint


def test_a_model_with_other_tokens_is_refused(tmp_path: Path, model: Path) -> None:
    small = make_model(tmp_path / "small", "llama", vocab_size=96)
    with pytest.raises(ModelError, match="has a vocabulary of 128, .* one of 96"):
        run(model, against=str(small))
    other = make_model(tmp_path / "other", "llama")
    add_tokenizer(other, bos=True)
    with pytest.raises(ModelError, match="has another tokenizer") as caught:
        run(model, against=str(other))
    assert caught.value.hint == "compare models with the same tokenizer"
    with pytest.raises(BarberError, match="no such model"):
        run(model, against="/nothing/here")


def interrupting_after(count: int) -> Callable[[str], None]:
    pieces: Iterator[int] = iter(range(count))

    def on_text(_: str) -> None:
        if next(pieces, None) is None:
            raise KeyboardInterrupt

    return on_text


def test_an_interrupted_text_keeps_what_was_written(model: Path) -> None:
    config = GenerateConfig(model=model, prompt=PROMPT, max_new_tokens=30, dtype="float32")
    result = generate(config, on_text=interrupting_after(3))
    assert result.interrupted
    written = result.generated
    assert 3 < len(written.tokens) < 30
    assert list(written.tokens) == greedy(model, tokens=len(written.tokens))
    assert written.decode is not None


@pytest.mark.parametrize("stage", ["loading", "timing"])
def test_an_interrupted_comparison_keeps_what_was_done(
    model: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupting(Silent):
        opened = 0

        def start(self, title: str, total: int, finished: int = 0) -> None:
            self.opened += title.startswith("loading")
            if (stage == "loading" and self.opened == 2) or (stage == "timing" and title == "timing in turn"):
                raise KeyboardInterrupt

    config = GenerateConfig(model=model, prompt=PROMPT, max_new_tokens=8, against=str(model))
    result = generate(config, Interrupting())
    assert result.interrupted
    assert len(result.generated.tokens) == 8
    assert (result.against is None) is (stage == "loading")
    assert len(result.generated.prefill.seconds) == 1


def test_an_interrupt_before_the_first_token_ends_the_command(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Clock, "put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model)
