"""Write the page `docs/results/forecast-tables.md`: plans of large models on a named machine.

The plans are arithmetic that nobody has run. It takes seconds.

    python benchmarks/plan_tables.py
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from llm_barber.planning.forecast import ProcessesForecast
from llm_barber.planning.plan import plan
from llm_barber.planning.table import STAGE_NAMES, amount, duration, stage_cells
from llm_barber.settings.plan import PlanConfig

PAGE = Path(__file__).parent.parent / "docs" / "results" / "forecast-tables.md"
LLAMA_8B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 131072, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
LLAMA_2_7B = {**LLAMA_8B, "vocab_size": 32000, "intermediate_size": 11008, "num_key_value_heads": 32}
LLAMA_2_13B = {
    **LLAMA_2_7B, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
    "num_key_value_heads": 40,
}  # fmt: skip
LLAMA_70B = {
    **LLAMA_8B, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
}  # fmt: skip
LLAMA_405B = {
    **LLAMA_8B, "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128,
}  # fmt: skip
QWEN3_30B = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 151936, "hidden_size": 2048,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "max_position_embeddings": 40960, "tie_word_embeddings": False,
    "dtype": "bfloat16",
}  # fmt: skip
MODELS = {
    "meta-llama/Llama-2-7b-hf": LLAMA_2_7B, "meta-llama/Llama-2-13b-hf": LLAMA_2_13B,
    "meta-llama/Llama-3.1-8B": LLAMA_8B, "meta-llama/Llama-3.1-70B": LLAMA_70B,
    "meta-llama/Llama-3.1-405B": LLAMA_405B, "Qwen/Qwen3-30B-A3B": QWEN3_30B,
}  # fmt: skip
PRESETS = ("paper", "mask")
FAST = 100e9  # bytes/s between the GPUs of one machine
TIME = 3  # its number among a stage's cells
HEADINGS = ("stage", "FLOPs", "read", "written", "time, 1 process", "mostly", "8 processes", "8, 100 GB/s between them")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    lines = [
        "<!-- written by benchmarks/plan_tables.py -->",
        "# Tables of the forecasts",
        "",
        "[What these plans assume and say](forecasts.md). Memory of several processes is each process's, and",
        "host memory process 0's, which has most.",
        "",
    ]
    for name, configuration in MODELS.items():
        lines += [f"## {name.partition('/')[2]}", ""]
        for number, preset in enumerate(PRESETS):
            lines += section(name, configuration, preset, with_size=number == 0)
    PAGE.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def section(name: str, configuration: dict[str, Any], preset: str, with_size: bool) -> list[str]:
    """Lines of a model's plan by a preset: the command, work and time by stage, and memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(configuration), encoding="utf-8")
        settings: dict[str, Any] = {"model": str(path), "flops": 400e12, "preset": preset}
        forecast = plan(PlanConfig(**settings, processes=(1, 8)))
        (fast,) = plan(PlanConfig(**settings, processes=(8,), network=FAST)).runs
    alone, together = forecast.runs
    lines = []
    if with_size:
        lines = [
            f"{forecast.parameters:,} parameters, {forecast.weights:,} of them in the linears of {forecast.layers} "
            "decoder layers.",
            "",
        ]
    lines += [f"    llm-barber plan {name} --flops 400e12 --processes 1,8 --preset {preset}", ""]
    lines += [f"| {' | '.join(HEADINGS)} |", "|---|---:|---:|---:|---:|---|---:|---:|"]
    for stage, shared, faster in zip(alone.stages, together.stages, fast.stages, strict=True):
        if stage.seconds or stage.bytes_written:
            times = (stage_cells(other)[TIME] for other in (shared, faster))
            lines.append(f"| {' | '.join([STAGE_NAMES[stage.name], *stage_cells(stage), *times])} |")
    flops, read, written = (
        sum(getattr(stage, kind) for stage in alone.stages) for kind in ("flops", "bytes_read", "bytes_written")
    )
    lines.append(
        f"| **all** | {amount(flops)} | {amount(read)}B | {amount(written)}B | **{duration(alone.seconds)}** | "
        f"{alone.bottleneck} | **{duration(together.seconds)}** | **{duration(fast.seconds)}** |"
    )
    return [
        *lines,
        "",
        f"- 1 process: bottleneck {alone.bottleneck}; {_memory(alone)}.",
        f"- 8 processes: bottleneck {together.bottleneck}, at 100 GB/s {fast.bottleneck}; {_memory(together)}.",
        "",
    ]


def _memory(run: ProcessesForecast) -> str:
    assert run.device_memory is not None
    return f"{run.host_memory / 2**30:.0f} GiB of host and {run.device_memory / 2**30:.0f} GiB of device memory"


if __name__ == "__main__":
    main()
