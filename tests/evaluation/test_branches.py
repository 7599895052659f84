"""Sequences that begin alike, computed as one: the same tokens, the same answers, fewer tokens to compute."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from llm_barber import EvaluateConfig, evaluate

pytest.importorskip("lm_eval")

from llm_barber.evaluation.branches import MOST_TOKENS, Branched, branched, make_batch
from llm_barber.evaluation.language_model import NOT_SHARED, StreamedLanguageModel
from llm_barber.evaluation.streamed import StreamedModel
from llm_barber.progress import Silent
from tests.conftest import make_model
from tests.helpers.text import add_tokenizer

CONTEXTS = ((5, 9, 3, 7, 2, 8, 4, 6), (5, 9, 3, 1, 1, 2), (40, 41, 42, 43, 44))
ENDINGS = ((11, 12), (13,), (14, 15, 16, 17), (11, 18, 19))


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple), unique=True))
def test_sequences_come_back_and_no_token_is_added(sequences: list[tuple[int, ...]]) -> None:
    rows = list(branched(sequences))
    assert sorted(sequence for row in rows for sequence in row.sequences) == sorted(sequences)
    assert sum(len(row.tokens) for row in rows) <= sum(map(len, sequences))
    for row in rows:
        for sequence, indices in zip(row.sequences, row.indices(), strict=True):
            assert tuple(row.tokens[index] for index in indices) == sequence


def test_endings_of_a_question_share_its_context() -> None:
    sequences = [context + ending for context in CONTEXTS for ending in ENDINGS]
    rows = list(branched(sequences))
    assert [row.beginning for row in rows] == sorted(CONTEXTS)
    assert sum(len(row.tokens) for row in rows) < sum(map(len, sequences)) / 2


def test_long_sequences_are_not_joined() -> None:
    context = tuple(range(MOST_TOKENS - 3))
    assert len(list(branched([(*context, 1, 2), (*context, 3)]))) == 1
    assert len(list(branched([(*context, 1, 2), (*context, 3, 4)]))) == 2


def test_a_token_reads_its_sequence_and_nothing_else() -> None:
    """By hand: of each pair of tokens, whether a sequence has both, the one that is read not after the reader."""
    row, short = Branched((1, 2), ((3, 4), (), (5,))), Branched((6, 7, 8))
    batch = make_batch([row, short])
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]]
    assert batch.positions is not None
    assert batch.visible is not None
    assert batch.positions.tolist() == [[0, 1, 2, 3, 2], [0, 1, 2, 0, 0]]
    for number, each in enumerate((row, short)):
        expected = torch.zeros(5, 5, dtype=torch.bool)
        for indices in each.indices():
            for reader in indices:
                expected[reader, [index for index in indices if index <= reader]] = True
        used = len(each.tokens)
        assert torch.equal(batch.visible[number, :used], expected[:used])
    plain = make_batch([short])
    assert plain.positions is None
    assert plain.visible is None


class Told(Silent):
    """Keeps the stages that it is told of, and how many steps of each are left."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.left: list[int] = []

    def stage(self, title: str) -> None:
        self.stages.append(title)

    def start(self, title: str, total: int, finished: int = 0) -> None:
        self.stages.append(title)
        self.left.append(total)

    def advance(self, detail: str) -> None:
        self.left[-1] -= 1


def answers(folder: Path, shares: bool) -> tuple[list[tuple[float, bool]], StreamedLanguageModel]:
    """The answers of a model, and the language model."""
    streamed = StreamedModel(str(folder), torch.device("cpu"), torch.float32)
    language_model = StreamedLanguageModel(streamed, None, None, Told())
    language_model.shares_contexts = shares
    requests = [(("", ""), list(context), list(ending)) for context in CONTEXTS for ending in ENDINGS]
    return language_model._loglikelihood_tokens(requests), language_model


@pytest.mark.parametrize(
    ("family", "shares"),
    [
        ("llama", True), ("gpt2", True), ("gemma3_text", True), ("mistral", True), ("qwen3_moe", True),
        ("deepseek_v2", True), ("opt", True), ("bloom", False), ("falcon-rw", False), ("mpt", False), ("jamba", False),
        ("falcon_h1", False), ("qwen3_next", False),
    ],
)  # fmt: skip
def test_answers_are_those_of_sequences_by_themselves(tmp_path: Path, family: str, shares: bool) -> None:
    """Models that do not heed the mask are noticed, and computed sequence by sequence."""
    window = {"sliding_window": 32} if family in ("gemma3_text", "mistral") else {}  # longer than the sequences
    folder = make_model(tmp_path / family, family, **window)
    expected, _ = answers(folder, False)
    result, language_model = answers(folder, True)
    assert language_model.shares_contexts is shares
    assert isinstance(language_model.progress, Told)
    assert (NOT_SHARED in language_model.progress.stages) is not shares
    assert language_model.progress.stages[-1] == "scoring answers"
    assert set(language_model.progress.left) == {0}
    for (value, greedy), (alone, alone_greedy) in zip(result, expected, strict=True):
        assert value == pytest.approx(alone, rel=1e-4)
        assert greedy is alone_greedy


def test_layers_that_raise_an_error_are_computed_without_a_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model(tmp_path / "model", "llama")
    expected, _ = answers(folder, False)
    forward = LlamaDecoderLayer.forward

    def without_mask(self: LlamaDecoderLayer, *arguments: Any, **keywords: Any) -> Any:
        if keywords.get("attention_mask") is not None:
            raise ValueError("a mask of four dimensions")
        return forward(self, *arguments, **keywords)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", without_mask)
    result, language_model = answers(folder, True)
    assert not language_model.shares_contexts
    assert result == expected


def test_a_window_of_attention_that_is_shorter_than_a_sequence_is_noticed(tmp_path: Path) -> None:
    """The mask would let tokens look back further than they do in a sequence of their own."""
    for window, shares in ((32, True), (4, False)):
        folder = make_model(tmp_path / str(window), "mistral", sliding_window=window)
        assert answers(folder, True)[1].shares_contexts is shares


def test_scores_of_tasks_are_unchanged_and_fewer_tokens_are_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model(tmp_path / "model", "llama")
    add_tokenizer(folder)
    (tmp_path / "tasks").mkdir()
    questions = [
        {"query": f"Question {letter * 8}:", "choices": [f"{letter}{end * 8}" for end in "wxyz"], "gold": index % 4}
        for index, letter in enumerate("abcdefgh")
    ]
    (tmp_path / "tasks" / "arc_easy.jsonl").write_text("\n".join(map(json.dumps, questions)) + "\n")
    computed: list[int] = []
    hidden_states = StreamedModel.hidden_states

    def counted(self: StreamedModel, batches: Any, progress: Any) -> Any:
        computed.append(sum(batch.tokens.numel() for batch in batches))
        return hidden_states(self, batches, progress)

    monkeypatch.setattr(StreamedModel, "hidden_states", counted)
    results = []
    for shares in (False, True):
        monkeypatch.setattr(StreamedLanguageModel, "shares_contexts", shares)
        settings = {"model": folder, "tasks_folder": tmp_path / "tasks", "dtype": "float32"}
        results.append([(task.metric, task.value) for task in evaluate(EvaluateConfig(**settings)).tasks])
    assert results[0] == results[1]
    assert computed[1] < computed[0] / 2
