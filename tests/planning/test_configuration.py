"""Configurations that `plan` refuses."""

from pathlib import Path

import pytest

from llm_barber.errors import ModelError
from llm_barber.planning.plan import plan
from llm_barber.settings.plan import PlanConfig


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ('{"model_type": "nothing"}', "cannot be used"),
        ('{"model_type": "bert"}', "bert is an encoder"),
        ('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}', "is quantised"),
        ('{"model_type": "llama", "hidden_size": 0}', "says hidden_size: 0"),
        ('{"model_type": "llama", "vocab_size": 0}', "says vocab_size: 0"),
    ],
)
def test_refused_configurations(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ModelError, match=message):
        plan(PlanConfig(model=str(path)))
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="neither a config.json nor a GGUF file"):
        plan(PlanConfig(model=str(tmp_path / "weights.bin")))
