"""The commands that look at checkpoints and pack them: parse, make a configuration, call, show; no logic."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from llm_barber.cli.app import app, print_json
from llm_barber.cli.options import DebugOption, JsonOption, ModelArgument, OutArgument, QuietOption, takes


@app.command(
    epilog="Examples:\n\nllm-barber inspect pruned\n\nllm-barber inspect pruned --dense meta-llama/Llama-3.2-1B --json"
)
@takes("revision")
def inspect(
    model: ModelArgument,
    dense: Annotated[
        str | None,
        typer.Option(metavar="DENSE", help="Verify that every kept weight equals this model's, bit for bit."),
    ] = None,
    dense_revision: Annotated[
        str | None, typer.Option(help="Revision of DENSE, if it is a hub id; --revision is MODEL's.")
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
    **settings: Any,
) -> None:
    """Say what is pruned in MODEL, which N:M patterns hold, and whether it is as its record says.

    Exits with 1 when something is not.
    """
    from llm_barber.cli.progress import ConsoleProgress
    from llm_barber.cli.tables import show_inspection
    from llm_barber.errors import VerificationError
    from llm_barber.settings.inspect import InspectConfig
    from llm_barber.tools.inspection import inspect as run

    with ConsoleProgress(quiet) as progress:
        inspection = run(InspectConfig(model=model, dense=dense, dense_revision=dense_revision, **settings), progress)
    if json:
        record = inspection.model_dump(mode="json")
        print_json({**record, "sparsity": inspection.sparsity, "patterns": inspection.patterns})
    else:
        show_inspection(inspection)
    if inspection.problems:
        shown = "; ".join(inspection.problems[:5])
        more = len(inspection.problems) - 5
        raise VerificationError(
            shown + (f"; and {more} more" if more > 0 else ""),
            f"the folder was changed{'' if dense is None else ', or is not of that dense model'}",
        )


@app.command(epilog="Example:\n\nllm-barber pack pruned packed")
@takes("overwrite")
def pack(
    model: Annotated[str, typer.Argument(metavar="OUT", help="The folder of a pruned model.")],
    output: Annotated[Path, typer.Argument(metavar="PACKED", help="Folder to write; appears when it is complete.")],
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
    **settings: Any,
) -> None:
    """Store a pruned model in fewer bytes: kept values and their places. At 50 % of bfloat16 about 56 % of the bytes.

    inspect and evaluate read PACKED; other programs need it unpacked.
    """
    from llm_barber.settings.copies import PackConfig
    from llm_barber.tools.packing import pack as run

    _run_packing(run, PackConfig(model=model, output=output, **settings), json, quiet)


@app.command(epilog="Example:\n\nllm-barber unpack packed unpacked")
@takes("overwrite")
def unpack(
    model: Annotated[str, typer.Argument(metavar="PACKED", help="A folder that pack wrote.")],
    output: OutArgument,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
    **settings: Any,
) -> None:
    """Write the files that were packed, bit for bit."""
    from llm_barber.settings.copies import PackConfig
    from llm_barber.tools.packing import unpack as run

    _run_packing(run, PackConfig(model=model, output=output, **settings), json, quiet)


@app.command(epilog="Example:\n\nllm-barber convert ./model-with-pytorch_model.bin converted")
@takes("revision", "overwrite")
def convert(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub id with pytorch_model*.bin.")],
    output: OutArgument,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
    **settings: Any,
) -> None:
    """Make safetensors of pickled weights, running none of the code that pickles can hold.

    The other commands do not read pickles.
    """
    from llm_barber.cli.progress import ConsoleProgress
    from llm_barber.settings.copies import ConvertConfig
    from llm_barber.tools.convert import convert as run

    with ConsoleProgress(quiet) as progress:
        report = run(ConvertConfig(model=model, output=output, **settings), progress)
    if json:
        print_json(report.model_dump(mode="json"))
    else:
        print(f"{report.output}: {report.tensors} tensors, {report.bytes:,} bytes, from {report.files} files")


def _run_packing(run: Callable[..., Any], config: Any, json: bool, quiet: bool) -> None:
    from llm_barber.cli.progress import ConsoleProgress
    from llm_barber.cli.tables import show_packing

    with ConsoleProgress(quiet) as progress:
        report = run(config, progress)
    if json:
        print_json(report.model_dump(mode="json"))
    else:
        show_packing(report)
