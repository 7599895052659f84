import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from llm_barber.errors import CalibrationError
from llm_barber.evaluation.perplexity import evaluation_windows, perplexity


def test_equals_transformers_own_loss(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    windows = torch.randint(0, 128, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        losses = [model(input_ids=window[None], labels=window[None]).loss.item() for window in windows]
    assert perplexity(model, windows) == pytest.approx(math.exp(sum(losses) / 3), rel=1e-5)


def test_windows_follow_each_other() -> None:
    tokens = [ord(one) for one in "ABCDEFG"]
    assert evaluation_windows("text", tokens, 2, None).tolist() == [[65, 66], [67, 68], [69, 70]]
    assert evaluation_windows("text", tokens, 2, 1).tolist() == [[65, 66]]
    with pytest.raises(CalibrationError, match="fewer than one window of 8"):
        evaluation_windows("text", tokens, 8, None)
