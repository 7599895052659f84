import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from llm_barber.evaluation.perplexity import perplexity


def test_equals_transformers_own_loss(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    windows = torch.randint(0, 128, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        losses = [model(input_ids=window[None], labels=window[None]).loss.item() for window in windows]
    assert perplexity(model, windows) == pytest.approx(math.exp(sum(losses) / 3), rel=1e-5)
