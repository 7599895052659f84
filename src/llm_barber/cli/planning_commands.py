"""Command that forecasts a run.

It calls a function with its settings and shows the result; no logic.
"""

from llm_barber.cli.app import command
from llm_barber.cli.options import JsonOption, QuietOption
from llm_barber.settings.plan import PlanConfig


@command(
    PlanConfig,
    {"model": "MODEL_OR_CONFIG"},
    (
        "llm-barber plan meta-llama/Llama-3.1-8B",
        "llm-barber plan ./model --preset paper --samples 32 --seqlen 512 --json",
        "llm-barber plan ./config.json --flops 400e12 --bandwidth 2e9 --processes 1,2,4,8",
    ),
    # Settings of `prune` that do not change a forecast.
    python_only=("output", "bos", "seed", "format", "overwrite", "resume", "report"),
)
def plan(config: PlanConfig, json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Forecast what prune will take: FLOPs and bytes of each stage, peak memory, time, and what sets the pace.

    Only the configuration is read, no weights. With --flops the forecast is for another machine, a GPU unless --device
    cpu.
    """
    from llm_barber.cli.progress import ConsoleProgress

    with ConsoleProgress(quiet) as progress:
        from llm_barber.planning.plan import plan as run

        forecast = run(config, progress)
    if json:
        print(forecast.to_json(), end="")
    else:
        from llm_barber.planning.table import show_forecast

        show_forecast(forecast)
