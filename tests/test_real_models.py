"""Real models beside the tiny ones: optional downloads of hundreds of megabytes, skipped where they are not there.

LLM_BARBER_MODELS names a folder with GGUF files or checkpoints, found by what their names begin with.
"""

import math
import os
from pathlib import Path

import pytest

import llm_barber
from llm_barber import EvaluateConfig, InspectConfig, PruneConfig, evaluate, inspect, prune

VARIABLE = "LLM_BARBER_MODELS"
TEXT = str(Path(llm_barber.__file__).parent / "data" / "wikitext2-raw-test.txt")


@pytest.mark.parametrize("name", ["gemma-3-270m", "qwen"])
def test_a_layer_of_a_real_model(tmp_path: Path, name: str) -> None:
    models = [
        path for path in sorted(Path(os.environ.get(VARIABLE, "/nowhere")).glob("*")) if path.name.startswith(name)
    ]
    if not models:
        pytest.skip(f"{VARIABLE} names no folder with a model {name}*")
    settings = {"calibration": "builtin", "samples": 4, "seqlen": 128}
    report = prune(PruneConfig(model=models[0], output=tmp_path / "out", include=(r"\.layers\.0\.",), **settings))
    first = report.layers[0].linears
    assert sum(linear.pruned for linear in first) == pytest.approx(
        0.5 * sum(linear.weights for linear in first), abs=len(first)
    )
    assert sum(linear.pruned for layer in report.layers[1:] for linear in layer.linears) == 0
    assert inspect(InspectConfig(model=tmp_path / "out", dense=str(models[0]))).problems == ()
    config = EvaluateConfig(model=tmp_path / "out", against=models[0], text=(TEXT,), windows=2, seqlen=256)
    (text,) = evaluate(config).texts
    assert text.against is not None
    assert math.log(text.perplexity / text.against.perplexity) < 1
    assert 0 < text.against.divergence < 1
