"""Compare methods on a model with the settings of a results page. Resumable.

    python benchmarks/quality.py benchmarks/64x1024.yaml smollm2-135m-64x1024 --data DATA [--model FOLDER]

The settings are those of `compare`. Their texts and tasks lie in DATA: text/c4-sample.txt (calibration),
text/wikitext2-raw-test.txt and tasks/NAME.jsonl. Finished cells are kept in `benchmarks/results/NAME/cells`; tables,
plot and page lie beside that folder.
"""

import argparse
import os
from pathlib import Path

import yaml
from common import model_folder

from llm_barber import CompareConfig, compare
from llm_barber.cli.progress import ConsoleProgress
from llm_barber.comparison.written import markdown

RESULTS = Path(__file__).parent.resolve() / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path, help="a YAML file")
    parser.add_argument("name", help="of the results")
    parser.add_argument("--data", type=Path, required=True, help="folder with text/ and tasks/")
    parser.add_argument("--model", help="an ordinary checkpoint (default: SmolLM2-135M from its package)")
    options = parser.parse_args()
    settings = yaml.safe_load(options.settings.read_text(encoding="utf-8"))
    model = str(Path(model_folder(options.model)).resolve())
    os.chdir(options.data)  # so that results name texts as they lie in DATA
    with ConsoleProgress() as progress:
        comparison = compare(CompareConfig(model=model, output=RESULTS / options.name, **settings), progress)
    print(markdown(comparison))


if __name__ == "__main__":
    main()
