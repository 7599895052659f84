"""Commands that inspect, pack and convert checkpoints.

Each calls a function with its settings and shows the result; no logic.
"""

from llm_barber.cli.app import command, print_json
from llm_barber.cli.options import JsonOption, QuietOption
from llm_barber.errors import VerificationError
from llm_barber.settings.copies import ConvertConfig, PackConfig, UnpackConfig
from llm_barber.settings.inspect import InspectConfig

SHOWN_PROBLEMS = 5


@command(
    InspectConfig,
    {"model": "MODEL"},
    ("llm-barber inspect pruned", "llm-barber inspect pruned --dense meta-llama/Llama-3.2-1B --json"),
)
def inspect(config: InspectConfig, json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Show sparsity and N:M patterns of MODEL, and check it against its record and a dense model.

    The exit code is 1 if something differs.
    """
    from llm_barber.cli.progress import ConsoleProgress

    with ConsoleProgress(quiet) as progress:
        from llm_barber.tools.inspection import inspect as run

        inspection = run(config, progress)
    if json:
        record = inspection.model_dump(mode="json")
        print_json({**record, "sparsity": inspection.sparsity, "patterns": inspection.patterns})
    else:
        from llm_barber.cli.tables import show_inspection

        show_inspection(inspection)
    if inspection.problems:
        shown = "; ".join(inspection.problems[:SHOWN_PROBLEMS])
        more = len(inspection.problems) - SHOWN_PROBLEMS
        raise VerificationError(
            shown + (f"; and {more} more" if more > 0 else ""),
            f"the folder was changed{'' if config.dense is None else ', or is not of that dense model'}",
        )


@command(
    PackConfig,
    {"model": "PRUNED", "output": "PACKED"},
    ("llm-barber pack pruned packed", "llm-barber pack pruned packed-int8 --values int8"),
)
def pack(config: PackConfig, json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Store the pruned model PRUNED in fewer bytes, as kept values and their positions.

    At 50 % sparsity the pruned linears of a bfloat16 model take 56 % of their bytes. inspect, evaluate and generate
    read PACKED, and so does transformers after llm_barber.register(). Other programs need it unpacked. --values int8
    rounds kept weights, to 32 % of the bytes. That changes the model: check it with evaluate --against PRUNED.
    """
    _run_packing(config, json, quiet)


@command(UnpackConfig, {"model": "PACKED", "output": "OUT"}, ("llm-barber unpack packed unpacked",))
def unpack(config: UnpackConfig, json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Restore the tensors that were packed, bit for bit.

    A model with int8 values becomes a dense model whose weights are rounded.
    """
    _run_packing(config, json, quiet)


@command(
    ConvertConfig,
    {"model": "MODEL", "output": "OUT"},
    ("llm-barber convert ./model-with-pytorch_model.bin converted",),
)
def convert(config: ConvertConfig, json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Convert pickled weights to safetensors, without running the code that pickles can hold.

    The other commands do not read pickles.
    """
    from llm_barber.cli.progress import ConsoleProgress

    with ConsoleProgress(quiet) as progress:
        from llm_barber.tools.convert import convert as run

        report = run(config, progress)
    if json:
        print_json(report.model_dump(mode="json"))
    else:
        print(f"{report.output}: {report.tensors} tensors, {report.bytes:,} bytes, from {report.files} files")


def _run_packing(config: UnpackConfig, json: bool, quiet: bool) -> None:
    """Pack or unpack a checkpoint, and show the result."""
    from llm_barber.cli.progress import ConsoleProgress

    with ConsoleProgress(quiet) as progress:
        from llm_barber.tools import packing

        report = packing.pack(config, progress) if isinstance(config, PackConfig) else packing.unpack(config, progress)
    if json:
        print_json(report.model_dump(mode="json"))
    else:
        from llm_barber.cli.tables import show_packing

        show_packing(report, unpacks=not isinstance(config, PackConfig))
