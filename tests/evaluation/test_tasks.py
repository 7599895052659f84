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
from llm_barber.evaluation.tasks import (
    PAPER_TASKS,
    TaskResult,
    TaskRun,
    compare_tasks,
    find_tasks,
    mean_and_standard_error,
)
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
    for name, examples in (("arc_easy", QUESTIONS), ("hellaswag", QUESTIONS), ("winogrande", BEGINNINGS)):
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


def best(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def settings(model: Path, folder: Path, **more: Any) -> EvaluateConfig:
    return EvaluateConfig(**{"model": model, "tasks_folder": folder, "dtype": "float32", **more})


@pytest.mark.parametrize("batch_size", [1, None])
def test_equals_likelihoods_by_transformers(model: Path, folder: Path, batch_size: int | None) -> None:
    by_transformers = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    evaluation = evaluate(settings(model, folder, batch_size=batch_size))
    assert evaluation.texts == ()
    results = {(task.task, task.metric): task for task in evaluation.tasks}
    assert list(results) == [
        (name, metric)
        for name, metrics in (("arc_easy", 2), ("hellaswag", 2), ("winogrande", 1))
        for metric in ("acc", "acc_norm")[:metrics]
    ]
    for name, joint in (("arc_easy", "\nAnswer:"), ("hellaswag", "")):
        right, right_by_length = [], []
        for example in QUESTIONS:
            scores = [
                likelihood(by_transformers, example["query"] + joint, f" {choice}") for choice in example["choices"]
            ]
            right.append(float(best(scores) == example["gold"]))
            by_length = [score / len(choice) for score, choice in zip(scores, example["choices"], strict=True)]
            right_by_length.append(float(best(by_length) == example["gold"]))
        for metric, values in (("acc", right), ("acc_norm", right_by_length)):
            result = results[name, metric]
            assert (result.value, result.standard_error) == pytest.approx(mean_and_standard_error(values))
            assert (result.examples, result.shots, result.against) == (4, 0, None)
            assert result.right == "".join(f"{value:.0f}" for value in values)
    right = []
    for example in BEGINNINGS:
        scores = [
            likelihood(by_transformers, begin, f" {example['continuation']}") for begin in example["context_options"]
        ]
        right.append(float(best(scores) == example["gold"]))
    assert results["winogrande", "acc"].value == pytest.approx(sum(right) / 2)
    assert len(results["winogrande", "acc"].sha256 or "") == 64


def test_likelihoods_themselves(model: Path, folder: Path) -> None:
    from llm_barber.evaluation.harness import StreamedLanguageModel
    from llm_barber.evaluation.streamed import StreamedModel
    from llm_barber.loading.tokenizer import load_tokenizer
    from llm_barber.progress import Silent

    by_transformers = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    streamed = StreamedModel(str(model), torch.device("cpu"), torch.float32)
    language_model = StreamedLanguageModel(streamed, load_tokenizer(model), None, Silent())
    pairs = [("one", " a"), ("one", " b"), ("longer one", " abc"), ("one", " a b c"), ("x", "y")]
    requests = [(pair, language_model.tok_encode(pair[0]), language_model.tok_encode(pair[1])) for pair in pairs]
    for (value, _), pair in zip(language_model._loglikelihood_tokens(requests), pairs, strict=True):
        assert value == pytest.approx(likelihood(by_transformers, *pair), rel=1e-5)
    best_token = int(by_transformers(input_ids=torch.tensor([[ord("x") - 32]])).logits[0, -1].argmax())
    ((_, greedy), (_, other)) = language_model._loglikelihood_tokens(
        [(("x", ""), [ord("x") - 32], [best_token]), (("x", ""), [ord("x") - 32], [(best_token + 1) % 95])]
    )
    assert (greedy, other) == (True, False)


def test_against_itself_and_limit(model: Path, folder: Path, tmp_path: Path) -> None:
    config = settings(model, folder, tasks=("arc_easy",), against=model, limit=3, text=None)
    (acc, _) = evaluate(config).tasks
    assert acc.against is not None
    assert (acc.examples, acc.against.difference, acc.against.standard_error) == (3, 0.0, 0.0)
    assert acc.against.value == acc.value


def test_a_model_against_itself_is_computed_once(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden_states, passes = StreamedModel.hidden_states, []

    def counted(self: StreamedModel, *arguments: Any) -> Any:
        passes.append(self.source.folder)
        return hidden_states(self, *arguments)

    monkeypatch.setattr(StreamedModel, "hidden_states", counted)
    (folder / "text.txt").write_text("a word " * 50)
    texts = {"text": (str(folder / "text.txt"),), "seqlen": 16, "windows": 2}
    compared = evaluate(settings(model, folder, tasks=("arc_easy",), limit=2, against=model, **texts))
    assert len(passes) == 2  # one of the text, one of the task
    plain = evaluate(settings(model, folder, tasks=("arc_easy",), limit=2, **texts))
    assert [task.value for task in compared.tasks] == [task.value for task in plain.tasks]
    assert compared.texts[0].perplexity == plain.texts[0].perplexity


def test_differences_are_paired_by_example() -> None:
    def result(values: list[float]) -> TaskRun:
        mean, error = mean_and_standard_error(values)
        task_result = TaskResult(
            task="t", metric="acc", value=mean, standard_error=error, examples=len(values), shots=0, source="",
            sha256=None, against=None,
        )  # fmt: skip
        return TaskRun((task_result,), {("t", "acc"): values})

    (compared,) = compare_tasks(result([1, 1, 0, 0]), result([1, 0, 0, 0]))
    assert compared.against is not None
    assert compared.against.difference == 0.25
    # Differences 0, 1, 0, 0: variance 0.25, over 4 examples.
    assert compared.against.standard_error == pytest.approx(math.sqrt(0.25 / 4))
    with pytest.raises(TaskError, match="task t has other examples than when"):
        compare_tasks(result([1, 1, 0, 0]), result([1, 0, 0]))


def test_names(folder: Path) -> None:
    assert [task.name for task in find_tasks(("paper", "arc_easy"), None, None)] == list(PAPER_TASKS)
    assert [task.name for task in find_tasks((), folder, None)] == ["arc_easy", "hellaswag", "winogrande"]
    (folder / "openbook_qa.jsonl").write_text((folder / "arc_easy.jsonl").read_text())
    assert [task.name for task in find_tasks(("openbookqa",), folder, None)] == ["openbook_qa"]
    assert find_tasks((), None, None) == ()


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2: is not an object"),
        ('{"query": "a", "choices": ["b", "c"]}', "line 2: has no gold"),
        ('{"query": 3, "choices": ["b", "c"], "gold": 0}', "line 2: query is int, not str"),
        ('{"query": "a", "choices": ["b"], "gold": 0}', "line 2: choices is not a list of two or more texts"),
        ('{"query": "a", "choices": ["b", 1], "gold": 0}', "line 2: choices is not a list of two or more texts"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "line 2: gold is 2, with 2 choices"),
        ('{"query": "a", "choices": ["b", "c"], "gold": true}', "line 2: gold is bool, not int"),
        ('{"query": "", "choices": ["b", "c"], "gold": 0}', "line 2: query is empty"),
    ],
)
def test_wrong_lines_are_named(folder: Path, line: str, problem: str) -> None:
    (folder / "arc_easy.jsonl").write_text(f"{json.dumps(QUESTIONS[0])}\n{line}\n")
    with pytest.raises(TaskError, match=problem) as caught:
        find_tasks(("arc_easy",), folder, None)
    assert "query, choices, gold" in caught.value.hint or "JSON" in caught.value.hint


def test_other_line_ends_may_stand_in_a_text(folder: Path) -> None:
    odd = [{**question, "query": "a\u2028b\x85c"} for question in QUESTIONS]
    lines = "\r\n".join(json.dumps(question, ensure_ascii=False) for question in odd)
    (folder / "arc_easy.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    (task,) = find_tasks(("arc_easy",), folder, None)
    assert task.examples == odd


def test_bad_input(model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TaskError, match="no file for task piqa") as caught:
        evaluate(settings(model, folder, tasks=("piqa",)))
    assert "arc_easy, hellaswag, winogrande" in caught.value.hint
    with pytest.raises(TaskError, match="there is no folder"):
        evaluate(settings(model, tmp_path / "none"))
    with pytest.raises(TaskError, match="lm-eval has no task no_such_task"):
        evaluate(settings(model, folder, tasks_folder=None, tasks=("no_such_task",)))
    small = make_model(tmp_path / "small", "llama", vocab_size=60)
    add_tokenizer(small)
    with pytest.raises(CalibrationError, match="outside the model's vocabulary of 60"):
        evaluate(settings(small, folder))
    with pytest.raises(TaskError, match="is not multiple choice"):
        monkeypatch.setattr("lm_eval.api.task.ConfigurableTask.get_config", lambda *_: "generate_until")
        evaluate(settings(model, folder))
    monkeypatch.undo()

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(HubError, match="task arc_easy could not be loaded"):
        evaluate(settings(model, folder, tasks_folder=None, tasks=("arc_easy",)))
    with pytest.raises(SettingsError, match="limit"):
        settings(model, folder, limit=1)
    (folder / "one.jsonl").write_text(json.dumps(QUESTIONS[0]))
    with pytest.raises(TaskError, match="fewer than two examples"):
        find_tasks(("one",), folder, None)
    (folder / "arc-Easy.jsonl").write_text(json.dumps(QUESTIONS[0]))
    with pytest.raises(TaskError, match=r"arc-Easy\.jsonl and arc_easy\.jsonl are files of one task"):
        find_tasks((), folder, None)
    (folder / "arc-Easy.jsonl").unlink()
    (folder / "one.jsonl").write_bytes(b"\xff")
    with pytest.raises(TaskError, match="cannot be read"):
        find_tasks(("one",), folder, None)


def test_another_spelling_of_a_task_has_the_same_prompt(model: Path, folder: Path) -> None:
    expected = evaluate(settings(model, folder, tasks=("hellaswag",))).tasks
    (folder / "hellaswag.jsonl").rename(folder / "HellaSwag.jsonl")
    results = evaluate(settings(model, folder, tasks=("hellaswag",))).tasks
    assert [(task.metric, task.value, task.right) for task in results] == [
        (task.metric, task.value, task.right) for task in expected
    ]


def test_lm_eval_is_not_installed(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("lm_eval")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "llm_barber.evaluation.harness", raising=False)
    with pytest.raises(TaskError, match="tasks need lm-eval") as caught:
        evaluate(settings(model, folder))
    assert caught.value.hint == "pip install 'lm-eval>=0.4.13'"
