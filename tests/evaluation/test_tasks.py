"""Tasks: their scores are those of transformers' likelihoods; wrong files are refused."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llm_barber import EvaluateConfig, evaluate
from llm_barber.errors import CalibrationError, HubError, SettingsError, TaskError
from llm_barber.evaluation.streamed import StreamedModel
from llm_barber.evaluation.tasks import PAPER_TASKS, TaskResult, compare_tasks, find_tasks, mean_and_standard_error
from tests.conftest import make_model
from tests.helpers.tasks import QUESTIONS
from tests.helpers.text import add_tokenizer

pytest.importorskip("lm_eval")

BEGINNINGS = [
    {"context_options": ["Ann saw Ben so Ann", "Ann saw Ben so Ben"], "continuation": "ran", "gold": 1},
    {"context_options": ["a", "bb"], "continuation": "c d", "gold": 0},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for name, examples in (("arc_easy", QUESTIONS), ("HellaSwag", QUESTIONS), ("winogrande", BEGINNINGS)):
        (tasks / f"{name}.jsonl").write_text("\n".join(map(json.dumps, examples)) + "\n")
    return tasks


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = make_model(tmp_path / "model", "llama")
    add_tokenizer(path)
    return path


def likelihood(model: torch.nn.Module, context: str, continuation: str) -> float:
    """Log-likelihood of a continuation, by transformers alone, one sequence at a time."""
    ids = torch.tensor([[ord(letter) - 32 if 32 <= ord(letter) < 127 else 0 for letter in context + continuation]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].double().log_softmax(1)
    return sum(logits[i - 1, ids[0, i]].item() for i in range(len(context), ids.shape[1]))


def is_right(scores: list[float], gold: int) -> float:
    return float(max(range(len(scores)), key=scores.__getitem__) == gold)


def settings(model: Path, folder: Path | None, **more: Any) -> EvaluateConfig:
    return EvaluateConfig(**{"model": model, "tasks_folder": folder, "dtype": "float32", **more})


@pytest.mark.parametrize("batch_size", [1, None])
def test_equals_likelihoods_by_transformers(model: Path, folder: Path, batch_size: int | None) -> None:
    by_transformers = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    expected: dict[tuple[str, str], list[float]] = {}
    for name, joint in (("HellaSwag", ""), ("arc_easy", "\nAnswer:")):
        for example in QUESTIONS:
            choices, gold = example["choices"], example["gold"]
            scores = [likelihood(by_transformers, example["query"] + joint, f" {choice}") for choice in choices]
            by_length = [score / len(choice) for score, choice in zip(scores, choices, strict=True)]
            expected.setdefault((name, "acc"), []).append(is_right(scores, gold))
            expected.setdefault((name, "acc_norm"), []).append(is_right(by_length, gold))
    for example in BEGINNINGS:
        scores = [
            likelihood(by_transformers, text, f" {example['continuation']}") for text in example["context_options"]
        ]
        expected.setdefault(("winogrande", "acc"), []).append(is_right(scores, example["gold"]))
    evaluation = evaluate(settings(model, folder, batch_size=batch_size))
    assert evaluation.texts == ()
    assert {(task.task, task.metric) for task in evaluation.tasks} == set(expected)
    for task in evaluation.tasks:
        values = expected[task.task, task.metric]
        assert (task.value, task.standard_error) == pytest.approx(mean_and_standard_error(values))
        assert (task.examples, task.shots, task.against) == (len(values), 0, None)
        assert task.right == "".join(f"{value:.0f}" for value in values)
        assert len(task.sha256 or "") == 64


def test_likelihoods_themselves(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Continuations of several lengths, in several passes over the layers."""
    from llm_barber.evaluation import harness
    from llm_barber.loading.tokenizer import load_tokenizer
    from llm_barber.progress import Silent

    monkeypatch.setattr(harness, "PASS_BYTES", 1)
    by_transformers = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    streamed = StreamedModel(str(model), torch.device("cpu"), torch.float32)
    language_model = harness.StreamedLanguageModel(streamed, load_tokenizer(model), 2, Silent())
    pairs = [("one", " a"), ("one", " b"), ("longer one", " abc"), ("one", " a b c"), ("x", "y")]
    requests = [(pair, language_model.tok_encode(pair[0]), language_model.tok_encode(pair[1])) for pair in pairs]
    for (value, _), pair in zip(language_model._loglikelihood_tokens(requests), pairs, strict=True):
        assert value == pytest.approx(likelihood(by_transformers, *pair), rel=1e-5)
    best_token = int(by_transformers(input_ids=torch.tensor([[ord("x") - 32]])).logits[0, -1].argmax())
    chosen = [(("x", ""), [ord("x") - 32], [(best_token + step) % 95]) for step in (0, 1)]
    assert [greedy for _, greedy in language_model._loglikelihood_tokens(chosen)] == [True, False]


def test_a_model_against_itself_is_computed_once(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden_states, passes = StreamedModel.hidden_states, []

    def counted(self: StreamedModel, *arguments: Any) -> Any:
        passes.append(self.source.folder)
        return hidden_states(self, *arguments)

    monkeypatch.setattr(StreamedModel, "hidden_states", counted)
    (folder / "text.txt").write_text("a word " * 50)
    texts = {"text": (str(folder / "text.txt"),), "seqlen": 16, "windows": 2}
    compared = evaluate(settings(model, folder, tasks=("arc_easy",), limit=3, against=model, **texts))
    assert len(passes) == 2  # one of the text, one of the task
    plain = evaluate(settings(model, folder, tasks=("arc_easy",), limit=3, **texts))
    for task, alone in zip(compared.tasks, plain.tasks, strict=True):
        assert task.against is not None
        assert (task.examples, task.value, task.against.value) == (3, alone.value, alone.value)
        assert (task.against.difference, task.against.standard_error) == (0.0, 0.0)
    assert compared.texts[0].perplexity == plain.texts[0].perplexity


@pytest.mark.parametrize(("digits", "error"), [(True, math.sqrt(0.25 / 4)), (False, math.sqrt((1 / 3 + 0.25) / 4))])
def test_differences_are_paired_by_example_where_answers_are_right_or_wrong(digits: bool, error: float) -> None:
    """Differences 0, 1, 0, 0: variance 0.25. Without digits the variances, 1/3 and 1/4, add up."""

    def result(values: list[float]) -> TaskResult:
        mean, standard_error = mean_and_standard_error(values)
        right = "".join(f"{value:.0f}" for value in values) if digits else None
        return TaskResult(
            task="t", metric="acc", value=mean, standard_error=standard_error, examples=4, shots=0, source="",
            sha256=None, against=None, right=right,
        )  # fmt: skip

    (compared,) = compare_tasks([result([1, 1, 0, 0])], [result([1, 0, 0, 0])])
    assert compared.against is not None
    assert compared.against.difference == 0.25
    assert compared.against.standard_error == pytest.approx(error)


def test_names(folder: Path) -> None:
    assert [task.name for task in find_tasks(("paper", "arc_easy"), None, None)] == list(PAPER_TASKS)
    assert [task.name for task in find_tasks((), folder, None)] == ["HellaSwag", "arc_easy", "winogrande"]
    assert [task.name for task in find_tasks(("hella_swag",), folder, None)] == ["HellaSwag"]
    assert find_tasks((), None, None) == ()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "line 2: Invalid JSON"),
        ("[]", "line 2: Input should be an object"),
        ("[" * 10_000, "line 2: Invalid JSON"),
        (r'{"query": "\ud800", "choices": ["b", "c"], "gold": 0}', "line 2: Invalid JSON"),
        ('{"query": "a", "choices": ["b", "c"]}', "line 2: gold: Field required"),
        ('{"query": 3, "choices": ["b", "c"], "gold": 0}', "line 2: query: Input should be a valid string"),
        ('{"query": "a", "choices": ["b"], "gold": 0}', "line 2: choices: List should have at least 2 items"),
        ('{"query": "a", "choices": ["b", 1], "gold": 0}', r"line 2: choices.1: Input should be a valid string"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "line 2: .*gold is 2, with 2 choices"),
        ('{"query": "a", "choices": ["b", "c"], "gold": true}', "line 2: gold: Input should be a valid integer"),
        ('{"query": "", "choices": ["b", "c"], "gold": 0}', "line 2: query: String should have at least 1"),
    ],
)
def test_wrong_lines_are_named(folder: Path, content: str, problem: str) -> None:
    (folder / "arc_easy.jsonl").write_text(f"{json.dumps(QUESTIONS[0])}\n{content}\n")
    with pytest.raises(TaskError, match=problem) as caught:
        find_tasks(("arc_easy",), folder, None)
    assert "query, choices, gold" in caught.value.hint


def test_other_line_ends_may_stand_in_a_text(folder: Path) -> None:
    odd = [{**question, "query": "a\u2028b\x85c"} for question in QUESTIONS]
    lines = "\r\n".join(json.dumps(question, ensure_ascii=False) for question in odd)
    (folder / "arc_easy.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    (task,) = find_tasks(("arc_easy",), folder, None)
    assert task.examples == odd


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("one", json.dumps(QUESTIONS[0]), "fewer than two examples"),
        ("arc-Easy", "", r"arc-Easy\.jsonl and arc_easy\.jsonl are files of one task"),
        ("bytes", b"\xff", "cannot be read"),
    ],
)
def test_wrong_files(folder: Path, name: str, content: str | bytes, problem: str) -> None:
    (folder / f"{name}.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TaskError, match=problem):
        find_tasks((), folder, None)


def test_bad_input(model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TaskError, match="no file for task piqa") as caught:
        evaluate(settings(model, folder, tasks=("piqa",)))
    assert "arc_easy, winogrande" in caught.value.hint
    with pytest.raises(TaskError, match="there is no folder"):
        evaluate(settings(model, tmp_path / "none"))
    with pytest.raises(TaskError, match="lm-eval has no task no_such_task"):
        evaluate(settings(model, None, tasks=("no_such_task",)))
    small = make_model(tmp_path / "small", "llama", vocab_size=60)
    add_tokenizer(small)
    with pytest.raises(CalibrationError, match="outside the model's vocabulary of 60"):
        evaluate(settings(small, folder))
    with monkeypatch.context() as patch, pytest.raises(TaskError, match="is not multiple choice"):
        patch.setattr("lm_eval.api.task.ConfigurableTask.get_config", lambda *_: "generate_until")
        evaluate(settings(model, folder))

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(HubError, match="task arc_easy could not be loaded"):
        evaluate(settings(model, None, tasks=("arc_easy",)))
    with pytest.raises(SettingsError, match="limit"):
        settings(model, folder, limit=1)


def test_lm_eval_is_not_installed(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("lm_eval")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "llm_barber.evaluation.harness", raising=False)
    with pytest.raises(TaskError, match="tasks need lm-eval") as caught:
        evaluate(settings(model, folder))
    assert caught.value.hint == "pip install 'lm-eval>=0.4.13'"
