"""GGUF files that are not whole."""

from pathlib import Path

import pytest
import torch
from gguf import GGUFWriter

from llm_barber.checkpoint.source import CheckpointSource
from llm_barber.errors import ModelError


def test_a_file_without_some_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would make them up."""
    monkeypatch.setenv("LLM_BARBER_CACHE", str(tmp_path / "cache"))
    writer = GGUFWriter(str(tmp_path / "a.gguf"), "llama")
    writer.add_block_count(1)
    writer.add_context_length(16)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_vocab_size(95)
    writer.add_tensor("token_embd.weight", torch.zeros(95, 8).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"has no weights, or others, for model\.layers\.0\.\S+ and \d+ more"):
        CheckpointSource(tmp_path / "a.gguf")
    assert not list((tmp_path / "cache").glob("*"))
