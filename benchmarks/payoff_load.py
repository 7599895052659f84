"""Load one side of the payoff benchmark and print its seconds and memory, as JSON.

python benchmarks/payoff_load.py packed FOLDER bfloat16
"""

import json
import sys
import time
from pathlib import Path

import torch
from payoff_sides import DENSE, PROMPT, Side

from llm_barber.usage import current_memory


def main() -> None:
    kind, folder, dtype = sys.argv[1:]
    if kind == DENSE:
        import transformers.models.auto.modeling_auto  # noqa: F401 - the time of imports is not the model's
    before, start = current_memory(), time.perf_counter()
    model = Side(kind, Path(folder)).load(dtype)
    seconds = time.perf_counter() - start
    with torch.inference_mode():
        model(torch.tensor(PROMPT)[None], use_cache=False)  # touches all weights
    print(json.dumps({"seconds": seconds, "memory": current_memory() - before}))


if __name__ == "__main__":
    main()
